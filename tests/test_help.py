"""Help as a page of a manual: a summary, options in sections, an example."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner
from test_cli import COMMANDS

from trbatch import cli
from trbatch.cli_help import COMMAND_SECTIONS, MOST_COLUMNS, summary


def help_of(*path: str) -> str:
    result = CliRunner().invoke(cli.commands, [*path, "-h"], terminal_width=MOST_COLUMNS)
    assert result.exit_code == 0
    return result.stdout


def section(text: str, title: str) -> str:
    found = re.search(rf"^{re.escape(title)}:\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title!r}"
    return found[1]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_begins_with_one_whole_sentence(path: tuple[str, ...]) -> None:
    sentence = summary(COMMANDS[path])
    assert sentence, "the docstring's first sentence is the summary"
    assert sentence.endswith(".") and sentence[0].isupper() and len(sentence) < 90
    assert "..." not in help_of(*path[:-1]).replace("[ARGS]...", "")


@pytest.mark.parametrize("path", [path for path in COMMANDS if path], ids=" ".join)
def test_every_option_has_a_help_that_is_a_sentence(path: tuple[str, ...]) -> None:
    for option in COMMANDS[path].params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert option.help.rstrip(")").endswith("."), f"--{option.name}: {option.help}"


def test_options_stand_in_sections() -> None:
    text = help_of("run")
    assert "--temperature" in section(text, "Sampling")
    assert "--deadline" in section(text, "Job")
    assert "--device" in section(text, "Engine")
    assert "--model" in section(text, "Model")
    general = section(text, "Options")
    assert "--output" in general and "--temperature" not in general
    assert general.rstrip().splitlines()[-1].strip().startswith("-h, --help")
    assert "--grace" in section(help_of("worker"), "Worker")


def test_commands_stand_in_the_order_of_a_jobs_life_and_none_is_missing() -> None:
    text = help_of()
    shown = [name for title, _ in COMMAND_SECTIONS for name in _names(section(text, title))]
    assert shown[:3] == ["run", "submit", "wait"]
    assert isinstance(cli.commands, click.Group)
    assert {*shown, *_names(section(text, "More"))} == set(cli.commands.commands)


def _names(listed: str) -> list[str]:
    return re.findall(r"^  (\w+)  ", listed, re.MULTILINE)


def test_the_programs_help_tells_of_exit_codes_and_the_environment() -> None:
    text = help_of()
    assert re.search(r"^  75 .*cannot be reached", section(text, "Exit codes"), re.MULTILINE)
    assert "TRBATCH_REDIS_URL" in section(text, "Environment")


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_no_line_of_a_help_is_wider_than_a_terminal(path: tuple[str, ...]) -> None:
    assert max(map(len, help_of(*path).splitlines())) <= MOST_COLUMNS
