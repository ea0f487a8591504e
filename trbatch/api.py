"""The verbs of trbatch in Python: what the command line and the scripts in `jobs/` call.

Submitting, watching and collecting need no torch. `generate` and `work` do, and import it then.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trbatch import control_verbs, pruning
from trbatch.config import (
    SAMPLING_FIELDS,
    EngineConfig,
    JobSpec,
    SamplingParams,
    WorkerConfig,
    refuse_unknown,
)
from trbatch.errors import TimedOut
from trbatch.job import JobFolder
from trbatch.job_status import JobStatus, job_failure, job_status
from trbatch.moments import seconds_of
from trbatch.pruning import Pruned
from trbatch.results import Receipt
from trbatch.results import collect as collect_results

if TYPE_CHECKING:
    from trbatch.engine.sequence import Completion
    from trbatch.flight import FlightRecord

__all__ = [
    "Job",
    "JobStatus",
    "Pruned",
    "cancel",
    "collect",
    "generate",
    "job_failure",
    "pause",
    "prune",
    "resume",
    "retry",
    "status",
    "submit",
    "wait",
    "work",
]

POLL_S = 0.5  # between looks at a job that is waited for

_JOB_FIELDS = tuple(field.name for field in dataclasses.fields(JobSpec))

Prompt = str | Sequence[Mapping[str, Any]]
Report = Callable[[JobStatus], None]


class Job:
    """A submitted job: its folder, and the queue that its chunks go through.

    Args:
        folder: the job's folder.
        redis_url: the queue; "" takes `TRBATCH_REDIS_URL`, `REDIS_URL`, the embedded server.
    """

    def __init__(self, folder: JobFolder, redis_url: str = "") -> None:
        self.folder = folder
        self.redis_url = redis_url

    def __repr__(self) -> str:
        return f"Job({self.path!r})"

    @classmethod
    def open(cls, job: str | Path, *, store: str | Path = "", redis_url: str = "") -> Self:
        """A job by its id in `store`, or by the path or URL of its folder.

        Raises:
            UsageError: there is no such job.
        """
        return cls(JobFolder.find(str(job), str(store)), redis_url)

    @property
    def id(self) -> str:
        """The job's id, unique in its store."""
        return self.folder.id

    @property
    def path(self) -> str:
        """The path or URL of the job's folder."""
        return str(self.folder.path)

    def status(self) -> JobStatus:
        """How far the job is.

        Raises:
            Unreachable: the queue cannot be asked, and rows are missing.
        """
        return job_status(self.folder, self.redis_url)

    def wait(self, timeout: float | None = None, *, report: Report | None = None) -> JobStatus:
        """Wait until every row is there. A paused job is waited for until it has gone on.

        Args:
            timeout: seconds after which to give up; None waits for ever.
            report: is given the status about twice a second.

        Raises:
            JobFailed: rows are missing and nobody works on them any more.
            Cancelled: somebody cancelled the job.
            Expired: the job's deadline passed.
            TimedOut: the time limit passed first.
        """
        end = None if timeout is None else time.monotonic() + timeout
        failed = False
        while True:
            before, status = failed, self.status()
            failed = status.state == "failed"
            if report is not None:
                report(status)
            if status.state == "completed":
                return status
            if status.state == "expired" and status.chunks.queued:
                control_verbs.clear(self.folder, self.redis_url)
            # A chunk may be in no list for a moment: a worker let go of it as the job was resumed.
            over = end is not None and time.monotonic() >= end
            if status.finished and (before or over or not failed):
                raise job_failure(status)
            if over:
                done = f"{status.progress.rows_done} of {status.progress.rows} rows"
                raise TimedOut(
                    f"job {self.id}: {done} after {timeout:g} s",
                    hint="the job goes on; `trbatch wait` and `trbatch collect` take it up again",
                )
            time.sleep(POLL_S)

    def resume(self, *, deadline: str = "") -> int:
        """Go on with a job that was paused, cancelled or lost from the queue.

        Enqueues the chunks that still lack rows and neither wait nor run. Returns how many.

        Args:
            deadline: a new one, in the words of `submit`; "none" lifts it, "" leaves it.

        Raises:
            UsageError: the deadline has passed and no other is given.
        """
        return control_verbs.resume(self.folder, self.redis_url, deadline)

    def pause(self) -> JobStatus:
        """Take the job's waiting chunks out of the queue and let workers give up the others.

        Finished rows are kept; a row that is half done is begun anew by `resume`.
        """
        control_verbs.hold(self.folder, self.redis_url, "paused")
        return self.status()

    def cancel(self) -> JobStatus:
        """End the job. Finished rows are kept, and `collect` writes the others as cancelled.

        A job whose rows are all there stays completed; `resume` takes back a cancellation.
        """
        control_verbs.hold(self.folder, self.redis_url, "cancelled")
        return self.status()

    def retry(self, codes: Iterable[str] = ()) -> int:
        """Decode failed rows again. Rows that are bad in the input stay error rows.

        Args:
            codes: only failures of these error codes; () of all.

        Returns:
            How many rows are to be decoded again.

        Raises:
            UsageError: the job is held, or chunks of it are running now.
        """
        return control_verbs.retry(self.folder, self.redis_url, codes)

    def collect(self, output: str | Path = "", *, format: str = "parquet") -> Receipt:
        """Write the dataset: every row exactly once, in input order.

        Args:
            output: file to write; "" takes the job's own, else a file in the job folder.
            format: `parquet` or `jsonl`.
        """
        return collect_results(self.folder, str(output) or None, format=format)


def submit(input: str | Path | JobSpec, *, redis_url: str = "", **settings: Any) -> Job:
    """Check the input, make or continue its job folder, and enqueue what is missing.

    Args:
        input: the prompts' file, or a complete `JobSpec`.
        redis_url: the queue; "" takes `TRBATCH_REDIS_URL`, `REDIS_URL`, the embedded server.
        settings: fields of `JobSpec`; fields of `SamplingParams` may stand beside them.

    Raises:
        UsageError: a setting is unknown or wrong.
        InputError: the file is unusable or an id is repeated; nothing was enqueued.
        ResumeRefused: a job of this name exists and was made with other settings.
        Unreachable: the queue cannot be reached; the job folder is kept.

    A job that is paused or cancelled stays so, and nothing of it is enqueued.
    """
    spec = job_spec(input, settings)
    job = Job(JobFolder.submit(_absolute_output(spec)), redis_url)
    control_verbs.enqueue(job.folder, redis_url)
    return job


def job_spec(input: str | Path | JobSpec, settings: Mapping[str, Any]) -> JobSpec:
    """The spec of settings in which those of the sampling may stand beside those of the job.

    `seed` is the job's; a row's own seed goes into the row or into `sampling`.
    """
    given = _own_values(input) if isinstance(input, JobSpec) else {"input": str(input)}
    refuse_unknown(settings, [*_JOB_FIELDS, *SAMPLING_FIELDS])
    values = given | {name: value for name, value in settings.items() if name in _JOB_FIELDS}
    beside = {name: value for name, value in settings.items() if name not in _JOB_FIELDS}
    sampling = values.get("sampling") or SamplingParams()
    if isinstance(sampling, Mapping):
        sampling = SamplingParams.from_dict(sampling)
    return JobSpec.from_dict(values | {"sampling": sampling.merged(beside)})


def status(job: str | Path | Job, *, store: str | Path = "", redis_url: str = "") -> JobStatus:
    """How far a job is. `job` is an id in `store`, a job folder, or what `submit` returned."""
    return _opened(job, store, redis_url).status()


def wait(
    job: str | Path | Job,
    timeout: float | None = None,
    *,
    store: str | Path = "",
    redis_url: str = "",
    report: Report | None = None,
) -> JobStatus:
    """Wait until every row of a job is there. See `Job.wait`."""
    return _opened(job, store, redis_url).wait(timeout, report=report)


def collect(
    job: str | Path | Job,
    output: str | Path = "",
    *,
    format: str = "parquet",
    store: str | Path = "",
    redis_url: str = "",
) -> Receipt:
    """Write a job's dataset. See `Job.collect`."""
    return _opened(job, store, redis_url).collect(output, format=format)


def resume(
    job: str | Path | Job, *, deadline: str = "", store: str | Path = "", redis_url: str = ""
) -> int:
    """Go on with a job. Returns how many chunks were enqueued; see `Job.resume`."""
    return _opened(job, store, redis_url).resume(deadline=deadline)


def pause(job: str | Path | Job, *, store: str | Path = "", redis_url: str = "") -> JobStatus:
    """Stop decoding a job until it is resumed. See `Job.pause`."""
    return _opened(job, store, redis_url).pause()


def cancel(job: str | Path | Job, *, store: str | Path = "", redis_url: str = "") -> JobStatus:
    """End a job and keep what is done. See `Job.cancel`."""
    return _opened(job, store, redis_url).cancel()


def retry(
    job: str | Path | Job,
    codes: Iterable[str] = (),
    *,
    store: str | Path = "",
    redis_url: str = "",
) -> int:
    """Decode a job's failed rows again. Returns how many; see `Job.retry`."""
    return _opened(job, store, redis_url).retry(codes)


def prune(
    jobs: Iterable[str | Path] = (),
    *,
    older_than: str = "",
    force: bool = False,
    dry_run: bool = False,
    store: str | Path = "",
    redis_url: str = "",
) -> list[Pruned]:
    """Make collected jobs small and remove old ones. See `pruning.prune`."""
    return pruning.prune(
        list(map(str, jobs)),
        store=str(store),
        redis_url=redis_url,
        older_than_s=seconds_of(older_than) if older_than else None,
        force=force,
        dry_run=dry_run,
    )


def work(config: WorkerConfig, flight: FlightRecord | None = None) -> int:
    """Be a worker in this process until stopped. Returns an exit code; see `worker.run_worker`.

    Args:
        flight: its supervisor's record of it, if it has one; without, a crash ends it for good.
    """
    from trbatch.worker import run_worker

    return run_worker(config, flight=flight)


def generate(
    prompts: Iterable[Prompt],
    sampling: SamplingParams | None = None,
    *,
    model: str = "",
    revision: str = "",
    seed: int | None = None,
    trust_remote_code: bool = False,
    engine: EngineConfig | None = None,
) -> list[Completion]:
    """Decode prompts in this process, without a queue or a job folder.

    The same prompts in a file without ids, submitted with the same `seed`, give the same tokens.

    Args:
        prompts: texts, or lists of messages `{"role": …, "content": …}`.
        sampling: for all of them; None is greedy.
        model: hub name, folder or GGUF file; "" takes `config.default_model()`.
        seed: of the whole call; None draws one.
        engine: device, sizes and how to speculate.

    Returns:
        One completion a sample, in the order of the prompts; `key` is (prompt, sample), from 0.

    Raises:
        InputError: a prompt is neither a text nor a list of messages.
        ModelError: the model cannot be loaded or run.
    """
    from trbatch.direct import generate_with
    from trbatch.engine.engine import Engine
    from trbatch.models import load_model

    settings = engine or EngineConfig()
    loaded = load_model(
        model,
        revision=revision,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=trust_remote_code,
    )
    return generate_with(
        Engine(loaded, settings), list(prompts), sampling or SamplingParams(), seed=seed
    )


def _opened(job: str | Path | Job, store: str | Path, redis_url: str) -> Job:
    return job if isinstance(job, Job) else Job.open(job, store=store, redis_url=redis_url)


def _absolute_output(spec: JobSpec) -> JobSpec:
    """The spec with an output that means the same file wherever it is collected."""
    if not spec.output or "://" in spec.output:
        return spec
    return dataclasses.replace(spec, output=str(Path(spec.output).expanduser().absolute()))


def _own_values(spec: JobSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in _JOB_FIELDS}
