"""The options that commands share: one decorator a group, defaults read from the config classes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import orjson

from trbatch import adapters, api, gpus, profiles, structured
from trbatch.cli_help import HelpCommand, in_section
from trbatch.config import (
    PRIORITIES,
    EngineConfig,
    JobSpec,
    SamplingParams,
    WorkerConfig,
    check_chat_template_kwargs,
    default_model,
)
from trbatch.errors import UsageError
from trbatch.job_files import is_job_file
from trbatch.logs import FORMATS
from trbatch.moments import moment_of

logger = logging.getLogger(__name__)

Decorator = Callable[[Any], Any]  # of a function that is to become a command


def _setting(config: type, name: str, help: str, *flags: str, **attributes: Any) -> Decorator:
    """The option of one field of a config class; its default and its type are the field's."""
    default = {field.name: field.default for field in dataclasses.fields(config)}[name]
    if isinstance(default, bool):
        attributes.setdefault("is_flag", True)
    elif isinstance(default, tuple):
        attributes.setdefault("multiple", True)
    elif default is not None:
        attributes.setdefault("type", type(default))
    return click.option(
        name,
        *(flags or (f"--{name.replace('_', '-')}",)),
        default=default,
        show_default=default not in ("", None, ()) and not isinstance(default, bool),
        help=help,
        **attributes,
    )


def grouped(*options: Decorator, section: str = "") -> Decorator:
    """Several options as one decorator; `section` heads them in the help."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return in_section(section, decorate)


def example(text: str) -> dict[str, Any]:
    """What every command is made with: its class, and the example that its help ends in."""
    return {"epilog": epilog(text), "cls": HelpCommand}


def epilog(text: str) -> str:
    """An example as the end of a help."""
    return f"\b\nExample:\n  {text}"


def picked(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that are fields of a config class."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in settings.items() if name in names}


def _bias(context: click.Context, option: click.Parameter, given: Sequence[str]) -> Any:
    """TOKEN_ID=NUMBER as often as given, as a mapping."""
    bias: dict[str, float] = {}
    for text in given:
        token, _, number = text.partition("=")
        try:
            bias[token.strip()] = float(number)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not TOKEN_ID=NUMBER, e.g. 50256=-100") from error
    return bias


_ADAPTER = click.option(
    "--adapter",
    default="",
    help="A LoRA adapter's folder or hub name, merged into the model when it is loaded.",
)

model_options = grouped(
    _setting(
        JobSpec,
        "model",
        "Hub name, model folder or GGUF file. Without it: TRBATCH_MODEL, trbatch.toml, or a small "
        "model for trying out.",
        metavar="MODEL",
    ),
    _ADAPTER,
    _setting(JobSpec, "revision", "Branch, tag or commit of a hub name.", metavar="REVISION"),
    _setting(JobSpec, "trust_remote_code", "Run Python code that comes with the model."),
    section="Model",
)

sampling_options = grouped(
    _setting(SamplingParams, "max_tokens", "Most tokens to generate for a row."),
    _setting(SamplingParams, "temperature", "0: always the likeliest token."),
    _setting(SamplingParams, "top_p", "Keep the likeliest tokens of this summed probability."),
    _setting(SamplingParams, "top_k", "Keep this many likeliest tokens; 0: all."),
    _setting(SamplingParams, "min_p", "Drop tokens less likely than this share of the likeliest."),
    _setting(SamplingParams, "stop", "End a row before this text; may be repeated."),
    _setting(
        SamplingParams,
        "stop_token_ids",
        "End a row at this token; may be repeated.",
        "--stop-token-id",
        type=int,
    ),
    _setting(SamplingParams, "ignore_eos", "Go on after the model's own end."),
    _setting(
        SamplingParams,
        "n",
        "Samples of each row, each a row of the dataset; they share one prefill.",
    ),
    _setting(
        SamplingParams,
        "repetition_penalty",
        "Above 1: tokens of prompt and output become less likely.",
    ),
    _setting(
        SamplingParams, "presence_penalty", "Above 0: tokens that came out become less likely."
    ),
    _setting(SamplingParams, "frequency_penalty", "The same, as often as they came out."),
    click.option(
        "logit_bias",
        "--logit-bias",
        multiple=True,
        metavar="TOKEN_ID=NUMBER",
        callback=_bias,
        help="Add to a token's logit, -100 to 100; may be repeated.",
    ),
    _setting(SamplingParams, "min_tokens", "No end of a row before so many tokens."),
    _setting(
        SamplingParams,
        "logprobs",
        "Keep log probabilities of the tokens and of so many alternatives; 0: of the tokens alone.",
        type=int,
    ),
    _setting(SamplingParams, "prompt_logprobs", "The same of the prompt's tokens.", type=int),
    _setting(SamplingParams, "return_token_ids", "Keep token ids of prompt and output."),
    _setting(
        SamplingParams,
        "reasoning_start",
        "What a thinking model's reasoning begins with; it goes into a column of its own.",
    ),
    _setting(SamplingParams, "reasoning_end", "What it ends with; '': leave it in the text."),
    click.option("--json-schema", default="", metavar="FILE", help="Every text is JSON of this."),
    click.option("--regex", default="", help="Every text matches this regular expression, whole."),
    click.option(
        "choices", "--choice", multiple=True, help="Every text is one of these; may be repeated."
    ),
    section="Sampling",
)


def _json_object(context: click.Context, option: click.Parameter, text: str | None) -> Any:
    """The object that an option holds as JSON."""
    if text is None:
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UsageError(
            f"{option.opts[-1]} is not valid JSON at character {error.colno}: {text}",
            hint="""give an object, e.g. '{"enable_thinking": false}'""",
        ) from error
    check_chat_template_kwargs(value)
    return value


prompt_options = grouped(
    _setting(
        JobSpec,
        "template",
        "Write each prompt from the row's columns: a Jinja file, or a text such as "
        "'Translate: {{ sentence }}'.",
        metavar="FILE|TEXT",
    ),
    _setting(
        JobSpec,
        "system_prompt",
        "Open each chat with this, unless it has a system message; prompts become chats.",
        metavar="TEXT",
    ),
    _setting(JobSpec, "chat", "Prompts are what a user says in a chat, not text to be continued."),
    _setting(
        JobSpec,
        "chat_template_kwargs",
        "Arguments of the model's chat template, e.g. '{\"enable_thinking\": false}'.",
        metavar="JSON",
        callback=_json_object,
    ),
    _setting(
        JobSpec,
        "ignore_body_fields",
        "Pass over this field of OpenAI lines' bodies; 'model': decode them whatever model they "
        "name. May be repeated.",
        "--ignore-body-field",
        metavar="NAME",
    ),
    section="Prompts",
)

store_option = _setting(
    JobSpec,
    "out",
    "Folder or URL of the job folders. Without it: TRBATCH_STORE, else the user's state folder.",
    "--store",
    metavar="FOLDER|URL",
)

job_options = grouped(
    store_option,
    _setting(
        JobSpec,
        "name",
        "The job's id. Without it: made from the file and the settings.",
        metavar="JOB",
    ),
    _setting(
        JobSpec,
        "task",
        "The kind of work: jobs of one task share a matrix, which is what drafts have learned. "
        "Without it: from the project's and the file's name.",
        metavar="TASK",
    ),
    _setting(JobSpec, "cold", "Start from an empty matrix, as if the task were new."),
    _setting(
        JobSpec,
        "private_matrix",
        "Keep what is learned from this job's rows to this job: nothing is shared or saved.",
    ),
    _setting(JobSpec, "chunk_size", "Rows a worker takes at once."),
    _setting(JobSpec, "seed", "Of the whole job. Without it: random, kept in the job.", type=int),
    _setting(JobSpec, "prompt_column", "Field or column of the prompt.", metavar="COLUMN"),
    _setting(
        JobSpec,
        "id_column",
        "Field or column of the row's id. Without it: custom_id, id, row number.",
        metavar="COLUMN",
    ),
    _setting(JobSpec, "max_row_bytes", "A longer row of the input is an error row."),
    _setting(
        JobSpec,
        "deadline",
        "Rows that are not done by then become error rows: 8h, 07:00, 2026-11-22T07:00; 'none' "
        "lifts it. Without it: none, or as it was.",
        metavar="WHEN",
    ),
    _setting(
        JobSpec,
        "priority",
        "Workers take the chunks of more urgent jobs first. Without it: normal, or as it was.",
        metavar=f"[{'|'.join(PRIORITIES)}]",
    ),
    _setting(
        JobSpec,
        "resume",
        "Whether to continue the job if the same command has made it before.",
        type=click.Choice(["never", "always", "if_possible"]),
    ),
    section="Job",
)

engine_options = grouped(
    _setting(
        EngineConfig,
        "device",
        "Where to compute: cpu, cuda:0, …; auto: on the first GPU, else on the CPU.",
        metavar="DEVICE",
    ),
    click.option(
        "--gpu",
        default="",
        metavar="GPUS",
        help="GPUs to use, a process each: 0, or 0,1, or all.",
    ),
    _setting(
        EngineConfig,
        "dtype",
        "Numbers to compute with.",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    ),
    _setting(EngineConfig, "max_num_seqs", "Rows decoded together; 0: by the machine."),
    _setting(EngineConfig, "max_model_len", "Most tokens of prompt and output; 0: the model's."),
    _setting(EngineConfig, "gpu_memory_utilization", "Share of the GPU's memory to use."),
    _setting(EngineConfig, "prefill_chunk", "Prompt tokens run at once; 0: by the machine."),
    _setting(
        EngineConfig,
        "speculate",
        "Draft with Token Recycling (default), or decode plainly.",
        "--speculate/--no-speculate",
    ),
    _setting(EngineConfig, "tree_size", "Tokens a step for each row; 0: what pays best."),
    _setting(
        EngineConfig,
        "prefix_sharing",
        "Run what prompts have in common at their begin once (default), or for each.",
        "--prefix-sharing/--no-prefix-sharing",
    ),
    _setting(EngineConfig, "enforce_eager", "Without CUDA graphs: slower, for debugging."),
    section="Engine",
)

bench_model_options: Decorator = grouped(
    _setting(
        JobSpec,
        "model",
        "Hub name, model folder or GGUF file. Without it: as in `trbatch run`.",
        metavar="MODEL",
    ),
    _ADAPTER,
    _setting(
        EngineConfig,
        "device",
        "Where to compute: cpu, cuda:0, …; auto: on the first GPU, else on the CPU.",
        metavar="DEVICE",
    ),
    _setting(
        EngineConfig,
        "dtype",
        "Numbers to compute with.",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    ),
)

worker_options = grouped(
    _setting(WorkerConfig, "burst", "Stop when the queue is empty."),
    _setting(
        WorkerConfig,
        "name",
        "Of this worker. Without it: host, device and process.",
        metavar="NAME",
    ),
    _setting(
        WorkerConfig,
        "roots",
        "Job folders must lie below this folder or URL; may be repeated.",
        "--root",
        metavar="FOLDER|URL",
    ),
    _setting(
        WorkerConfig,
        "publish_s",
        "Seconds between two writes of finished rows: what a crash may cost.",
        "--publish-seconds",
    ),
    _setting(WorkerConfig, "chunks_in_flight", "Most chunks at once; 0: by the batch."),
    _setting(WorkerConfig, "grace_s", "Seconds to finish when asked to stop.", "--grace"),
    _setting(
        WorkerConfig,
        "until",
        "Stop then: 07:00 (local time), 2026-11-22T07:00, or 8h.",
        metavar="WHEN",
    ),
    _setting(WorkerConfig, "metrics_port", "Serve metrics to Prometheus at this port; 0: none."),
    _setting(
        WorkerConfig,
        "metrics_host",
        "Address to serve them at; 0.0.0.0: to every host.",
        metavar="ADDRESS",
    ),
    section="Worker",
)


def _apply_profile(context: click.Context, option: click.Parameter, given: str) -> str:
    """Make what the profile and trbatch.toml say the defaults of the command's other options.

    Raises:
        UsageError: either says what cannot be; file and line are named.
    """
    if context.resilient_parsing:
        return given
    options = {_key(one): one for one in context.command.params if isinstance(one, click.Option)}
    del options["profile"]
    defaults = {key: one.default for key, one in options.items()}
    found: dict[str, Any] = {}
    for key, (file, value) in profiles.settings(given, defaults).items():
        name = str(options[key].name)
        try:
            found[name] = options[key].type_cast_value(context, value)
            for config in (EngineConfig, WorkerConfig):
                config.from_dict(picked(config, {name: found[name]}))
        except UsageError as error:
            raise file.wrong(key, error.message, hint=error.hint) from error
        except click.BadParameter as error:
            raise file.wrong(key, f"{key}: {error.message}") from error
    context.default_map = {**(context.default_map or {}), **found}
    return given


def _key(option: click.Option) -> str:
    """What an option is called in a file: its flag's name with `_` for `-`."""
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


profile_option = click.option(
    "profile",
    "--profile",
    default="",
    is_eager=True,  # it has to be read before what it is a default of
    callback=_apply_profile,
    metavar="NAME|FILE",
    help=f"Settings for a kind of machine: {', '.join(profiles.shipped())}, or a .toml file. Flags "
    "win over it, and it over [worker] in trbatch.toml; 'none' ignores both.",
)

log_format_option = click.option(
    "log_format",
    "--log-format",
    type=click.Choice(FORMATS),
    default=FORMATS[0],
    show_default=True,
    help="Of what is written to stderr: for people, or a line of JSON for each event.",
)

redis_option = _setting(
    WorkerConfig,
    "redis_url",
    "The queue's server. Without it: TRBATCH_REDIS_URL, REDIS_URL, or the embedded server.",
    metavar="URL",
)

output_option = click.option(
    "output",
    "-o",
    "--output",
    default="",
    metavar="FILE|URL",
    help="The dataset's file or URL. Without it: inside the job folder.",
)

format_option = click.option(
    "format",
    "--format",
    type=click.Choice(["parquet", "jsonl"]),
    default="parquet",
    show_default=True,
    help="Parquet, or result and error lines as OpenAI's batch API writes them.",
)

card_option = click.option(
    "card", "--card", is_flag=True, help="Write a README.md that describes the dataset beside it."
)

push_option = click.option(
    "push",
    "--push",
    default="",
    metavar="URL",
    help="Copy the dataset, with a card, to hf://datasets/NAME/DATASET or any URL of a folder.",
)

on_complete_option = click.option(
    "on_complete",
    "--on-complete",
    default="",
    metavar="COMMAND",
    help="Run by the shell once the job has ended, however; TRBATCH_JOB, TRBATCH_STATUS, "
    "TRBATCH_EXIT_CODE, TRBATCH_ROWS_OK, … tell it how. Its exit code counts if ours is 0.",
)

dry_run_option = click.option(
    "dry_run",
    "--dry-run",
    is_flag=True,
    help="Only show what would be asked: prompts as the model gets them, their tokens, bad rows, "
    "and the time by earlier jobs. Tokens need the extra `tokenizers`, or a worker's.",
)

json_option = click.option("as_json", "--json", is_flag=True, help="Print JSON on stdout.")


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
        settings.get("json_schema", ""), settings.get("regex", ""), settings.get("choices", ())
    )
    return found | ({"structured": form} if form else {})


def job_spec(input: str, settings: Mapping[str, Any]) -> JobSpec:
    """The job of the parsed options of `model_options`, `sampling_options` and `job_options`.

    Of a job spec (`.toml`) only those options count that were given: they win over the spec.
    """
    if is_job_file(input):
        given = _given(settings)
        if given.get("adapter") and not given.get("model"):
            raise UsageError(
                f"--adapter cannot be added to the model of {input}",
                hint="give --model as well, or write 'BASE + ADAPTER' as the model there",
            )
        return api.job_spec(input, _sampling(given) | picked(JobSpec, with_adapter(given)))
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
