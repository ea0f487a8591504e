"""The options that commands share, of workers and engines among them; defaults are the configs'."""

from __future__ import annotations

from typing import Any

import click

from trbatch import profiles
from trbatch.cli_completion import offering
from trbatch.cli_configs import picked
from trbatch.cli_fields import Decorator, grouped, setting
from trbatch.config import EngineConfig, JobSpec, WorkerConfig
from trbatch.errors import UsageError
from trbatch.logs import FORMATS

adapter_option = click.option(
    "--adapter",
    default="",
    help="A LoRA adapter's folder or hub name, merged into the model when it is loaded.",
)

store_option = setting(
    JobSpec,
    "out",
    "Folder or URL of the job folders. Without it: TRBATCH_STORE, else the user's state folder.",
    "--store",
    metavar="FOLDER|URL",
)

engine_options = grouped(
    setting(
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
    setting(
        EngineConfig,
        "dtype",
        "Numbers to compute with.",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    ),
    setting(EngineConfig, "max_num_seqs", "Rows decoded together; 0: by the machine."),
    setting(
        EngineConfig,
        "max_model_len",
        "Most tokens of prompt and output; 0: the model's, 8,192 at most.",
    ),
    setting(EngineConfig, "gpu_memory_utilization", "Share of the GPU's memory to use."),
    setting(EngineConfig, "prefill_chunk", "Prompt tokens run at once; 0: by the machine."),
    setting(
        EngineConfig,
        "speculate",
        "Draft with Token Recycling (default), or decode plainly.",
        "--speculate/--no-speculate",
    ),
    setting(EngineConfig, "tree_size", "Tokens a step for each row; 0: what pays best."),
    setting(
        EngineConfig,
        "prefix_sharing",
        "Run what prompts have in common at their begin once (default), or for each.",
        "--prefix-sharing/--no-prefix-sharing",
    ),
    setting(EngineConfig, "enforce_eager", "Without CUDA graphs: slower, for debugging."),
    section="Engine",
)

bench_model_options: Decorator = grouped(
    setting(
        JobSpec,
        "model",
        "Hub name, model folder or GGUF file. Without it: as in `trbatch run`.",
        metavar="MODEL",
    ),
    adapter_option,
    setting(
        EngineConfig,
        "device",
        "Where to compute: cpu, cuda:0, …; auto: on the first GPU, else on the CPU.",
        metavar="DEVICE",
    ),
    setting(
        EngineConfig,
        "dtype",
        "Numbers to compute with.",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    ),
)

worker_options = grouped(
    setting(WorkerConfig, "burst", "Stop when the queue is empty."),
    setting(
        WorkerConfig,
        "name",
        "Of this worker. Without it: host, device and process.",
        metavar="NAME",
    ),
    setting(
        WorkerConfig,
        "roots",
        "Job folders must lie below this folder or URL; may be repeated.",
        "--root",
        metavar="FOLDER|URL",
    ),
    setting(
        WorkerConfig,
        "publish_s",
        "Seconds between two writes of finished rows: what a crash may cost.",
        "--publish-seconds",
    ),
    setting(WorkerConfig, "chunks_in_flight", "Most chunks at once; 0: by the batch."),
    setting(WorkerConfig, "grace_s", "Seconds to finish when asked to stop.", "--grace"),
    setting(
        WorkerConfig,
        "until",
        "Stop then: 07:00 (local time), 2026-11-22T07:00, or 8h.",
        metavar="WHEN",
    ),
    setting(WorkerConfig, "metrics_port", "Serve metrics to Prometheus at this port; 0: none."),
    setting(
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
    shell_complete=offering([*profiles.shipped(), profiles.NONE], or_file=True),
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

redis_option = setting(
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
