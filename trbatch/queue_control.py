"""What a client does with one job's chunks in the queue: take them out, see who works on them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rq.job import JobStatus

from trbatch.chunk_job import RETRIES, ChunkJob
from trbatch.connection import reaching
from trbatch.queue import BATCH, JobQueue
from trbatch.queue_names import Folder, ModelKey, chunk_id, index_key
from trbatch.recovery import LOST, attempt_of
from trbatch.untrusted import MOST, answers_of, number_of, text_of

# Takes a chunk out of the queue unless a worker has popped it: the whole or nothing of it.
# KEYS: the rq job, the index of the job's chunks, the queues; ARGV: the rq job's id.
_WITHDRAW = """
for place = 3, #KEYS do
    if redis.call('LREM', KEYS[place], 1, ARGV[1]) > 0 then
        redis.call('DEL', KEYS[1])
        redis.call('SREM', KEYS[2], ARGV[1])
        return 1
    end
end
return 0
"""

_FIELDS = ("worker_name", "started_at", "retries_left", LOST)


@dataclass(frozen=True, slots=True)
class ChunkLease:
    """A chunk that a worker is working on. Times are seconds."""

    chunk: int
    worker: str
    attempt: int  # from 1
    running_s: float | None  # since it was taken
    left_s: float  # until it goes to another worker, unless its own renews it before


def withdraw(jobs: JobQueue, job: Folder, *, unless_priority: str = "") -> int:
    """Take a job's waiting chunks out of the queue; those that run are left alone.

    Args:
        unless_priority: leave those alone that wait in the queue of this priority.

    Returns:
        How many were taken out.
    """
    model = ModelKey(job.manifest.model, job.manifest.revision)
    names = [name for name in model.queue_names if name != _queue_of(model, unless_priority)]
    queues = [jobs.queue(name).key for name in names]
    with reaching(jobs.url):
        script = jobs.connection.register_script(_WITHDRAW)
        ids = jobs.ids(job, JobStatus.QUEUED)
        taken = 0
        for start in range(0, len(ids), BATCH):
            with jobs.connection.pipeline(transaction=False) as pipeline:
                for rq_id in ids[start : start + BATCH]:
                    keys = [ChunkJob.key_for(rq_id), index_key(job), *queues]
                    script(keys, [rq_id], client=pipeline)
                taken += sum(pipeline.execute())
    return taken


def forget(jobs: JobQueue, job: Folder) -> None:
    """Remove every trace of a job that is no more from the queue."""
    withdraw(jobs, job)
    model = ModelKey(job.manifest.model, job.manifest.revision)
    with reaching(jobs.url):
        ids = jobs.ids(job)
        with jobs.connection.pipeline() as pipeline:
            for start in range(0, len(ids), BATCH):
                some = ids[start : start + BATCH]
                pipeline.delete(*map(ChunkJob.key_for, some))
                for name in model.queue_names:
                    queue = jobs.queue(name)
                    pipeline.zrem(queue.failed_job_registry.key, *some)
                    pipeline.zrem(queue.finished_job_registry.key, *some)
            pipeline.delete(index_key(job))
            pipeline.execute()


def leases(jobs: JobQueue, job: Folder) -> list[ChunkLease]:
    """The chunks of a job that a worker holds now, by number.

    What Redis holds may be anybody's: a value that is not what a worker writes counts as absent.
    """
    model = ModelKey(job.manifest.model, job.manifest.revision)
    ours, now = chunk_id(job, 0).removesuffix("0"), time.time()
    with reaching(jobs.url):
        with jobs.connection.pipeline(transaction=False) as pipeline:
            for name in model.queue_names:
                key = jobs.queue(name).started_job_registry.key
                pipeline.zrangebyscore(key, now, "+inf", withscores=True)
            pairs = [pair for answer in pipeline.execute() for pair in answer]
        until = {text_of(entry).partition(":")[0]: score for entry, score in pairs}
        chunks = {rq_id: number_of(rq_id.removeprefix(ours), -1) for rq_id in until}
        held = [i for i, chunk in chunks.items() if i.startswith(ours) and chunk >= 0]
        with jobs.connection.pipeline(transaction=False) as pipeline:
            for rq_id in held:
                pipeline.hmget(ChunkJob.key_for(rq_id), *_FIELDS)
            known = [answer or [None] * len(_FIELDS) for answer in answers_of(pipeline)]
    found = [
        ChunkLease(
            chunk=chunks[rq_id],
            worker=text_of(worker or b""),
            attempt=attempt_of(min(number_of(left, RETRIES), RETRIES), number_of(lost)),
            running_s=_seconds_since(started, now),
            left_s=min(until[rq_id] - now, MOST),
        )
        for rq_id, (worker, started, left, lost) in zip(held, known, strict=True)
    ]
    return sorted(found, key=lambda lease: lease.chunk)


def ahead(jobs: JobQueue, job: Folder, priority: str) -> int:
    """Chunks of the same model that wait with a higher priority than this job's."""
    model = ModelKey(job.manifest.model, job.manifest.revision)
    waiting = jobs.waiting_by_priority(model)
    more_urgent: Sequence[str] = list(waiting)[: list(waiting).index(priority)]
    return sum(waiting[name] for name in more_urgent)


def _queue_of(model: ModelKey, priority: str) -> str:
    return model.queue_of(priority) if priority else ""


def _seconds_since(value: bytes | None, now: float) -> float | None:
    try:
        return now - datetime.fromisoformat(text_of(value or b"")).timestamp()
    except (ValueError, OverflowError):
        return None
