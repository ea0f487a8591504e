"""From parsed options to the configs that they mean, and back to arguments."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import click

from trbatch import adapters, api, gpus, profiles, structured
from trbatch.config import EngineConfig, JobSpec, SamplingParams, WorkerConfig, default_model
from trbatch.errors import UsageError
from trbatch.job_files import ADAPTER, is_job_file
from trbatch.moments import moment_of

logger = logging.getLogger(__name__)


def picked(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that are fields of a config class."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in settings.items() if name in names}


def with_adapter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with --adapter as part of the model's name."""
    left = {name: value for name, value in settings.items() if name != "adapter"}
    if adapter := settings.get("adapter"):
        left["model"] = adapters.joined(settings["model"] or default_model(), adapter)
    return left


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `SamplingParams` that options set; --seed is the job's."""
    found = {k: v for k, v in picked(SamplingParams, settings).items() if k != "seed"}
    form = structured.from_options(
        settings.get("json_schema"), settings.get("regex"), settings.get("choices", ())
    )
    return found | ({"structured": form} if form else {})


def job_spec(input: str, settings: Mapping[str, Any]) -> JobSpec:
    """The job of the parsed options of `model_options`, `sampling_options` and `job_options`.

    Of a job spec (`.toml`) only those options count that were given: they win over the spec.
    """
    if is_job_file(input):
        given = _given(settings)
        adapter = {name: given[name] for name in (ADAPTER,) if name in given}
        return api.job_spec(input, _sampling(given) | picked(JobSpec, given) | adapter)
    fields = picked(JobSpec, with_adapter(settings))
    sampling = _sampling(settings)
    params = SamplingParams(**sampling)
    if params.n > 1 and params.greedy:
        many = f"--n {params.n} without --temperature gives each row {params.n} equal samples"
        logger.warning("%s, unless it has a temperature of its own", many)
    return JobSpec.from_dict(fields | {"input": input, "sampling": params})


def engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    """The engine of the parsed `engine_options`.

    Raises:
        UsageError: --gpu and --device are both given, or a value is wrong.
    """
    fields = picked(EngineConfig, settings)
    if gpu := settings.get("gpu"):
        gpus.chosen(gpu)
        if fields["device"] != EngineConfig().device:
            raise UsageError(f"--gpu {gpu} and --device {fields['device']} contradict each other")
    return EngineConfig.from_dict(fields)


def worker_config(settings: Mapping[str, Any]) -> WorkerConfig:
    """The worker of the parsed options of a worker, an engine, the queue and a model.

    Raises:
        UsageError: a value is wrong.
    """
    _until(settings)
    return WorkerConfig.from_dict(
        picked(WorkerConfig, with_adapter(settings)) | {"engine": engine_config(settings)}
    )


def for_children(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's settings as the processes that decode get them.

    Not the GPU, which each is told apart, and not the queue's URL: arguments are for all to see. An
    hour becomes a time, which stays the same for a process that is started after it. What a profile
    says is among the settings: nobody reads it again.
    """
    left = {name: value for name, value in settings.items() if name not in ("gpu", "redis_url")}
    return left | {"until": _until(settings), "profile": profiles.NONE}


def _until(settings: Mapping[str, Any]) -> str:
    """The point in time at which a worker stops, the same whenever it is read again; "": never."""
    if not (until := settings.get("until")):
        return ""
    try:
        return moment_of(until).isoformat()
    except UsageError as error:
        raise UsageError(f"--until: {error.message}", hint=error.hint) from error


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the current command's settings that are no defaults."""
    context = click.get_current_context()
    found = {}
    for name, value in settings.items():
        source = context.get_parameter_source(name)
        if source is not None and source < click.core.ParameterSource.DEFAULT_MAP:
            found[name] = value
    return found


def arguments_for(command: click.Command, settings: Mapping[str, Any]) -> list[str]:
    """The arguments that make `command` parse to these settings; those of its defaults left out."""
    arguments: list[str] = []
    for option in command.params:
        if option.name not in settings or not isinstance(option, click.Option):
            continue
        value = settings[option.name]
        if value == option.default or (option.multiple and tuple(value) == (option.default or ())):
            continue
        if option.is_flag:
            arguments.append(option.opts[0] if value else option.secondary_opts[0])
        else:
            values: Sequence[Any] = value if option.multiple else [value]
            arguments += [f"{option.opts[-1]}={one}" for one in values]
    return arguments
