"""rq's job and queue, locked down and with short locks. Used by `queue` and `lease` alone."""

from __future__ import annotations

import base64
import binascii
import logging
import zlib
from typing import Any

import redis
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus
from rq.results import Result

logger = logging.getLogger("trbatch.queue")

LOCK_S = 10  # a worker killed while it cleans, or while it takes a chunk, blocks others this long
STUCK_S = 10  # an id popped so long ago without a lease is brought back
RETRIES = 3  # of a chunk, a crash of its worker included
RESULT_TTL_S = 24 * 3600
FAILURE_TTL_S = 30 * 24 * 3600
LARGEST = 1 << 20  # bytes of an entry, as it lies in Redis and unpacked; ours have about 1,500


class UnreadableEntry(NoSuchJobError):
    """What lies under a job's key is none, or far too large: as good as no job at all."""


class ChunkJob(Job):
    """rq's job with everything switched off that would run or call what Redis says.

    Whoever can write to Redis can put anything into a job; the worker compares the function's name
    with a constant and imports nothing, runs no callback and posts to no address. An entry that rq
    could not read counts as absent, wherever rq comes across it, so that none stops a worker.
    """

    success_callback = property(lambda self: None)
    failure_callback = property(lambda self: None)
    stopped_callback = property(lambda self: None)

    @property
    def func(self) -> Any:
        """Refused: nothing is ever imported by a name that comes out of Redis."""
        raise PermissionError("a chunk's function is never called")

    def _handle_success(self, result_ttl: int, pipeline: Any, *_: Any, **__: Any) -> None:
        """Mark as finished without rq's record of results: 4 KB of Redis that say nothing."""
        self.set_status(JobStatus.FINISHED, pipeline=pipeline)
        self.save(pipeline=pipeline, include_meta=False, include_result=False)
        self.finished_job_registry.add(self, result_ttl, pipeline)

    def send_webhooks(self, status: Any, *, exc_string: str | None = None) -> None:
        """Send nothing: the addresses would come out of Redis."""

    def refresh(self) -> None:
        """Read the entry, but none that would fill our memory.

        Raises:
            UnreadableEntry: it is no job.
        """
        size = self.connection.memory_usage(self.key, samples=0) or 0
        if size > LARGEST:
            raise _unreadable(self, f"it has {size:,} bytes")
        try:
            super().refresh()  # type: ignore[no-untyped-call]
        except redis.ResponseError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
            raise _unreadable(self, "it is no hash") from error

    def restore(self, raw_data: Any) -> Any:
        """Take an entry's fields over.

        Raises:
            UnreadableEntry: they are not those of a job.
        """
        try:
            # rq inflates these without a limit, and takes them as they are if they are not packed.
            packed = (b"data", b"exc_info")
            limited = {k: inflated(v) if k in packed else v for k, v in raw_data.items()}
            found = super().restore(limited)
        except NoSuchJobError:
            raise
        except Exception as error:
            raise _unreadable(self, f"{type(error).__name__}: {error}") from error
        self._promise_what_all_get()
        return found

    def _promise_what_all_get(self) -> None:
        """Take no time, delay or repetition from Redis, and no more retries than there can be."""
        self.retries_left = min(max(self.retries_left or 0, 0), RETRIES)
        self.timeout, self.ttl = -1, None
        self.result_ttl, self.failure_ttl = RESULT_TTL_S, FAILURE_TTL_S
        self.retry_intervals = self.repeat_intervals = self.repeats_left = None
        self.rate_limit_key = self.rate_limit_concurrency = None

    def failure_text(self) -> str:
        """What its last failure said; "" if nothing did."""
        key = Result.get_key(self.id)  # type: ignore[no-untyped-call]
        found: Any = self.connection.xrevrange(key, "+", "-", count=1)
        fields = (found[0][1] if found else None) or {}
        try:
            raw = base64.b64decode(fields.get(b"exc_string", b""), validate=True)
            return inflated(raw).decode("utf-8", "replace")
        except (binascii.Error, ValueError):
            return ""


def inflated(data: bytes) -> bytes:
    """The bytes inflated; themselves if they are not packed.

    Raises:
        ValueError: there would be more than `LARGEST`.
    """
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(data, LARGEST)
    except zlib.error:
        return data
    if unpacker.unconsumed_tail:
        raise ValueError(f"it inflates to more than {LARGEST:,} bytes")
    return plain


def _unreadable(job: Job, why: str) -> UnreadableEntry:
    logger.error("queue entry %r is not readable and is passed over: %.200s", job.id, why)
    return UnreadableEntry(f"{job.id}: {why}")


class ChunkQueue(Queue):
    """rq's queue with a short maintenance lock: killed inside it, a worker stops no recovery."""

    job_class = ChunkJob

    def acquire_maintenance_lock(self) -> bool:
        """Whether this caller may clean the queue's registries now."""
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=LOCK_S))

    def enqueue_dependents(self, job: Job, *_: Any, **settings: Any) -> dict[str, list[str]]:
        """Enqueue nothing: no chunk depends on another, whatever Redis says."""
        return {}
