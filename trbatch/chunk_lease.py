"""A chunk that a worker may work on, and how a queue entry is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from rq.executions import Execution
from rq.job import Job

from trbatch.chunk_job import ChunkQueue
from trbatch.errors import TrbatchError
from trbatch.queue import FUNCTION
from trbatch.suspects import Suspects


class BadChunk(TrbatchError):
    """A queue entry that is no chunk of ours, or one that this worker must not open."""


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A chunk that this worker may work on until the lease is lost."""

    job: Job
    queue: ChunkQueue
    execution: Execution
    folder: str  # of the job
    chunk: int
    generation: int
    attempt: int  # from 1
    suspects: Suspects = field(default_factory=Suspects)  # rows that may have killed a worker

    @property
    def id(self) -> str:
        """Unique among all leases ever given."""
        return str(self.execution.id)


def payload_of(job: Job) -> tuple[str, int, int]:
    """Job folder, chunk and generation out of a queue entry.

    Raises:
        BadChunk: it is not one that `JobQueue.enqueue` made.
    """
    if job.func_name != FUNCTION or job.instance or job.kwargs:
        raise BadChunk(f"{job.id} is not a chunk: it asks for {job.func_name!r}")
    match job.args:
        case [str(folder), int(chunk), int(generation)] if chunk >= 0 and folder:
            return folder, chunk, generation
    raise BadChunk(f"{job.id} is not a chunk: its arguments are {str(job.args)[:200]}")
