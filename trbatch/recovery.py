"""Chunks back into the queue when their worker lets go of them, or is gone. Knows rq's keys.

Each move is one script on the server, so that of several who do it at once exactly one succeeds:
rq's own clean-up reads, decides and writes in separate steps, and two of them at a time enqueue a
chunk twice. None of it costs the chunk a retry: those are for failures of the chunk itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import redis
from rq import Queue
from rq.defaults import RQ_KEY_PREFIX
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE, ExecutionRegistry
from rq.utils import as_text, current_timestamp, now, utcformat

from trbatch import chunk_job
from trbatch.chunk_job import ChunkJob, ChunkQueue
from trbatch.queue_names import CLAIM
from trbatch.suspects import Suspects
from trbatch.untrusted import number_of

LOST = "trbatch_lost"  # field of an entry: how often a worker lost it or let go of it half done
SUSPECTS = "trbatch_suspects"  # field of an entry: see `suspects`

_MOST = 1000  # entries a call; the server does nothing else meanwhile

# An execution ends and its entry waits again; nothing happens if it has ended already.
_REQUEUE = """
local function requeue(wip, queue, job, id, member, names, lost, suspects, front)
  if redis.call('ZREM', wip, member) == 0 then return 0 end
  -- pcall: an entry may be anything that somebody put there, and must not stop the others.
  redis.call('DEL', names.execution)
  redis.pcall('ZREM', names.executions, names.id)
  if redis.pcall('HGET', job, 'status') ~= 'started' then return 0 end
  local worker = redis.call('HGET', job, 'worker_name')
  if worker then redis.pcall('SREM', string.format(names.worker, worker), member) end
  redis.call('HSET', job, 'status', 'queued', 'enqueued_at', names.now)
  if type(redis.pcall('HINCRBY', job, 'trbatch_lost', lost)) == 'table' then
    redis.call('HSET', job, 'trbatch_lost', lost)
  end
  if suspects ~= '' then redis.call('HSET', job, 'trbatch_suspects', suspects) end
  redis.call(front and 'LPUSH' or 'RPUSH', queue, id)
  return 1
end
local function names_of(member)
  local id, execution = string.match(member, '^(.*):([^:]*)$')
  if not id then return nil end
  return {
    job = ARGV[1] .. id, entry = id, id = execution, now = ARGV[5],
    execution = ARGV[2] .. member, executions = ARGV[3] .. id, worker = ARGV[4],
  }
end
"""

_GIVE_BACK = (
    _REQUEUE
    + """
local names = names_of(ARGV[6])
if not names then return 0 end
return requeue(KEYS[1], KEYS[2], names.job, names.entry, ARGV[6], names,
               ARGV[7], ARGV[8], ARGV[9] == '1')
"""
)

_RECOVER = (
    _REQUEUE
    + """
local back = 0
local over = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[6], 'LIMIT', 0, tonumber(ARGV[7]))
for _, member in ipairs(over) do
  local names = names_of(member)
  if names then
    back = back + requeue(KEYS[1], KEYS[2], names.job, names.entry, member, names, 1, '', true)
  else
    redis.call('ZREM', KEYS[1], member)
  end
end
return back
"""
)

# An id that was popped lies in a list of its own until it is leased: out of there, and back into
# the queue if its entry waits.
_UNPOP = """
local function unpop(popped, queue, job, id)
  redis.call('LREM', popped, 1, id)
  if redis.pcall('HGET', job, 'status') ~= 'queued' then return 0 end
  redis.call('LPUSH', queue, id)
  return 1
end
"""

# What a worker died over taking: an id that it has popped, or a lease that it has not noted yet. An
# id that nobody claims may have been popped by somebody else just now, who goes on all the same: an
# id that is in the queue once too often is passed over.
_RELEASE = (
    _REQUEUE
    + _UNPOP
    + """
local worker, noted = ARGV[6], {}
for at = 9, #ARGV do noted[ARGV[at]] = true end
local function claimant(id)
  local claim = redis.pcall('GET', ARGV[7] .. id)
  return type(claim) == 'string' and claim
end
local function listed(found) return found.err and {} or found end
local back = 0
for _, member in ipairs(listed(redis.pcall('SMEMBERS', string.format(ARGV[4], worker)))) do
  local names = names_of(member)
  if names and type(redis.pcall('ZSCORE', KEYS[1], member)) == 'string' then
    local taking = claimant(names.entry) == worker
    if taking then redis.call('DEL', ARGV[7] .. names.entry) end
    -- An entry that still waits was leased by half, which is undone here; it is pushed below.
    local half = redis.pcall('HGET', names.job, 'status') == 'queued'
    if (taking or half) and not noted[names.id] then
      back = back + requeue(KEYS[1], KEYS[2], names.job, names.entry, member, names, 1, '', true)
    end
  end
end
for _, id in ipairs(listed(redis.pcall('LRANGE', KEYS[3], -tonumber(ARGV[8]), -1))) do
  local claim = claimant(id)
  if claim == worker then redis.call('DEL', ARGV[7] .. id) end
  if claim == worker or not claim then
    back = back + unpop(KEYS[3], KEYS[2], ARGV[1] .. id, id)
  end
end
return back
"""
)

# An id that need not wait any more: checked and removed at once, for it may just have come back.
_PASS_OVER = """
if redis.pcall('HGET', KEYS[2], 'status') == 'queued' then return 0 end
return redis.call('LREM', KEYS[1], 1, ARGV[1])
"""

# Of the popped ids those that nobody leases go back, and those whose entries wait no more are gone.
_UNSTICK = (
    _UNPOP
    + """
local back = 0
for _, id in ipairs(redis.call('LRANGE', KEYS[1], 0, tonumber(ARGV[4]))) do
  local job, key = ARGV[1] .. id, KEYS[1] .. ':seen:' .. id
  local seen = redis.pcall('GET', key)
  seen = type(seen) == 'string' and tonumber(seen)
  local waits = redis.pcall('HGET', job, 'status') == 'queued'
  if waits and not seen then
    redis.call('SET', key, ARGV[2], 'EX', 60)
  elseif not waits or tonumber(ARGV[2]) - seen >= tonumber(ARGV[3]) then
    redis.call('DEL', key)
    back = back + unpop(KEYS[1], KEYS[2], job, id)
  end
end
return back
"""
)


def give_back(
    queue: ChunkQueue,
    entry: str,
    execution: str,
    *,
    lost: bool = False,
    suspects: Suspects | None = None,
    front: bool = True,
) -> bool:
    """Put an entry that somebody holds back into its queue.

    Args:
        queue: where it came from.
        entry: the rq job's id.
        execution: whose the entry is; if it is no longer, nothing happens.
        lost: whether its rows were begun and did not end as they should.
        suspects: who may have killed its worker; None changes nothing.
        front: of the queue, else behind all others.

    Returns:
        Whether this call put it back.
    """
    member = f"{entry}:{execution}"
    known = suspects.to_json() if suspects else ""
    arguments: list[str | int | float] = [member, int(lost), known, int(front)]
    return bool(_call(queue, _GIVE_BACK, arguments))


def release(queue: ChunkQueue, worker: str, noted: Iterable[str] = ()) -> int:
    """Put back what a worker that is gone was just taking out of this queue.

    Args:
        queue: that it took from.
        worker: its name.
        noted: executions that are known to have been its own, and are put back otherwise.

    Returns:
        How many entries: not more than one, but for those that nobody was going to lease.
    """
    keys = [queue.intermediate_queue_key]
    return _call(queue, _RELEASE, [worker, CLAIM, _MOST, *noted], keys)


def pass_over(queue: ChunkQueue, entry: str) -> None:
    """Forget a popped id, unless its entry waits: then a clean-up brings it back."""
    keys = [queue.intermediate_queue_key, as_text(ChunkJob.key_for(entry))]
    queue.connection.eval(_PASS_OVER, len(keys), *keys, entry)


def recover(queue: ChunkQueue) -> int:
    """Put back the entries whose lease ran out, and those that nobody leased after their pop.

    Returns:
        How many.
    """
    back = _call(queue, _RECOVER, [current_timestamp(), _MOST])
    keys = [queue.intermediate_queue_key, queue.key]
    stuck = (_prefix_of_jobs(), current_timestamp(), chunk_job.STUCK_S, _MOST)
    return back + int(queue.connection.eval(_UNSTICK, 2, *keys, *stuck))


class Witness:
    """Tells chunks that somebody works on from those that the dead have left."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, bytes], float] = {}  # of each lease: its end, when first seen

    def all_live(self, queues: Sequence[Queue]) -> bool:
        """Whether every lease of these queues was renewed since it was first seen here.

        A chunk that was popped and never leased is nobody's, too.
        """
        ends: dict[tuple[str, bytes], float] = {}
        popped = 0
        for queue in queues:
            popped += int(queue.connection.llen(queue.intermediate_queue_key))
            key = queue.started_job_registry.key
            found: Any = queue.connection.zrange(key, 0, -1, withscores=True)
            ends.update({(key, member): end for member, end in found})
        self._first = {lease: self._first.get(lease, end) for lease, end in ends.items()}
        return not popped and all(end != self._first[lease] for lease, end in ends.items())


def history(connection: redis.Redis, entry: str) -> tuple[int, Suspects]:
    """How often workers lost this entry, and who may have killed them."""
    key = as_text(ChunkJob.key_for(entry))
    lost, suspects = connection.hmget(key, LOST, SUSPECTS)
    return number_of(lost), Suspects.from_json(suspects)


def attempt_of(retries_left: int, lost: int) -> int:
    """Which attempt at a chunk it is, from 1, after its failures and the workers that lost it."""
    return chunk_job.RETRIES - retries_left + lost + 1


def _call(
    queue: ChunkQueue,
    script: str,
    arguments: Sequence[str | int | float],
    more_keys: Sequence[str] = (),
) -> int:
    keys = [queue.started_job_registry.key, queue.key, *more_keys]
    names = [
        _prefix_of_jobs(),
        f"{RQ_KEY_PREFIX}:execution:",
        ExecutionRegistry.key_template.format(""),
        WORKER_EXECUTIONS_KEY_TEMPLATE.format("%s"),
        utcformat(now()),
    ]
    found = queue.connection.eval(script, len(keys), *keys, *names, *arguments)
    return int(found)


def _prefix_of_jobs() -> str:
    return as_text(ChunkJob.key_for(""))
