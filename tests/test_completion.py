"""Tab completion: the scripts, and what they are answered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner

from trbatch import cli
from trbatch.cli_completion import SHELLS

ROOT = Path(__file__).parent.parent


def completed(*words: str) -> list[str]:
    """What is offered when Tab is pressed behind the last of the words."""
    kind = get_completion_class("bash")
    assert kind is not None
    shell = kind(cli.commands, {}, "trbatch", "_TRBATCH_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


def answered(*words: str) -> list[str]:
    """What the program itself tells bash then."""
    environment = os.environ | {
        "_TRBATCH_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["trbatch", *words]),
        "COMP_CWORD": str(len(words)),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from trbatch.cli import main; main()"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_script_that_asks_trbatch(shell: str) -> None:
    result = CliRunner().invoke(cli.commands, ["completion", shell])
    assert result.exit_code == 0
    assert f"_TRBATCH_COMPLETE={shell}_complete" in result.stdout
    assert "trbatch" in result.stdout


def test_bash_takes_the_script(tmp_path: Path) -> None:
    script = CliRunner().invoke(cli.commands, ["completion", "bash"]).stdout
    done = subprocess.run(
        ["bash", "-c", f"{script}\ncomplete -p trbatch"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("trbatch")


def test_commands_and_their_options_are_completed() -> None:
    assert completed("sub") == ["submit"]
    assert completed("completion", "") == list(SHELLS)
    assert completed("matrix", "ex") == ["export"]
    assert completed("submit", "--top") == answered("submit", "--top") == ["--top-p", "--top-k"]


def test_values_of_options_are_completed() -> None:
    assert completed("submit", "--priority", "") == ["high", "normal", "low"]
    assert completed("submit", "--priority", "n") == ["normal"]
    assert completed("worker", "--profile", "h") == ["h100", "h200", "h"]  # the last: as a file
    assert {"cpu", "none"} <= set(completed("worker", "--profile", ""))


def test_a_missing_shell_is_told_in_one_line() -> None:
    result = CliRunner().invoke(cli.commands, ["completion"])
    line, hint = result.stderr.splitlines()
    assert line == "error: missing argument 'SHELL'. Choose from: bash, zsh, fish"
    assert hint.startswith("hint: ")


def test_an_unknown_shell_is_refused_with_those_that_are_known() -> None:
    result = CliRunner().invoke(cli.commands, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.stderr
