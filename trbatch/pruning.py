"""Room in the store: collected jobs made small, old ones removed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from trbatch import leftovers
from trbatch.compaction import Overtaken, compact, needed
from trbatch.config import default_store
from trbatch.control import Control
from trbatch.errors import JobFailed, TrbatchError
from trbatch.job import JobFolder
from trbatch.job_status import JobStatus, job_status
from trbatch.naming import MATRICES
from trbatch.queue import JobQueue
from trbatch.queue_control import forget
from trbatch.segments import FOLDER, published
from trbatch.storage import folder
from trbatch.submission import DOOMED, MANIFEST, MARKS

_LEFT = "killed commands had left something"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was done with one job, or would be in a dry run. `bytes` are those that it frees."""

    job: str
    action: str  # removed, compacted, cleaned, kept
    reason: str
    files: int = 0
    bytes: int = 0


def prune(
    names: Sequence[str],
    *,
    store: str = "",
    redis_url: str = "",
    older_than_s: float | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> list[Pruned]:
    """Make collected jobs small and remove old ones.

    A job whose rows were all collected gets few segments in the place of many and loses the chunks
    of earlier readings; it can be collected, and its input grown, as before. A job whose last
    change is older than `older_than_s` seconds is removed as a whole, but only when it has come to
    its end and was collected. What commands and workers killed a day ago or earlier have left goes
    from every job; a folder that a killed `submit` has left without making a job goes as a whole.

    Args:
        names: ids or paths of jobs; () takes all jobs of the store.
        store: of the ids; "" takes `default_store()`.
        older_than_s: None removes no job.
        force: remove old jobs, too, that were not collected, lack rows, or still run.
        dry_run: only tell.

    Raises:
        InputError: there is no such job.
        Unreachable: the storage fails, or the queue, which knows whether a job runs.
    """
    place = store or str(default_store())
    if not names and not dry_run:
        _finish_removals(place)
    done = [] if names else _clear(place, dry_run=dry_run)
    for job in _jobs(names, place):
        if isinstance(job, Pruned):
            done.append(job)
        else:
            done.append(_prune(job, redis_url, older_than_s, force=force, dry_run=dry_run))
    return done


def _jobs(names: Sequence[str], store: str) -> Iterator[JobFolder | Pruned]:
    for name in names:
        yield JobFolder.find(name, store)
    for name in folder(store).folders("") if not names else ():
        inner = folder(folder(store).join(name))
        if name == MATRICES or not inner.exists(MANIFEST):
            continue
        try:
            yield JobFolder.open(inner.path)
        except TrbatchError as error:
            yield Pruned(job=name, action="kept", reason=error.message)


def _prune(
    job: JobFolder, redis_url: str, older_than_s: float | None, *, force: bool, dry_run: bool
) -> Pruned:
    age = time.time() - _last_change(job, job.control())
    is_old = older_than_s is not None and age >= older_than_s
    if is_old and force:
        return _removed(job, redis_url, age, dry_run=dry_run)
    try:
        status = job_status(job, redis_url)
    except JobFailed as error:  # a chunk or a segment of it is damaged
        return Pruned(job=job.id, action="kept", reason=error.message)
    if is_old:
        reason = _why_not_removed(job, status)
        if reason:
            return Pruned(job=job.id, action="kept", reason=f"{reason}; --force removes it")
        return _removed(job, redis_url, age, dry_run=dry_run)
    left = leftovers.abandoned(job)
    if status.state == "completed" and job.folder.exists(MARKS[0]):
        return _shrink(job, left, dry_run=dry_run)
    return _clean(job, left, _why_not_compacted(job, status), dry_run=dry_run)


def _removed(job: JobFolder, redis_url: str, age: float, *, dry_run: bool) -> Pruned:
    """Remove a job to which nothing has happened for `age` seconds."""
    files, size = job.folder.usage("")
    if not dry_run:
        with JobQueue.connect(redis_url) as jobs:
            forget(jobs, job)
        _remove(job.folder.path)
    days = f"{age / 86400:.1f} days old"
    return Pruned(job=job.id, action="removed", reason=days, files=files, bytes=size)


def _shrink(job: JobFolder, left: list[str], *, dry_run: bool) -> Pruned:
    """Few segments, and no chunks but those of the last reading."""
    outdated = leftovers.outdated(job)
    many = len(job.ledger.names()) > needed(job)
    if not many and not outdated:
        return _clean(job, left, "is small already", dry_run=dry_run)
    unwanted = [*outdated, *left]
    below = [*([FOLDER] if many else []), *unwanted]
    files, size = map(sum, zip(*map(job.folder.usage, below), strict=True))
    if not dry_run:
        if many:
            try:
                compact(job)
            except Overtaken as error:
                return Pruned(job=job.id, action="kept", reason=error.message)
        for name in unwanted:
            job.folder.remove(name)
        kept_files, kept_size = job.folder.usage(FOLDER) if many else (0, 0)
        files, size = files - kept_files, size - kept_size
    return Pruned(job=job.id, action="compacted", reason="was collected", files=files, bytes=size)


def _clean(job: JobFolder, left: list[str], why_kept: str, *, dry_run: bool) -> Pruned:
    """A job that is kept as it is, but for what killed commands have left in it."""
    if not left:
        return Pruned(job=job.id, action="kept", reason=why_kept)
    files, size = map(sum, zip(*map(job.folder.usage, left), strict=True))
    for name in left if not dry_run else ():
        job.folder.remove(name)
    return Pruned(job=job.id, action="cleaned", reason=_LEFT, files=files, bytes=size)


def _clear(store: str, *, dry_run: bool) -> list[Pruned]:
    """Remove folders that a killed `submit` has left and that are no jobs."""
    done = []
    for name in folder(store).folders(""):
        inner = folder(folder(store).join(name))
        if name == MATRICES or inner.exists(MANIFEST) or not leftovers.is_abandoned(inner):
            continue
        files, size = inner.usage("")
        if not dry_run:
            inner.remove("")
        why = "a killed submit had left it"
        done.append(Pruned(job=name, action="removed", reason=why, files=files, bytes=size))
    return done


def _why_not_removed(job: JobFolder, status: JobStatus) -> str:
    if status.state not in ("completed", "cancelled", "expired"):
        return f"is {'paused' if status.paused else status.state}"
    if leftovers.is_being_read(job):
        return "is being submitted with its input read anew"
    collected = any(job.folder.exists(mark) for mark in MARKS)
    return "" if collected else f"is {status.state} and was never collected"


def _why_not_compacted(job: JobFolder, status: JobStatus) -> str:
    if status.state != "completed":
        return f"is {'paused' if status.paused else status.state}"
    return "has not been collected, or not since its input has grown"


def _last_change(job: JobFolder, control: Control) -> float:
    """When something last happened to a job, Unix seconds."""
    made = datetime.fromisoformat(job.manifest.created).timestamp()
    return max([made, control.since, *(published(name) / 1e6 for name in job.ledger.names())])


def _remove(path: str) -> None:
    """Remove a job's folder. Cut short, it is no job any more, and the next prune ends it."""
    job = folder(path)
    job.write(DOOMED, b"")
    job.remove(MANIFEST)
    job.remove("")


def _finish_removals(store: str) -> None:
    for name in folder(store).folders(""):
        inner = folder(folder(store).join(name))
        if name != MATRICES and inner.exists(DOOMED) and not inner.exists(MANIFEST):
            inner.remove("")
