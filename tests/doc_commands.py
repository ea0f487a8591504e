"""The `trbatch …` commands that a page shows, and whether the real command line would take them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
from doc_pages import blocks

from trbatch import cli

_SPAN = re.compile(r"``?(trbatch [^`]+?)``?", re.DOTALL)
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
_SEPARATORS = {"&&", "||", "|", ";", "&", "(", ")", ";;"}
_REDIRECTIONS = {">", ">>", "<", "2>", ">&"}


def of_page(text: str) -> Iterator[tuple[str, bool]]:
    """(command, whole): commands in blocks are whole, those in sentences may lack arguments."""
    prose = []
    inside = False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            prose.append(line)
    for block in blocks(text):
        if block.language == "console":
            yield from ((one, True) for one in _shown(block.lines))
        elif block.language in ("sh", "bash"):
            yield from ((one, True) for one in in_script("\n".join(block.lines)))
    for span in _SPAN.findall("\n".join(prose)):
        yield from ((one, False) for one in in_script(" ".join(span.split())))


def _shown(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("$ "):
            yield from in_script(line[2:])


def in_script(script: str) -> Iterator[str]:
    """The `trbatch` commands of a shell script, one line each, without what surrounds them."""
    script = script.replace("\\\n", " ")
    for inner in _SUBSTITUTION.findall(script):
        yield from in_script(inner)
    script = _SUBSTITUTION.sub("SUBSTITUTED", script)
    for line in script.splitlines():
        if not re.search(r"(^|[\s;&|])(\S*/)?trbatch\s", line):
            continue
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if word in _SEPARATORS or word in _REDIRECTIONS:
                if command and command[0].rpartition("/")[2] == "trbatch":
                    yield shlex.join(["trbatch", *command[1:]])
                command = [] if word in _SEPARATORS else ["file"]
            elif command or "=" not in word.partition("/")[0]:  # not a variable of its own
                command.append(word)


def problem(line: str, *, whole: bool) -> str:
    """What the command line would say against a command; "" if nothing.

    Args:
        whole: whether required arguments and options must be there, too.
    """
    words = [word.strip("[]") if not whole else word for word in shlex.split(line)[1:]]
    words = [word for word in words if whole or word not in ("…", "...")]
    command: click.Command = cli.commands
    context = click.Context(command, info_name="trbatch", **cli.commands.context_settings)
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-") or (not whole and words[0].isupper()):
            return "" if not whole or words else f"{line}: no command"
        name, *words = words
        if name not in command.commands:
            return f"{line}: no command {name!r}"
        command = command.commands[name]
        context = click.Context(command, context, info_name=name)
    return _misfit(command, context, words, line, whole=whole)


def _misfit(
    command: click.Command, context: click.Context, words: list[str], line: str, *, whole: bool
) -> str:
    if words[-1:] and not whole and words[-1].startswith("--"):
        names = [
            name for option in command.params for name in (*option.opts, *option.secondary_opts)
        ]
        if words[-1] not in names:
            return f"{line}: no option {words[-1]!r}"
        words = words[:-1]  # its value may be left out in a sentence
    try:
        values, rest, _ = command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        return f"{line}: {error.format_message()}"
    if rest and not any(
        isinstance(one, click.Argument) and one.nargs < 0 for one in command.params
    ):
        return f"{line}: too many arguments: {rest}"
    for parameter in command.params:
        given = values.get(parameter.name or "")
        if whole and parameter.required and not isinstance(given, str | tuple | list):
            return f"{line}: {parameter.name} is missing"
        choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ()
        if choices and isinstance(given, str) and given.islower() and given not in choices:
            return f"{line}: {given!r} is none of {', '.join(map(str, choices))}"
    return ""
