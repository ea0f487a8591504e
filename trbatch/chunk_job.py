"""rq's job and queue, locked down and with short locks. Used by `queue` and `lease` alone."""

from __future__ import annotations

from typing import Any

from rq import Queue
from rq.job import Job, JobStatus

LOCK_S = 10  # a worker killed while it cleans, or while it takes a chunk, blocks others this long
STUCK_S = 10  # an id popped so long ago without a lease is brought back


class ChunkJob(Job):
    """rq's job with everything switched off that would run or call what Redis says.

    Whoever can write to Redis can put anything into a job; the worker compares the function's name
    with a constant and imports nothing, runs no callback and posts to no address.
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


class ChunkQueue(Queue):
    """rq's queue with a short maintenance lock: killed inside it, a worker stops no recovery."""

    job_class = ChunkJob

    def acquire_maintenance_lock(self) -> bool:
        """Whether this caller may clean the queue's registries now."""
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=LOCK_S))
