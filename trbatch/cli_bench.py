"""`trbatch bench`: the commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trbatch import cli_configs as configs
from trbatch import cli_options as options
from trbatch.cli_fields import epilog, example
from trbatch.cli_help import HelpGroup
from trbatch.cli_output import print_table
from trbatch.config import TREES, EngineConfig
from trbatch.engine.shapes import SHAPES
from trbatch.errors import UsageError
from trbatch.extras import require_worker

_EXAMPLE = "trbatch bench speed --prompts prompts.jsonl --batch 1,8"


@click.group("bench", cls=HelpGroup, epilog=epilog(_EXAMPLE))
def bench_group() -> None:
    """Measure acceptance and speed on this machine."""


def _whole_numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> list[int] | None:
    if value is None:
        return None
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{parameter.opts[0]} must be whole numbers like 1,8, not {value!r}")
    return numbers


# Counts that the measurements divide by or wait for.
_ONE_OR_MORE = click.IntRange(1)
_NONE_OR_MORE = click.IntRange(0)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_prompts_option = click.option(
    "--prompts",
    required=True,
    type=_FILE,
    help="JSONL rows with 'prompt', 'messages' or 'turns' (the first turn counts).",
)


@bench_group.command(
    "acceptance",
    **example("trbatch bench acceptance --prompts p.jsonl --tree-size 4,8,80 --json"),
)
@_prompts_option
@options.bench_model_options
@click.option(
    "--batch", type=_ONE_OR_MORE, default=8, show_default=True, help="Rows decoded together."
)
@click.option(
    "--limit",
    type=_NONE_OR_MORE,
    default=32,
    show_default=True,
    help="Prompts to use, the first; 0: all.",
)
@click.option(
    "--max-tokens",
    type=_ONE_OR_MORE,
    default=128,
    show_default=True,
    help="Most tokens a prompt.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0 is greedy.",
)
@click.option(
    "tree_sizes",
    "--tree-size",
    default="80",
    show_default=True,
    callback=_whole_numbers,
    help="Draft tokens a step; several sizes as 8,16,80.",
)
@click.option(
    "--tree",
    type=click.Choice(TREES),
    default=EngineConfig().tree,
    show_default=True,
    help="How nodes are picked: by chance, along a learned tree, or along the published one.",
)
@click.option(
    "--orders",
    type=click.IntRange(0, 3),
    default=3,
    show_default=True,
    help="Longest context of a row's own candidates, tokens; 0: none of its own.",
)
@click.option(
    "--task-orders",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    help="Longest context of the candidates that all rows share, tokens.",
)
@click.option(
    "--bigrams/--no-bigrams", default=True, help="What the model says after each single token."
)
@click.option("--spine/--no-spine", default=True, help="Continue repeated passages of the text.")
@click.option("--train", type=_FILE, help="Prompts to decode first, so that the matrix is warm.")
@click.option(
    "--train-tokens",
    type=_NONE_OR_MORE,
    default=0,
    help="Tokens to generate for each of these; 0: as --max-tokens.",
)
@click.option(
    "--forget",
    type=click.Choice(["", "rows"]),
    default="",
    help="After --train, empty the rows and keep only how far they can be trusted.",
)
@click.option("--reference", is_flag=True, help="Measure the paper's algorithm beside it.")
@click.option("--check", is_flag=True, help="Compare every output with plain decoding.")
@options.json_option
def bench_acceptance(as_json: bool, **settings: Any) -> None:
    """Measure how often drafts are right, by tree size and category.

    The mean acceptance length is (tokens - 1) / decode forwards: plain decoding has 1. Progress
    goes to stderr, the table (with --json: one line) to stdout.
    """
    require_worker("`trbatch bench`")
    from trbatch.engine.bench_acceptance import acceptance

    print_table(acceptance(**configs.with_adapter(settings), progress=_note), as_json=as_json)


@bench_group.command("speed", **example("trbatch bench speed --prompts p.jsonl --batch 1,8 --json"))
@_prompts_option
@options.bench_model_options
@click.option(
    "batches",
    "--batch",
    callback=_whole_numbers,
    help="Rows decoded together; several as 1,8. Without it: 1,8, on a GPU up to 256.",
)
@click.option(
    "--max-tokens", type=_ONE_OR_MORE, default=96, show_default=True, help="Tokens a prompt."
)
@click.option(
    "--limit",
    type=_NONE_OR_MORE,
    default=0,
    help="Prompts to use, from the first; 0: what the runs need.",
)
@click.option(
    "--warm-up",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Other prompts that the matrix learns from before the clock starts; 0: cold.",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "turns", "curve"]),
    default="auto",
    show_default=True,
    help="Runs that take turns, for a machine that others use; or one pass a batch size, with "
    "steps, floor and tail. auto: a curve on a GPU, or where a shape or a picture is asked for.",
)
@click.option(
    "--runs",
    type=_ONE_OR_MORE,
    default=7,
    show_default=True,
    help="Of turns; medians are shown.",
)
@click.option(
    "--as-shape",
    type=click.Choice(list(SHAPES)),
    help="Give a small Llama the cost of a big one without changing what it says.",
)
@click.option(
    "--random-weights/--no-random-weights",
    default=True,
    help="With a shape: time random weights too, since zeros may run faster (default).",
)
@click.option(
    "--generate/--no-generate", default=True, help="Time transformers' generate, too (default)."
)
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curve.")
@options.json_option
def bench_speed(as_json: bool, method: str, **settings: Any) -> None:
    """Measure tokens/s of transformers' generate, plain decoding and Token Recycling.

    All three decode the same prompts with the same model in one process, and only their ratios mean
    much on a machine that others use. Progress goes to stderr, the table (with --json: one line) to
    stdout.
    """
    require_worker("`trbatch bench`")
    from trbatch.engine.bench_method import measure_speed

    print_table(
        measure_speed(method, **configs.with_adapter(settings), progress=_note), as_json=as_json
    )


def _note(text: str) -> None:
    click.echo(text, err=True)
