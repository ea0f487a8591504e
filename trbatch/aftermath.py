"""What becomes of the chunks of a worker that died: at once back in the queue, with suspects."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import redis
from rq import worker_registration
from rq.worker import BaseWorker

from trbatch import recovery
from trbatch.connection import reaching
from trbatch.deaths import Death
from trbatch.errors import TrbatchError
from trbatch.flight import FlightRecord, Row
from trbatch.queue import JobQueue
from trbatch.suspects import ALONE

logger = logging.getLogger("trbatch.worker")


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What `settle` did: chunks put back, rows under suspicion, rows that are poison now."""

    chunks: int = 0
    suspects: int = 0
    poison: int = 0

    def __str__(self) -> str:
        words = f"chunks back in the queue: {self.chunks}"
        if self.poison:
            return f"{words}, rows found to be poison: {self.poison}"
        return f"{words}, suspect rows, to run apart: {self.suspects}" if self.suspects else words


def settle(jobs: JobQueue, flight: FlightRecord, cause: str, *, own: bool) -> Aftermath:
    """Put back what a dead worker held, by its flight record.

    Args:
        jobs: the queue.
        flight: of the worker.
        cause: of its death, in words.
        own: whether it died of what it did, so that the rows in its engine are suspects; a worker
            that somebody killed leaves no suspects.
    """
    held = flight.holdings()
    taking = sum(
        recovery.release(jobs.queue(name), held.worker, held.leases) for name in held.queues
    )
    running = flight.running() if own else {}
    done = settle_leases(jobs, held.leases, running, cause)
    if held.worker:
        _forget(jobs.connection, held.worker)
    return replace(done, chunks=done.chunks + taking)


class Settling:
    """The same by a supervisor, in a thread beside it: a queue that hangs may take its time, and
    must keep nobody from other workers and from signals.

    Args:
        redis_url: the queue.
        flight: of the worker; not to be closed before this is over.
        death: how it ended.

    Attributes:
        suspects: how many rows are suspects now, once it is over.
    """

    def __init__(self, redis_url: str, flight: FlightRecord, death: Death) -> None:
        self.suspects = 0
        self._redis_url, self._flight, self._death = redis_url, flight, death
        self._begin = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="settling", daemon=True)
        if flight.holdings().worker:
            self._thread.start()

    @property
    def over(self) -> bool:
        """Whether what the worker held is back in the queue, or cannot be put there."""
        return not self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """How long ago it was begun."""
        return time.monotonic() - self._begin

    def _run(self) -> None:
        death = self._death
        try:
            with JobQueue.connect(self._redis_url) as jobs, reaching(jobs.url):
                after = settle(jobs, self._flight, death.cause, own=death.own)
        except (TrbatchError, redis.RedisError) as error:
            if self._flight.holdings().leases:
                logger.warning("its chunks come back when their leases run out: %s", error)
            return
        self.suspects = after.suspects
        if after.chunks:
            logger.warning("%s", after)


def settle_broken(jobs: JobQueue, flight: FlightRecord, error: BaseException) -> None:
    """The same by the worker itself, whose engine raised. What it holds no more is left alone."""
    leases = flight.holdings().leases
    if not leases:
        return
    cause = f"{type(error).__name__}: {error}"[:200]
    after = settle_leases(jobs, leases, flight.running(), cause)
    flight.pulse.accuse(after.suspects)
    logger.error("%s: %s", cause, after)


def settle_leases(
    jobs: JobQueue,
    leases: Mapping[str, tuple[str, str]],
    running: Mapping[str, Sequence[Row]],
    cause: str,
) -> Aftermath:
    """Put these leases' entries back into their queues, those with suspects to the very front.

    Args:
        jobs: the queue.
        leases: by execution, the entry and the name of its queue.
        running: of the leases whose rows are suspects, these rows.
        cause: of the worker's end, in words.
    """
    alone = sum(map(len, running.values())) == 1
    chunks = suspected = poison = 0
    # The last to be put back is the first to be taken.
    innocent_first = sorted(leases, key=lambda execution: execution in running)
    for execution in innocent_first:
        entry, queue = leases[execution]
        suspects = None
        if rows := running.get(execution):
            _, before = recovery.history(jobs.connection, entry)
            suspects = before.after_crash(rows, cause, alone=alone)
        found = jobs.queue(queue)
        if not recovery.give_back(found, entry, execution, lost=True, suspects=suspects):
            continue  # its lease has run out before: others have it
        chunks += 1
        if suspects is not None and rows:
            suspected += len(rows)
            poison += sum(suspects.alone.get(row, 0) == ALONE for row in rows)
    return Aftermath(chunks, suspected, poison)


def _forget(connection: redis.Redis, worker: str) -> None:
    """Take a dead worker off the list of those that live."""
    key = f"{BaseWorker.redis_worker_namespace_prefix}{worker}"
    queues = connection.hget(key, "queues")
    with connection.pipeline() as pipeline:
        pipeline.srem(worker_registration.REDIS_WORKER_KEYS, key)
        for name in (queues or b"").decode(errors="replace").split(","):  # type: ignore[union-attr]
            pipeline.srem(worker_registration.WORKERS_BY_QUEUE_KEY % name, key)
        pipeline.delete(key)
        pipeline.execute()
