"""What trbatch says to people who use it wrongly: what, where, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from job_tools import prompts, write_lines

from trbatch import cli
from trbatch.engine.bench_prompts import read_prompts
from trbatch.errors import InputError
from trbatch.wording import counted

MODEL = ("--model", "org/echo")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])


@pytest.fixture
def rows(home: Path, tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", *prompts(3))


def said(result: Result, code: int = 2) -> list[str]:
    """The lines of a refusal: an error, maybe a hint, and nothing else anywhere."""
    assert (result.exit_code, result.stdout) == (code, "")
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert "Traceback" not in result.stderr and "Errno" not in result.stderr
    return lines


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["rnu"], "no such command 'rnu'", "did you mean 'run'?"),
        (["--nonsense"], "no such option '--nonsense'", "trbatch -h"),
        (["submit"], "missing argument 'INPUT'", "trbatch submit -h"),
        (
            ["submit", "x", "--temprature", "1"],
            "no such option '--temprature'",
            "did you mean one of: '--temperature', '--template'?",
        ),
        (
            ["submit", "x", "--temperature", "hot"],
            "invalid value for '--temperature': 'hot' is not a valid float",
            "trbatch submit -h",
        ),
        (["bench", "speed"], "missing option '--prompts'", "trbatch bench speed -h"),
        (
            ["wait", "x", "--timeout", "-1"],
            "invalid value for '--timeout': -1.0 is not in the range x>=0",
            "trbatch wait -h",
        ),
    ],
)
def test_wrong_usage_is_told_in_two_lines(arguments: list[str], error: str, hint: str) -> None:
    assert said(invoke(*arguments)) == [f"error: {error}", f"hint: {hint}"]


def test_no_arguments_at_all_show_the_help() -> None:
    assert "A job from begin to end:" in invoke().output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--top-p", "1.5", "--top-p must be above 0 and at most 1, not 1.5"),
        ("--max-tokens", "0", "--max-tokens must be between 1 and 2147483647, not 0"),
        ("--chunk-size", "0", "--chunk-size must be at least 1, not 0"),
        ("--priority", "urgent", "--priority must be one of high, normal, low, not 'urgent'"),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_given(
    rows: Path, option: str, value: str, message: str
) -> None:
    assert said(invoke("submit", rows, *MODEL, option, value))[0] == f"error: {message}"


def test_a_worker_s_wrong_setting_is_named_as_its_option(home: Path) -> None:
    lines = said(invoke("worker", "--grace", "-3"))
    assert lines == ["error: --grace must be at least 0 and at most 86400, not -3"]


def test_a_folder_is_no_input(home: Path, tmp_path: Path) -> None:
    (tmp_path / "parts.jsonl").mkdir()
    lines = said(invoke("submit", tmp_path / "parts.jsonl"))
    assert lines[0] == f"error: {tmp_path}/parts.jsonl is a folder, not a file"
    assert "cat part-*.jsonl" in lines[1]


def test_a_table_in_csv_gets_a_hint_how_it_becomes_parquet(home: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,prompt\n1,a\n")
    assert "read_csv(…).to_parquet(…)" in said(invoke("submit", tmp_path / "in.csv"))[1]


def test_a_missing_job_is_told_with_the_store_that_was_searched(home: Path) -> None:
    lines = said(invoke("status", "nightly"))
    assert lines[0] == f"error: there is no job 'nightly' in {home}/jobs"
    assert "--store" in lines[1]
    assert said(invoke("status", home))[0] == f"error: no job folder at {home}"


def test_a_deadline_that_has_passed_is_refused_for_a_new_job(rows: Path) -> None:
    lines = said(invoke("submit", rows, *MODEL, "--deadline", "2020-01-01T00:00"))
    assert lines[0].startswith("error: the deadline has passed already: 2020-01-01 00:00")


def test_submit_shows_the_first_rows_that_are_unusable_and_why(home: Path, tmp_path: Path) -> None:
    bad = [{"text": f"row {i}"} for i in range(5)]
    file = write_lines(tmp_path / "in.jsonl", {"prompt": "good"}, *bad)
    result = invoke("submit", file, *MODEL, "--name", "job")
    assert (result.exit_code, result.stdout) == (0, "job\n")
    lines = result.stderr.splitlines()
    assert lines[0].startswith("submitted job job: 6 rows, 5 of them unusable")
    why = "neither 'prompt' nor 'messages'; give one (missing_prompt)"
    assert lines[2:5] == [f"  {file}:{line}: {why}" for line in (2, 3, 4)]
    assert lines[5] == "  … and 2 more; all are in the dataset, with error_code"
    again = invoke("submit", file, *MODEL, "--name", "job")
    assert "missing_prompt" not in again.stderr, "nothing was read, so nothing is new"
    events = invoke("submit", file, *MODEL, "--name", "other", "--log-format", "json").stderr
    found = [json.loads(line) for line in events.splitlines()]
    assert [one["event"] for one in found] == ["submitted", *["row_unusable"] * 3, "note"]


def test_a_dataset_that_is_not_complete_comes_with_what_to_do(rows: Path) -> None:
    invoke("submit", rows, *MODEL, "--name", "job")
    result = invoke("collect", "job", "-o", rows.with_name("out.parquet"))
    assert result.exit_code == 4
    assert "NOT complete: 3 rows in" in result.stdout
    assert result.stderr == "hint: trbatch wait job, then the same command again\n"


def test_commands_that_find_nothing_to_do_say_so(rows: Path) -> None:
    invoke("submit", rows, *MODEL, "--name", "job")
    waits = "job: 0 chunks enqueued; those that lack rows wait or run already\n"
    assert invoke("continue", "job").stdout == waits
    assert invoke("retry", "job", "--failed").stdout == "job: no such row has failed\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"', "it is not valid JSON at character 16"),
        ('{"text": "a"}', "there is no 'messages'"),
        ('{"prompt": 3}', "3 is not a text"),
    ],
)
def test_a_benchmark_s_bad_prompt_is_told_in_words(tmp_path: Path, line: str, reason: str) -> None:
    file = write_lines(tmp_path / "p.jsonl", line)
    with pytest.raises(InputError, match=rf"p\.jsonl, line 1: no prompt in this row: {reason}"):
        read_prompts(file)


@pytest.mark.parametrize("option", ["--batch", "--max-tokens"])
def test_a_benchmark_of_nothing_is_refused_and_does_not_wait_for_ever(
    rows: Path, option: str
) -> None:
    lines = said(invoke("bench", "acceptance", "--prompts", rows, option, "0"))
    assert lines[0] == f"error: invalid value for '{option}': 0 is not in the range x>=1"


def test_a_bucket_without_credentials_is_unreachable(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    lines = said(invoke("submit", "s3://bucket/prompts.jsonl", *MODEL), code=75)
    assert lines[0] == "error: cannot read s3://bucket/prompts.jsonl: Unable to locate credentials"
    assert "credentials" in lines[1]


def test_a_dataset_that_cannot_be_written_is_told_without_hidden_names(rows: Path) -> None:
    invoke("submit", rows, *MODEL, "--name", "job")
    lines = said(invoke("collect", "job", "-o", "/proc/out.parquet"), code=75)
    assert lines == ["error: cannot write /proc/out.parquet: No such file or directory"]


@pytest.mark.parametrize(("number", "words"), [(0, "0 rows"), (1, "1 row"), (1000, "1,000 rows")])
def test_numbers_and_nouns_agree(number: int, words: str) -> None:
    assert counted(number, "row") == words
