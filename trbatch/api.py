"""The verbs of trbatch in Python: what the command line and the scripts in `jobs/` call.

Submitting, watching and collecting need no torch. `generate` and `work` do, and import it then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trbatch import adapters, control_verbs, pruning
from trbatch.checks import refuse_unknown
from trbatch.config import (
    SAMPLING_FIELDS,
    EngineConfig,
    JobSpec,
    SamplingParams,
    WorkerConfig,
    default_model,
)
from trbatch.extras import require_worker
from trbatch.job import JobFolder
from trbatch.job_files import ADAPTER, is_job_file, read_job_file
from trbatch.job_handle import Job, Report
from trbatch.job_status import JobStatus, job_failure
from trbatch.moments import seconds_of
from trbatch.pruning import Pruned
from trbatch.reporting import CATEGORY
from trbatch.reporting import Report as JobReport
from trbatch.results import Receipt

if TYPE_CHECKING:
    from trbatch.engine.sequence import Completion
    from trbatch.flight import FlightRecord

__all__ = [
    "CATEGORY",
    "Job",
    "JobReport",
    "JobStatus",
    "Pruned",
    "cancel",
    "collect",
    "generate",
    "job_failure",
    "pause",
    "prune",
    "report",
    "resume",
    "retry",
    "status",
    "submit",
    "wait",
    "work",
]

_JOB_FIELDS = tuple(field.name for field in dataclasses.fields(JobSpec))

Prompt = str | Sequence[Mapping[str, Any]]


def submit(input: str | Path | JobSpec, *, redis_url: str = "", **settings: Any) -> Job:
    """Check the input, make or continue its job folder, and enqueue what is missing.

    Args:
        input: the prompts' file, a job spec (`.toml`, over which settings win), or a complete
            `JobSpec`.
        redis_url: the queue; "" takes `TRBATCH_REDIS_URL`, `REDIS_URL`, the embedded server.
        settings: fields of `JobSpec`; fields of `SamplingParams` may stand beside them, and
            `adapter`, a LoRA that is merged into the model: the model is then `MODEL + ADAPTER`.

    Raises:
        UsageError: a setting is unknown or wrong.
        InputError: the file is unusable or an id is repeated; nothing was enqueued.
        ResumeRefused: a job of this name exists and was made with other settings.
        Unreachable: the queue cannot be reached; the job folder is kept.

    A job that is paused or cancelled stays so, and nothing of it is enqueued.
    """
    spec = job_spec(input, settings)
    job = Job(JobFolder.submit(spec), redis_url)
    control_verbs.enqueue(job.folder, redis_url)
    return job


def job_spec(input: str | Path | JobSpec, settings: Mapping[str, Any]) -> JobSpec:
    """The spec of settings in which those of the sampling may stand beside those of the job.

    `seed` is the job's; a row's own seed goes into the row or into `sampling`.
    """
    if isinstance(input, JobSpec):
        given = _own_values(input)
    elif is_job_file(str(input)):
        given = read_job_file(input)
    else:
        given = {"input": str(input)}
    of_job = (*_JOB_FIELDS, ADAPTER)
    refuse_unknown(settings, [*of_job, *SAMPLING_FIELDS])
    values = given | {name: value for name, value in settings.items() if name in of_job}
    beside = {name: value for name, value in settings.items() if name not in of_job}
    if adapter := values.pop(ADAPTER, ""):
        values["model"] = adapters.joined(values.get("model") or default_model(), adapter)
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
    card: bool = False,
    push: str = "",
    store: str | Path = "",
    redis_url: str = "",
) -> Receipt:
    """Write a job's dataset. See `Job.collect`."""
    opened = _opened(job, store, redis_url)
    return opened.collect(output, format=format, card=card, push=push)


def report(
    job: str | Path | Job,
    output: str | Path = "",
    *,
    gpu_hour_price: float | None = None,
    category: str = CATEGORY,
    store: str | Path = "",
    redis_url: str = "",
) -> JobReport:
    """Write a page about a job. See `Job.report`."""
    opened = _opened(job, store, redis_url)
    return opened.report(output, gpu_hour_price=gpu_hour_price, category=category)


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

    Raises:
        MissingExtra: torch is not installed. Nothing is taken from the queue.
    """
    require_worker("a worker")
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
    **settings: Any,
) -> list[Completion]:
    """Decode prompts in this process, without a queue or a job folder.

    The same prompts in a file without ids, submitted with the same `seed`, give the same tokens.
    A bad prompt (an empty one, say) costs no other: it comes back with `finish_reason` "error".

    Args:
        prompts: texts, or lists of messages `{"role": …, "content": …}`.
        sampling: for all of them; None is greedy.
        model: hub name, folder or GGUF file; "" takes `config.default_model()`.
        seed: of the whole call; None draws one.
        engine: device, sizes and how to speculate.
        settings: fields of `SamplingParams`, over those of `sampling`.

    Returns:
        One completion a sample, in the order of the prompts; `key` is (prompt, sample), from 0.

    Raises:
        InputError: a prompt is neither a text nor a list of messages, or there is only one of them
            and no list around it.
        UsageError: a setting is unknown or wrong.
        MissingExtra: torch is not installed.
        ModelError: the model cannot be loaded or run.
    """
    from trbatch.direct import checked, generate_with

    given = checked(prompts)  # before torch and a model are loaded
    params = (sampling or SamplingParams()).merged(settings)
    require_worker("trbatch.generate")
    from trbatch.engine.engine import Engine
    from trbatch.models import load_model

    config = engine or EngineConfig()
    loaded = load_model(
        model,
        revision=revision,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=trust_remote_code,
    )
    return generate_with(Engine(loaded, config), given, params, seed=seed)


def _opened(job: str | Path | Job, store: str | Path, redis_url: str) -> Job:
    return job if isinstance(job, Job) else Job.open(job, store=store, redis_url=redis_url)


def _own_values(spec: JobSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in _JOB_FIELDS}
