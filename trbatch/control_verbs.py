"""What people do with a submitted job: enqueue, hold, resume, retry. Called by `api` alone.

Each writes the job folder first and tells the queue then: workers look into the folder, so that a
queue that is away for a while only makes it later.
"""

from __future__ import annotations

from collections.abc import Iterable

from trbatch.errors import UsageError
from trbatch.job import JobFolder
from trbatch.moments import written
from trbatch.queue import JobQueue
from trbatch.queue_control import withdraw


def enqueue(job: JobFolder, redis_url: str) -> int:
    """Enqueue the chunks that lack rows and neither wait nor run, unless the job is held.

    Chunks that wait with another priority than the job has now are moved. Returns how many were
    added or moved.
    """
    control = job.control()
    if control.stopped:
        return 0
    with JobQueue.connect(redis_url) as jobs:
        withdraw(jobs, job, unless_priority=control.priority)
        return jobs.enqueue(job, job.missing_chunks(), control.priority)


def hold(job: JobFolder, redis_url: str, how: str) -> None:
    """Pause or cancel a job, unless it has come to its end.

    Args:
        how: `paused` or `cancelled`.
    """
    control = job.control()
    if job.progress().complete or control.row_end() is not None:
        return
    control.held(how).write(job.folder)
    clear(job, redis_url)


def clear(job: JobFolder, redis_url: str) -> None:
    """Take a job's waiting chunks out of the queue: no model should be loaded for them."""
    with JobQueue.connect(redis_url) as jobs:
        withdraw(jobs, job)


def resume(job: JobFolder, redis_url: str, deadline: str) -> int:
    """Go on with a job, whatever held it. Returns how many chunks were enqueued.

    Raises:
        UsageError: the deadline has passed and no other is given.
    """
    before = job.control()
    control = before.asked(deadline=deadline)
    if control.expired and control.deadline is not None and not job.progress().complete:
        raise UsageError(
            f"the deadline of job {job.id} has passed: {written(control.deadline)}",
            hint=f"trbatch resume {job.path} --deadline 8h, or --deadline none",
        )
    if control.hold:
        control = control.held("")
    if control != before:
        control.write(job.folder)
    return enqueue(job, redis_url)


def retry(job: JobFolder, redis_url: str, codes: Iterable[str]) -> int:
    """Decode failed rows of some error codes, or of all, again. Returns how many.

    Those of a chunk that a worker has in hand it takes on once it is through with the others.

    Raises:
        UsageError: the job is held.
    """
    if job.control().stopped:
        raise UsageError(
            f"job {job.id} is paused, cancelled or past its deadline",
            hint=f"first: trbatch resume {job.path}",
        )
    wanted = set(codes)
    _, failed = job.outcomes()
    while True:
        failures = job.ledger.failures()
        meant = [name for name, found in failures.items() if not wanted or wanted & found.keys()]
        if not meant:
            return 0
        job.ledger.retries.ask(meant, wanted)
        if set(meant) <= set(job.ledger.names()):
            break  # else they were compacted in this moment, and the failures lie in others
    _, still_failed = job.outcomes()
    enqueue(job, redis_url)
    return failed - still_failed
