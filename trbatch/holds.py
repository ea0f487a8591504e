"""What people want of the jobs in a worker's hands: paused, cancelled, past a deadline, retried."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from trbatch.chunk_work import ChunkWork
from trbatch.errors import TrbatchError
from trbatch.job import JobFolder
from trbatch.queue import JobQueue
from trbatch.queue_control import withdraw

logger = logging.getLogger("trbatch.worker")

LOOK_S = 2.0  # between looks at what people want of the jobs in hand


class Holds:
    """Looks at the jobs in hand every so often."""

    def __init__(self) -> None:
        self._looked_at = 0.0

    def found(self, folders: Iterable[JobFolder]) -> set[JobFolder]:
        """Those of the folders whose rows nobody should decode now; none between two looks."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return set()
        self._looked_at = now
        return {folder for folder in set(folders) if _held(folder)}


def requeue_if_wanted(jobs: JobQueue, folder: JobFolder, chunk: int) -> None:
    """Enqueue a chunk that we have just let go of, unless its job is held.

    Who resumed the job, or retries its rows, found the chunk in our hands and left it to us.
    """
    try:
        control = folder.control()
        if not control.stopped:
            jobs.enqueue(folder, [chunk], control.priority)
    except TrbatchError as error:
        logger.warning("%s: cannot see whether the job goes on: %s", folder.id, error)


def clear_if_held(jobs: JobQueue, folder: JobFolder) -> None:
    """Take the waiting chunks of a job that is held out of the queue: thousands, it may be.

    Whoever takes the job up meanwhile says so in its folder first and enqueues then, so that
    another look at the folder tells whether chunks were taken out that are wanted.
    """
    try:
        if taken := withdraw(jobs, folder):
            logger.info("%s is held: %d waiting chunks taken out of the queue", folder.id, taken)
        control = folder.control()
        if not control.stopped:
            jobs.enqueue(folder, folder.missing_chunks(), control.priority)
    except TrbatchError as error:
        logger.warning("%s: its waiting chunks stay in the queue: %s", folder.id, error)


def asked_again(work: ChunkWork) -> bool:
    """Whether a chunk that is through is wanted again: somebody retries rows that have failed."""
    try:
        return not work.held and work.asked_again()
    except TrbatchError as error:
        logger.warning("%s: cannot see whether rows are retried: %s", work.folder.id, error)
        return False


def _held(folder: JobFolder) -> bool:
    try:
        return folder.control().stopped
    except TrbatchError as error:  # the storage is away for a moment, or somebody edits the file
        logger.warning("%s: cannot see whether the job is held: %s", folder.id, error)
        return False
