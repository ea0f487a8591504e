"""A named job night after night, and what is run when it has ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from trbatch import api, cli, local
from trbatch.queue import JobQueue
from trbatch.queue_control import forget
from workers import MODEL, submit, work, write_rows

pytestmark = pytest.mark.usefixtures("home")

ECHO = str(Path(__file__).with_name("echo_worker.py"))
NAME = "nightly-2026-11-22"


@pytest.fixture
def echo_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """`trbatch run` starts workers whose engine echoes."""
    monkeypatch.setattr(local, "WORKER_COMMAND", (sys.executable, ECHO, "worker"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])


def submit_named(path: Path, *more: str) -> Result:
    return invoke("submit", path, "--name", NAME, "--model", MODEL, *more)


# --- the same job ---


def test_the_same_input_and_settings_are_the_same_job(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", 6)
    first = submit_named(path)
    assert (first.exit_code, first.stdout) == (0, f"{NAME}\n")
    assert "submitted job" in first.stderr
    again = submit_named(path)
    assert (again.exit_code, again.stdout) == (0, f"{NAME}\n")
    assert f"same input and settings: job {NAME}" in again.stderr
    assert "6 of 6 rows are to be decoded" in again.stderr
    assert api.status(NAME).chunks.queued == 1
    work()
    done = submit_named(path)
    assert (done.exit_code, "0 of 6 rows are to be decoded" in done.stderr) == (0, True)
    assert api.status(NAME).state == "completed"


def test_of_a_grown_input_only_the_new_rows_are_decoded(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", 6)
    submit_named(path)
    work()
    write_rows(path, 9)
    grown = submit_named(path)
    assert (grown.exit_code, grown.stdout) == (0, f"{NAME}\n")
    assert "input read anew: 9 rows" in grown.stderr
    assert "3 of 9 rows are to be decoded" in grown.stderr
    engine = work()
    assert engine.unfinished == 0
    receipt = api.collect(NAME)
    assert (receipt.rows_ok, receipt.duplicates, receipt.exit_code) == (9, 0, 0)


def test_a_named_job_may_move_to_another_file_of_the_same_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "2026-11-22.jsonl", 6)
    submit_named(path)
    work()
    moved = path.rename(tmp_path / "2026-11-23.jsonl")
    again = submit_named(moved)
    assert (again.exit_code, "0 of 6 rows are to be decoded" in again.stderr) == (0, True)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--temperature", "0.5"], "temperature was 0.0, now 0.5"),
        (["--max-tokens", "7", "--stop", "END"], "max_tokens was 256, now 7; stop was"),
        (["--task", "other"], "now 'other'"),
        (["--model", "org/other"], "model was 'org/echo', now 'org/other'"),
    ],
)
def test_changed_settings_are_refused_by_name_and_with_the_cure(
    tmp_path: Path, changed: list[str], named: str
) -> None:
    path = write_rows(tmp_path / "in.jsonl", 6)
    submit_named(path)
    refused = submit_named(path, *changed)
    assert (refused.exit_code, refused.stdout) == (7, "")
    assert named in refused.stderr
    assert "hint: give those again, choose another --name, or --resume always" in refused.stderr


def test_deadline_priority_and_limits_are_no_part_of_what_a_job_is(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "x" * 500}, {"prompt": "y"}])
    more = ["--deadline", "2h", "--priority", "high", "--max-row-bytes", "100"]
    assert submit_named(path, *more).exit_code == 0
    status = api.status(NAME)
    assert (status.priority, status.errors, status.progress.rows) == (
        "high",
        {"row_too_large": 1},
        2,
    )
    assert submit_named(path).exit_code == 0  # the default limit takes the long row
    assert (api.status(NAME).errors, api.status(NAME).deadline) == ({}, status.deadline)
    assert submit_named(path, "--priority", "urgent").exit_code == 2


def test_a_held_job_says_so_when_it_is_submitted_again(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", 6)
    submit_named(path)
    invoke("cancel", NAME)
    again = submit_named(path)
    assert (again.exit_code, again.stdout) == (0, f"{NAME}\n")
    assert (
        f"it is cancelled and stays so; `trbatch resume {NAME}` takes it up again" in again.stderr
    )


# --- the commands ---


def state(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_cancel_pause_continue_and_resume_from_the_command_line(tmp_path: Path) -> None:
    job = submit(tmp_path, 8)
    assert state(invoke("pause", job.id, "--json"))["paused"] is True
    words = invoke("status", job.id).stdout
    assert "queued, paused" in words
    assert state(invoke("continue", job.id, "--json"))["chunks_enqueued"] == 2
    assert "cancelled" in invoke("cancel", job.id).stdout
    assert invoke("wait", job.id).exit_code == 5
    assert invoke("collect", job.id).exit_code == 5
    refused = invoke("continue", job.id)
    assert (refused.exit_code, f"trbatch resume {job.path}" in refused.stderr) == (2, True)
    assert "2 chunks enqueued" in invoke("resume", job.path).stdout
    work()
    assert invoke("wait", job.id).exit_code == 0
    assert invoke("collect", job.id).exit_code == 0


def test_retry_from_the_command_line(tmp_path: Path) -> None:
    job = submit(tmp_path, [{"prompt": "refuse"}, {"prompt": "fine"}, {"id": "unusable"}])
    work()
    assert invoke("retry", job.id).exit_code == 2
    assert "1 row to be decoded again" in invoke("retry", job.id, "--failed").stdout
    work()
    assert state(invoke("retry", job.id, "--failed", "--code", "refused", "--json")) == {
        "id": job.id, "path": job.path, "rows_retried": 1,
    }  # fmt: skip
    words = invoke("retry", job.id, "--failed", "--code", "missing_prompt").stdout
    assert "no such row has failed; 1 row unusable in the input: correct them there" in words


def test_status_in_words_tells_deadline_priority_and_failures(tmp_path: Path) -> None:
    job = submit(tmp_path, [{"prompt": "refuse"}, {"id": "b"}], deadline="2h", priority="low")
    submit(tmp_path, 8, name="other")
    words = invoke("status", job.id).stdout
    assert "low, 2 chunks of more urgent jobs wait" in words
    assert "left" in words.partition("deadline")[2]
    work()
    words = invoke("status", job.id).stdout
    assert "failed: refused" in words
    assert "failed: missing_prompt" in words


# --- on completion ---

SHOW = (
    f'{sys.executable} -c "import os, json; json.dump({{k: v for k, v in os.environ.items() '
    "if k.startswith('TRBATCH_')}, open(os.environ['HOOK_FILE'], 'w')); print('hello from it')\""
)


@pytest.fixture
def hook_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOOK_FILE", str(tmp_path / "hook.json"))
    return tmp_path / "hook.json"


def test_wait_runs_the_command_once_the_job_has_ended(tmp_path: Path, hook_file: Path) -> None:
    job = submit(tmp_path, [{"prompt": "refuse"}, {"prompt": "fine"}])
    assert invoke("wait", job.id, "--timeout", "0.1", "--on-complete", SHOW).exit_code == 6
    assert not hook_file.exists()  # it has not ended
    work()
    assert invoke("wait", job.id, "--on-complete", SHOW).exit_code == 3
    told = json.loads(hook_file.read_text())
    assert told["TRBATCH_JOB"] == job.id
    assert told["TRBATCH_JOB_PATH"] == job.path
    assert told["TRBATCH_STATUS"] == "completed"
    assert told["TRBATCH_EXIT_CODE"] == "3"
    assert (told["TRBATCH_ROWS"], told["TRBATCH_ROWS_OK"], told["TRBATCH_ROWS_FAILED"]) == (
        "2", "1", "1",
    )  # fmt: skip


@pytest.mark.parametrize(("ends", "code"), [("cancelled", 5), ("expired", 6), ("failed", 4)])
def test_the_command_is_run_however_the_job_ended(
    tmp_path: Path, hook_file: Path, ends: str, code: int
) -> None:
    job = submit(tmp_path, 4, deadline="1s" if ends == "expired" else "")
    if ends == "cancelled":
        job.cancel()
    elif ends == "failed":
        with JobQueue.connect() as jobs:
            forget(jobs, job.folder)
    result = invoke("wait", job.id, "--timeout", "20", "--on-complete", SHOW)
    assert result.exit_code == code, result.stderr
    told = json.loads(hook_file.read_text())
    assert (told["TRBATCH_STATUS"], told["TRBATCH_EXIT_CODE"]) == (ends, str(code))


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 0", 0), ("exit 9", 9), ("kill -TERM $$", 143), ("no-such-thing", 127)],
)
def test_the_commands_exit_code_is_passed_on(tmp_path: Path, command: str, code: int) -> None:
    job = submit(tmp_path, 4)
    work()
    result = invoke("wait", job.id, "--on-complete", command)
    assert result.exit_code == code
    assert (f"--on-complete ended with exit code {code}" in result.stderr) == (code != 0)


def test_our_own_exit_code_wins(tmp_path: Path) -> None:
    job = submit(tmp_path, [{"prompt": "refuse"}])
    work()
    assert invoke("wait", job.id, "--on-complete", "exit 9").exit_code == 3


def test_run_hands_the_dataset_to_the_command(
    tmp_path: Path, hook_file: Path, echo_worker: None
) -> None:
    path, output = write_rows(tmp_path / "in.jsonl", 4), tmp_path / "out.parquet"
    result = invoke("run", path, "-o", output, "--model", MODEL, "--json", "--on-complete", SHOW)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows_ok"] == 4  # and nothing else is on stdout
    told = json.loads(hook_file.read_text())
    assert (told["TRBATCH_OUTPUT"], told["TRBATCH_STATUS"]) == (str(output), "completed")


def test_run_collects_what_there_is_by_the_deadline_and_exits_with_6(
    tmp_path: Path, echo_worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHO_STEP_S", "0.4")
    path = write_rows(tmp_path / "in.jsonl", 400)
    result = invoke("run", path, "--model", MODEL, "--json", "--deadline", "6s")
    assert result.exit_code == 6, result.stderr
    receipt = json.loads(result.stdout)
    assert receipt["complete"]
    assert 0 < receipt["rows_ok"] < 400
    assert receipt["rows_expired"] == receipt["rows_failed"] == 400 - receipt["rows_ok"]


def test_run_of_a_paused_job_says_how_it_goes_on(tmp_path: Path, echo_worker: None) -> None:
    path = write_rows(tmp_path / "in.jsonl", 4)
    submit_named(path)
    invoke("pause", NAME)
    result = invoke("run", path, "--name", NAME, "--model", MODEL)
    assert result.exit_code == 4
    assert f"job {NAME} is paused" in result.stderr
    assert "trbatch continue" in result.stderr


def test_the_command_is_run_when_the_worker_of_run_ends_too_early(
    tmp_path: Path, hook_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "WORKER_COMMAND", (sys.executable, "-c", "raise SystemExit(9)"))
    path = write_rows(tmp_path / "in.jsonl", 4)
    assert invoke("run", path, "--model", MODEL, "--on-complete", SHOW).exit_code == 4
    told = json.loads(hook_file.read_text())
    assert (told["TRBATCH_EXIT_CODE"], told["TRBATCH_ROWS_OK"]) == ("4", "0")


def test_what_the_command_prints_goes_to_stderr(
    tmp_path: Path, hook_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = submit(tmp_path, 1)
    work()
    capfd.readouterr()
    invoke("wait", job.id, "--on-complete", SHOW)
    out, err = capfd.readouterr()
    assert (out, "hello from it" in err) == ("", True)
