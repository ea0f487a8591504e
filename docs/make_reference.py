"""Writes docs/reference.md and docs/api.md from the program itself.

    python docs/make_reference.py           # or: make reference
    python docs/make_reference.py --check   # exit code 1 if a page is out of date

Nothing on these pages is written by hand: help texts, columns, codes, docstrings and the comments
of config.py are their sources, and a test compares the pages with what this script makes of them.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # this repository's package, whatever is installed

import trbatch
from trbatch import api, cli
from trbatch.cli_help import ENVIRONMENT, MOST_COLUMNS, summary
from trbatch.config import EngineConfig, JobSpec, SamplingParams
from trbatch.engine.sequence import Completion
from trbatch.error_codes import FROM_DECODING, FROM_THE_INPUT, error_table
from trbatch.errors import EXIT_CODES
from trbatch.figures import Progress
from trbatch.job_status import JobStatus
from trbatch.pruning import Pruned
from trbatch.results import Receipt
from trbatch.schema import schema_table

MADE = "<!-- Made by `make reference`; changes by hand are lost. -->\n"


def commands(
    command: click.Command, path: tuple[str, ...] = ("trbatch",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with its words, groups before their own."""
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from commands(command.commands[name], (*path, name))


def help_of(path: tuple[str, ...], command: click.Command) -> str:
    """What `-h` prints, at a fixed width."""
    above = None
    for name in path[:-1]:
        above = click.Context(cli.commands, above, info_name=name)
    settings = {**cli.commands.context_settings, "terminal_width": MOST_COLUMNS}
    context = click.Context(command, above, info_name=path[-1], **settings)
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def reference() -> str:
    """The reference of commands, columns, codes and environment."""
    found = list(commands(cli.commands))
    parts = [
        "# Reference\n",
        MADE,
        "Every command, every column of the dataset, every code. "
        "The Python side is in [api.md](api.md).\n",
        "| command | |\n|---|---|",
    ]
    for path, command in found[1:]:
        name = " ".join(path)
        parts.append(f"| [`{name}`](#{name.replace(' ', '-')}) | {summary(command)} |")
    parts += ["", "## Commands\n"]
    for path, command in found:
        parts.append(f"### {' '.join(path)}\n\n```text\n{help_of(path, command)}\n```\n")
    parts += ["## Columns of the dataset\n", "One row a sample, in input order.\n", schema_table()]
    parts += ["## Error codes of rows\n"]
    parts += ["Found while the input is read; the row is never decoded:\n"]
    parts += [error_table(FROM_THE_INPUT), "Found by a worker:\n", error_table(FROM_DECODING)]
    parts += ["## Exit codes\n", two_columns("code", EXIT_CODES)]
    parts += ["## Environment\n", two_columns("variable", ENVIRONMENT)]
    return "\n".join(parts)


def two_columns(title: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Names and meanings as a Markdown table."""
    lines = [f"| {title} | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in pairs]
    return "\n".join(lines) + "\n"


API_INTRO = """What `import trbatch` gives. Importing it loads neither torch nor the queue.

```console
$ head -n 4 jobs/sample_prompts.jsonl > prompts.jsonl
```

```python
import trbatch

job = trbatch.submit("prompts.jsonl", name="api", max_tokens=16)
print(job.id, job.status().state)
```

```text
api queued
```

A worker decodes it, on any machine that sees the same store and the same queue:

```console
$ trbatch worker --burst
…
```

```python
import trbatch

status = trbatch.wait("api")
print(status.state, status.progress.rows_ok)
print(trbatch.collect("api", "answers.parquet"))
```

```text
completed 4
complete: 4 rows in = 4 ok + 0 failed + 0 cancelled, each id once
```

Every error that trbatch raises on purpose is a `trbatch.TrbatchError`. Its `exit_code` is what the
command line would have ended with, its `hint` says what to do:

```python
import trbatch

try:
    trbatch.submit("prompts.jsonl", temprature=0.7)
except trbatch.TrbatchError as error:
    print(f"{error}; {error.hint} ({error.exit_code})")
```

```text
unknown setting 'temprature'; did you mean 'temperature'? (2)
```

`trbatch.generate` needs neither queue nor worker: it loads the model into this process.

```python
from trbatch import SamplingParams, generate
from trbatch.config import EngineConfig

found = generate(
    ["The capital of France is", [{"role": "user", "content": "Name a colour."}]],
    SamplingParams(max_tokens=8),
    engine=EngineConfig(device="cpu", max_num_seqs=2),
)
print(len(found), found[0].finish_reason, len(found[0].token_ids))
```

```text
…
2 length 8
```
"""


def api_page() -> str:
    """The page of the public Python names."""
    parts = ["# Python API\n", MADE, API_INTRO]
    parts += ["## Functions\n"]
    for name in trbatch.__all__:
        thing = getattr(trbatch, name)
        if inspect.isfunction(thing):
            parts.append(function(f"trbatch.{name}", thing))
    parts += ["## Settings\n", "An unknown name is an error that says which was meant.\n"]
    parts += [
        settings("trbatch.JobSpec", JobSpec),
        settings("trbatch.SamplingParams", SamplingParams),
        settings("trbatch.config.EngineConfig", EngineConfig),
    ]
    module = inspect.getdoc(sys.modules["trbatch.errors"]) or ""
    parts += [f"## Errors\n\n### `trbatch.TrbatchError`\n\n```text\n{module}\n```\n"]
    parts += ["## What functions return\n", klass("trbatch.api.Job", api.Job)]
    for kind in (JobStatus, Progress, Receipt, Completion, Pruned):
        parts.append(settings(f"{kind.__module__}.{kind.__name__}", kind))
    return "\n".join(parts)


def function(name: str, thing: Callable[..., Any]) -> str:
    """A heading, the signature and the docstring."""
    called = name.rpartition(".")[2] + signature(thing)
    return f"### `{name}`\n\n```text\n{called}\n```\n\n{text(thing)}\n"


def klass(name: str, kind: type) -> str:
    """A class with its public methods and properties."""
    parts = [f"### `{name}`\n\n{text(kind)}\n"]
    for attribute, thing in vars(kind).items():
        if attribute.startswith("_"):
            continue
        known = getattr(kind, attribute)
        called = f".{attribute}" + ("" if isinstance(thing, property) else signature(known))
        parts.append(f"```text\n{called}\n```\n\n{text(known)}\n")
    return "\n".join(parts)


def settings(name: str, kind: type) -> str:
    """A dataclass: its docstring, a table of its fields, and what can be asked of it."""
    said = option_helps() | field_comments(kind)
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        if field.default_factory is not dataclasses.MISSING:
            default = f"`{getattr(field.default_factory, '__name__', '')}()`"
        type_of = str(field.type).replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{type_of}` | {default} | {said.get(field.name, '')} |")
    for attribute, thing in vars(kind).items():
        if isinstance(thing, property) and not attribute.startswith("_"):
            returns = inspect.signature(thing.fget).return_annotation if thing.fget else ""
            type_of = str(returns).replace("|", "\\|")
            lines.append(f"| `.{attribute}` | `{type_of}` | | {one_line(thing)} |")
    return f"### `{name}`\n\n{text(kind)}\n\n" + "\n".join(lines) + "\n"


def option_helps() -> dict[str, str]:
    """What the command line says of the settings, by their names."""
    found: dict[str, str] = {}
    for _, command in commands(cli.commands):
        for option in command.params:
            if isinstance(option, click.Option) and option.name and option.help:
                found.setdefault(option.name, option.help.replace("|", "\\|"))
    return found


def field_comments(kind: type) -> dict[str, str]:
    """What is said about the fields of a class: behind them, or in lines of their own above."""
    lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    (body,) = ast.parse("\n".join(lines)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            behind = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
            comment = behind.partition("#")[2].strip()
            above = node.lineno - 2
            while not comment and lines[above].strip().startswith("#"):
                above -= 1
            if not comment:
                said = (line.strip().lstrip("# ") for line in lines[above + 1 : node.lineno - 1])
                comment = " ".join(said)
            if comment:
                found[node.target.id] = comment.replace("|", "\\|")
    return found


def signature(thing: Callable[..., Any]) -> str:
    """Parameters and result, one parameter a line where they are many."""
    found = inspect.signature(thing)
    inside, named = [], False
    for name, one in found.parameters.items():
        if name == "self":
            continue
        if one.kind is one.KEYWORD_ONLY and not named:
            inside.append("*")
        named = named or one.kind is one.KEYWORD_ONLY
        default = "" if one.default is one.empty else f" = {one.default!r}"
        stars = "**" if one.kind is one.VAR_KEYWORD else ""
        inside.append(f"{stars}{name}: {one.annotation}{default}")
    line = f"({', '.join(inside)}) -> {found.return_annotation}"
    if len(line) < 80:
        return line
    return "(\n" + "".join(f"    {one},\n" for one in inside) + f") -> {found.return_annotation}"


def text(thing: Any) -> str:
    """A docstring as Markdown: its sections as lists."""
    lines = []
    for line in (inspect.getdoc(thing) or "").splitlines():
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            lines.append(f"*{line}*\n")
        elif match := re.fullmatch(r"    (\w+): (.*)", line):
            lines.append(f"- `{match[1]}`: {match[2]}")
        elif line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines)


def one_line(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


PAGES = {"reference.md": reference, "api.md": api_page}


def main() -> int:
    """Write the pages, or with --check compare them."""
    parser = argparse.ArgumentParser(description="Write docs/reference.md and docs/api.md.")
    parser.add_argument("--check", action="store_true", help="only tell which are out of date")
    options = parser.parse_args()
    stale = 0
    for name, make in PAGES.items():
        file, made = HERE / name, make()
        if file.is_file() and file.read_text(encoding="utf-8") == made:
            continue
        stale += 1
        if options.check:
            print(f"{file} is out of date: make reference", file=sys.stderr)
        else:
            file.write_text(made, encoding="utf-8")
            print(file)
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
