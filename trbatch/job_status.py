"""How far a job is, who works on it, what failed and why."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trbatch.control import DEADLINE, Control
from trbatch.errors import Cancelled, Expired, JobFailed, TrbatchError
from trbatch.figures import Progress
from trbatch.job import JobFolder
from trbatch.moments import written
from trbatch.queue import Counts, JobQueue, WorkerInfo
from trbatch.queue_control import ChunkLease, ahead, leases
from trbatch.queue_names import ModelKey
from trbatch.team import Share, team_of

ENDED = ("completed", "failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """How far a job is and who works on it."""

    id: str
    path: str = field(repr=False)  # or URL of its folder, which may hold a password
    state: str  # queued, in_progress, finalizing, completed, failed, cancelling, cancelled, expired
    model: str
    task: str
    progress: Progress
    chunks: Counts  # of the queue; all 0 once every row is there
    workers: int  # alive and holding this model; 0 once every row is there
    failures: Mapping[int, str]  # chunk -> the last line of what went wrong
    paused: bool = False
    priority: str = "normal"
    ahead: int = 0  # chunks of the same model that wait with a higher priority
    deadline: float | None = None  # Unix seconds
    errors: Mapping[str, int] = field(default_factory=dict)  # failed rows by error code
    leases: Sequence[ChunkLease] = ()  # chunks in workers' hands
    team: Sequence[Share] = ()  # who decodes it and who has

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen by itself."""
        return self.state in ENDED

    @property
    def overdue(self) -> bool:
        """Whether rows take longer than those before let expect, so that no time left is told."""
        progress = self.progress
        known = progress.busy_s > 0 and progress.seconds_left is None
        return known and bool(self.leases) and not self.finished

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-serialisable values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "progress": self.progress.to_dict(),
            "chunks": dataclasses.asdict(self.chunks),
            "failures": {str(chunk): reason for chunk, reason in self.failures.items()},
            "errors": dict(self.errors),
            "leases": [dataclasses.asdict(lease) for lease in self.leases],
            "team": [dataclasses.asdict(share) for share in self.team],
        }


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the queue says of a job."""

    chunks: Counts = field(default_factory=Counts)
    workers: Sequence[WorkerInfo] | None = None  # None: it was not asked
    failures: Mapping[int, str] = field(default_factory=dict)
    leases: Sequence[ChunkLease] = ()
    ahead: int = 0


def job_status(job: JobFolder, redis_url: str) -> JobStatus:
    """How far a job is.

    Raises:
        Unreachable: the queue cannot be asked, and rows are missing.
    """
    control = job.control()
    progress = job.progress()
    seen = _Seen()
    if not progress.complete:
        seen = _look(job, redis_url, control)
        # Once more: the last rows may have come between the first look and the queue's answer.
        progress = job.progress(exact=not seen.chunks.open)
    state = _state(progress, seen, control)
    progress = from_now(progress, seen.leases)
    return JobStatus(
        id=job.id,
        path=str(job.path),
        state=state,
        model=job.manifest.model,
        task=job.manifest.task,
        progress=_with_the_end(progress, state),
        chunks=seen.chunks,
        workers=len(seen.workers or ()),
        failures=seen.failures,
        paused=control.hold == "paused" and state != "completed",
        priority=control.priority,
        ahead=seen.ahead,
        deadline=control.deadline,
        errors=_errors(job, progress, state),
        leases=seen.leases,
        team=team_of(job.ledger.footers(), seen.workers),
    )


def job_failure(status: JobStatus) -> TrbatchError:
    """The error of a job that has ended without all of its rows."""
    progress = status.progress
    if status.state in ("cancelled", "expired"):
        done = f"{progress.rows_ok} of {progress.rows} rows are done"
        hint = f"trbatch collect {status.path} keeps them; trbatch resume takes the job up again"
        if status.state == "cancelled":
            return Cancelled(f"job {status.id} was cancelled; {done}", hint=hint)
        when = written(status.deadline or 0.0)
        return Expired(f"job {status.id} was not done by {when}; {done}", hint=hint)
    missing = progress.rows - progress.rows_done
    reasons = sorted(set(status.failures.values()))
    words = f": {'; '.join(reasons[:3])}" if reasons else "; no chunk of it is in the queue"
    return JobFailed(
        f"job {status.id} lacks {missing} of {progress.rows} rows{words}",
        hint=f"trbatch resume {status.path}",
    )


def _look(job: JobFolder, redis_url: str, control: Control) -> _Seen:
    with JobQueue.connect(redis_url) as jobs:
        counts = jobs.counts(job)
        model = str(ModelKey(job.manifest.model, job.manifest.revision))
        return _Seen(
            chunks=counts,
            workers=[worker for worker in jobs.workers() if worker.model == model],
            failures=jobs.failures(job) if counts.failed else {},
            leases=leases(jobs, job) if counts.started else (),
            ahead=ahead(jobs, job, control.priority) if counts.queued else 0,
        )


def _state(progress: Progress, seen: _Seen, control: Control) -> str:
    if progress.complete:
        return "completed"
    # A dead worker's chunk counts as started until somebody brings it back: look at the leases.
    if control.hold == "cancelled":
        return "cancelling" if seen.leases else "cancelled"
    if control.expired:
        return "finalizing" if seen.leases else "expired"
    if control.hold != "paused" and not seen.chunks.open:
        return "failed"
    return "in_progress" if seen.chunks.started or progress.rows_ok else "queued"


def from_now(
    progress: Progress, leases: Sequence[ChunkLease], now: float | None = None
) -> Progress:
    """The progress with the time left from now on, and none told once it has passed.

    It passes only while a worker has chunks of the job, not through the night in which nobody had.

    Args:
        now: Unix seconds; the present if None.
    """
    working = [math.inf if one.running_s is None else one.running_s for one in leases]
    if progress.seconds_left is None or progress.last_row_at is None or not working:
        return progress
    now = time.time() if now is None else now
    waited = min(now - progress.last_row_at, max(working))
    left = progress.seconds_left - max(0.0, waited)
    return dataclasses.replace(progress, seconds_left=left if left > 0 else None)


def _with_the_end(progress: Progress, state: str) -> Progress:
    """The progress of a job whose missing rows have come to their end."""
    missing = progress.rows - progress.rows_done
    if state == "cancelled":
        return dataclasses.replace(progress, rows_cancelled=missing, seconds_left=None)
    if state == "expired":
        failed = progress.rows_failed + missing
        return dataclasses.replace(progress, rows_failed=failed, seconds_left=None)
    return progress


def _errors(job: JobFolder, progress: Progress, state: str) -> dict[str, int]:
    """Failed rows by error code, the most frequent first."""
    counts = Counter(job.manifest.errors)
    if state == "expired":
        counts[DEADLINE] += progress.rows - progress.rows_done
    if progress.rows_failed > job.manifest.rows_failed:
        for found in job.ledger.failures().values():
            counts.update(found)
    return dict(counts.most_common())
