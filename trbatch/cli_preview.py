"""What `trbatch submit --dry-run` prints."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from trbatch.cli_output import print_json, print_pairs
from trbatch.config import JobSpec
from trbatch.errors import EXIT_OK, EXIT_ROWS_FAILED
from trbatch.masking import mask_url, printable
from trbatch.preview import SHOWN_BAD_ROWS, Preview, ShownPrompt, preview
from trbatch.progress import duration
from trbatch.wording import counted

_LINES_APART_S = 30.0
_MOST_CHARACTERS = 1500  # of a prompt that is shown; JSON has all of it


def dry_run(spec: JobSpec, *, as_json: bool) -> int:
    """Print the preview of a job. Returns the exit code that its rows deserve."""
    with _counting() as report:
        found = preview(spec, report=report)
    if as_json:
        print_json(found.to_dict())
    else:
        print_preview(found)
    return EXIT_ROWS_FAILED if found.rows_bad else EXIT_OK


@contextmanager
def _counting() -> Iterator[Callable[[int], None]]:
    """How many rows are read, on stderr: a growing number on a terminal, else a line at times."""
    terminal = sys.stderr.isatty()
    pause = 0.5 if terminal else _LINES_APART_S
    told = time.monotonic()
    shown = False

    def report(rows: int) -> None:
        nonlocal told, shown
        if time.monotonic() - told >= pause:
            told, shown = time.monotonic(), True
            words = f"{rows:,} rows read …"
            click.echo(f"\r{words}" if terminal else words, err=True, nl=not terminal)

    yield report
    if terminal and shown:
        click.echo("\r\033[K", err=True, nl=False)


def print_preview(found: Preview) -> None:
    """A preview for people."""
    bad = f", {found.rows_bad:,} unusable" if found.rows_bad else ""
    done = f", {found.samples_done:,} samples of it are done" if found.continues else ""
    pairs = {
        "input": f"{mask_url(found.input)}: {counted(found.rows, 'row')}{bad}",
        "job": f"{found.job}, {'continued' if found.continues else 'new'}{done}",
        "model": found.model,
        "task": found.task,
        "to decode": counted(found.samples, "sample"),
        "prompt tokens": _prompt_tokens(found),
        "new tokens": f"at most {found.new_tokens_at_most:,}",
        "time": _time(found),
    }
    for code, rows in found.errors.most_common():
        pairs[f"unusable: {code}"] = counted(rows, "row")
    print_pairs(pairs)
    for message in found.bad_rows:
        click.echo(f"  {printable(message)}")
    if found.rows_bad > SHOWN_BAD_ROWS:
        click.echo(f"  … and {found.rows_bad - SHOWN_BAD_ROWS:,} more")
    for prompt in found.prompts:
        _print_prompt(prompt)
    click.echo("\ndry run: nothing was submitted", err=True)


def _prompt_tokens(found: Preview) -> str:
    if found.prompt_tokens is None:
        return f"not counted: {found.uncounted}"
    if found.longest_prompt is None:
        return "0"
    name, most = found.longest_prompt
    good = found.rows - found.rows_bad
    average = found.prompt_tokens / max(good, 1)
    return f"{found.prompt_tokens:,}, {average:,.0f} a row, at most {most:,} (row {name})"


def _time(found: Preview) -> str:
    pace = found.pace
    if pace is None or found.seconds is None or found.seconds_at_most is None:
        return "not estimated: the store has no results of this model to measure by"
    jobs = "the last job" if pace.jobs == 1 else f"the last {pace.jobs} jobs"
    return (
        f"about {duration(found.seconds)}, at most {duration(found.seconds_at_most)}, at the "
        f"{pace.tokens_per_s:,.0f} tokens/s and {pace.tokens_per_sample:,.0f} tokens a sample of "
        f"{jobs} of this model"
    )


def _print_prompt(prompt: ShownPrompt) -> None:
    counted = "not rendered" if prompt.tokens is None else f"{prompt.tokens:,} tokens"
    title = f"── prompt of row {printable(prompt.id)}, {counted} "
    width = min(shutil.get_terminal_size().columns, 100)
    click.echo(f"\n{title.ljust(width, '─')}")
    text = prompt.text
    if len(text) > _MOST_CHARACTERS:
        left = len(text) - _MOST_CHARACTERS
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]}\n[… {left:,} characters more …]\n{text[-half:]}"
    for line in text.split("\n"):
        click.echo(printable(line.expandtabs(4)))
