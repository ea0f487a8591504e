"""The verbs of trbatch in Python: what the command line and the scripts in `jobs/` call.

Submitting, watching and collecting need no torch. `generate` and `work` do, and import it then.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trbatch.config import (
    SAMPLING_FIELDS,
    EngineConfig,
    JobSpec,
    SamplingParams,
    WorkerConfig,
    refuse_unknown,
)
from trbatch.errors import JobFailed, TimedOut
from trbatch.figures import Progress
from trbatch.job import JobFolder
from trbatch.queue import Counts, JobQueue, ModelKey
from trbatch.results import Receipt
from trbatch.results import collect as collect_results

if TYPE_CHECKING:
    from trbatch.engine.sequence import Completion

POLL_S = 0.5  # between looks at a job that is waited for

_JOB_FIELDS = tuple(field.name for field in dataclasses.fields(JobSpec))

Prompt = str | Sequence[Mapping[str, Any]]
Report = Callable[["JobStatus"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """How far a job is and who works on it."""

    id: str
    path: str
    state: str  # queued, in_progress, completed, failed
    model: str
    task: str
    progress: Progress
    chunks: Counts  # of the queue; all 0 once every row is there
    workers: int  # alive and holding this model; 0 once every row is there
    failures: Mapping[int, str]  # chunk -> the last line of what went wrong

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen by itself."""
        return self.state in ("completed", "failed")

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-serialisable values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "progress": self.progress.to_dict(),
            "chunks": dataclasses.asdict(self.chunks),
            "failures": {str(chunk): reason for chunk, reason in self.failures.items()},
        }


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
        progress = self.folder.progress()
        if progress.complete:
            return self._status("completed", progress, Counts(), 0, {})
        with JobQueue.connect(self.redis_url) as jobs:
            counts = jobs.counts(self.id)
            failures = jobs.failures(self.id) if counts.failed else {}
            model = str(ModelKey(self.folder.manifest.model, self.folder.manifest.revision))
            workers = sum(worker.model == model for worker in jobs.workers())
        # Once more: the last rows may have come between the first look and the queue's answer.
        progress = self.folder.progress()
        return self._status(_state(progress, counts), progress, counts, workers, failures)

    def _status(
        self,
        state: str,
        progress: Progress,
        chunks: Counts,
        workers: int,
        failures: Mapping[int, str],
    ) -> JobStatus:
        return JobStatus(
            id=self.id,
            path=self.path,
            state=state,
            model=self.folder.manifest.model,
            task=self.folder.manifest.task,
            progress=progress,
            chunks=chunks,
            workers=workers,
            failures=failures,
        )

    def wait(self, timeout: float | None = None, *, report: Report | None = None) -> JobStatus:
        """Wait until every row is there.

        Args:
            timeout: seconds after which to give up; None waits for ever.
            report: is given the status about twice a second.

        Raises:
            JobFailed: rows are missing and nobody works on them any more.
            TimedOut: the time limit passed first.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            status = self.status()
            if report is not None:
                report(status)
            if status.state == "completed":
                return status
            if status.state == "failed":
                raise job_failure(status)
            if end is not None and time.monotonic() >= end:
                done = f"{status.progress.rows_done} of {status.progress.rows} rows"
                raise TimedOut(
                    f"job {self.id}: {done} after {timeout:g} s",
                    hint="the job goes on; `trbatch wait` and `trbatch collect` take it up again",
                )
            time.sleep(POLL_S)

    def resume(self) -> int:
        """Enqueue the chunks that still lack rows and neither wait nor run. Returns how many."""
        with JobQueue.connect(self.redis_url) as jobs:
            return jobs.enqueue(self.folder, self.folder.missing_chunks())

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
    """
    spec = job_spec(input, settings)
    job = Job(JobFolder.submit(_absolute_output(spec)), redis_url)
    job.resume()
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


def resume(job: str | Path | Job, *, store: str | Path = "", redis_url: str = "") -> int:
    """Enqueue what a job still lacks. Returns how many chunks were added."""
    return _opened(job, store, redis_url).resume()


def work(config: WorkerConfig) -> int:
    """Be a worker in this process until stopped. Returns an exit code; see `worker.run_worker`."""
    from trbatch.worker import run_worker

    return run_worker(config)


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


def job_failure(status: JobStatus) -> JobFailed:
    """The error of a job whose missing rows nobody works on."""
    progress = status.progress
    missing = progress.rows - progress.rows_done
    reasons = sorted(set(status.failures.values()))
    words = f": {'; '.join(reasons[:3])}" if reasons else "; no chunk of it is in the queue"
    return JobFailed(
        f"job {status.id} lacks {missing} of {progress.rows} rows{words}",
        hint=f"trbatch resume {status.path}",
    )


def _state(progress: Progress, chunks: Counts) -> str:
    if progress.complete:
        return "completed"
    if not chunks.open:
        return "failed"
    return "in_progress" if chunks.started or progress.rows_ok else "queued"


def _opened(job: str | Path | Job, store: str | Path, redis_url: str) -> Job:
    return job if isinstance(job, Job) else Job.open(job, store=store, redis_url=redis_url)


def _absolute_output(spec: JobSpec) -> JobSpec:
    """The spec with an output that means the same file wherever it is collected."""
    if not spec.output or "://" in spec.output:
        return spec
    return dataclasses.replace(spec, output=str(Path(spec.output).expanduser().absolute()))


def _own_values(spec: JobSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in _JOB_FIELDS}
