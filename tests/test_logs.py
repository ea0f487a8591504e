"""Logs for people and for programs, without secrets in either."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trbatch import cli, logs
from trbatch.config import JobSpec, WorkerConfig
from trbatch.job_handle import Job
from trbatch.logs import JsonLines, TextLines, log_to_stderr, note
from trbatch.masking import mask_text, printable

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Handlers, levels and the chosen form are put back."""
    loggers = [logging.getLogger(name) for name in logs.LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    log_to_stderr("WARNING", "text")
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def write_prompts(tmp_path: Path) -> str:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "say hello"}\n{"prompt": "refuse"}\n')
    return str(file)


def echo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command with an engine that echoes, as a process."""
    return subprocess.run(
        [sys.executable, str(TESTS / "echo_worker.py"), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_a_worker_writes_one_json_object_a_line(home: Path, tmp_path: Path) -> None:
    arguments = ["--name", "j", "--model", "maker/echo", "--log-format", "json"]
    submitted = echo("submit", write_prompts(tmp_path), *arguments)
    assert submitted.stdout == "j\n"
    (event,) = lines(submitted.stderr)
    assert (event["event"], event["job"], event["rows"]) == ("submitted", "j", 2)
    done = echo("worker", "--burst", "--model", "maker/echo", "--log-format", "json")
    assert done.returncode == 0
    events = {event.get("event"): event for event in lines(done.stderr)}
    assert {"model_ready", "chunk_done", "worker_ended"} <= events.keys()
    chunk = events["chunk_done"]
    assert (chunk["chunk"], chunk["rows"], chunk["failed"], chunk["attempt"]) == (0, 2, 1, 1)
    assert chunk["folder"].endswith("/j")
    for event in events.values():
        assert {"time", "level", "logger", "message"} <= event.keys()
        assert datetime.fromisoformat(event["time"]).tzinfo is not None


def test_run_writes_its_own_events_and_its_workers_as_they_are(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = (sys.executable, str(TESTS / "echo_worker.py"), "worker")
    monkeypatch.setattr("trbatch.local.WORKER_COMMAND", command)
    arguments = ["run", write_prompts(tmp_path), "--model", "maker/echo", "--log-format", "json"]
    with pytest.raises(SystemExit) as ended:
        cli.commands([*arguments, "-o", str(tmp_path / "out.parquet"), "--json"])
    assert ended.value.code == 3
    out, err = capfd.readouterr()
    assert json.loads(out)["rows_ok"] == 1
    events = lines(err)
    names = [event.get("event") for event in events]
    assert names[0] == "submitted"
    assert "model_ready" in names
    last = next(event for event in reversed(events) if event.get("event") == "progress")
    assert (last["state"], last["rows_ok"], last["rows_failed"]) == ("completed", 1, 1)


def test_the_end_of_the_command_of_on_complete_is_an_event_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = (sys.executable, str(TESTS / "echo_worker.py"), "worker")
    monkeypatch.setattr("trbatch.local.WORKER_COMMAND", command)
    file = tmp_path / "good.jsonl"
    file.write_text('{"prompt": "say hello"}\n')
    arguments = ["run", str(file), "--model", "maker/echo", "--log-format", "json"]
    arguments += ["-o", str(tmp_path / "out.parquet"), "--on-complete", "exit 9"]
    with pytest.raises(SystemExit) as ended:
        cli.commands(arguments)
    assert ended.value.code == 9
    last = lines(capfd.readouterr().err)[-1]
    assert last["exit_code"] == 9
    assert "--on-complete ended with exit code 9" in last["message"]


def test_a_stop_at_the_keyboard_is_an_event_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trbatch.api.submit", stop)
    arguments = ["submit", write_prompts(tmp_path), "--log-format", "json"]
    done = CliRunner().invoke(cli.commands, arguments)
    assert done.exit_code == 130
    assert [event["exit_code"] for event in lines(done.stderr)] == [130]


def test_an_error_is_an_event_too(home: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.jsonl")
    done = CliRunner().invoke(cli.commands, ["submit", missing, "--log-format", "json"])
    assert done.exit_code == 2
    (event,) = lines(done.stderr)
    assert (event["event"], event["level"], event["exit_code"]) == ("error", "error", 2)
    assert "no such file" in event["message"]


def test_people_get_text_unless_they_ask(home: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.commands, ["submit", str(tmp_path / "missing.jsonl")])
    assert done.stderr.startswith("error: ")


SECRET = "hunter2"
TEXTS = [
    f"cannot reach redis://me:{SECRET}@host:6379/0 now",
    f"'rediss://:{SECRET}@host' and s3://key:{SECRET}@bucket/x.",
    f"redis://host/0?password={SECRET}&db=1 failed",
    f"redis://host/0?db=1&ssl_password={SECRET}",
    f"http://store/?token={SECRET}",
    f"redis://me:p@{SECRET}@host:6379/0",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_no_password_gets_into_a_log(text: str, formatter: logging.Formatter) -> None:
    assert SECRET not in mask_text(text)
    record = logging.makeLogRecord({"name": "trbatch", "msg": "%s", "args": (text,)})
    assert SECRET not in formatter.format(record)
    try:
        raise ConnectionError(text)
    except ConnectionError:
        record.exc_info = sys.exc_info()
    shown = formatter.format(record)
    assert "ConnectionError" in shown
    assert SECRET not in shown.replace(f'ConnectionError("{text}")', "")


@pytest.mark.parametrize("text", TEXTS)
def test_no_password_gets_into_any_field_of_an_event(text: str) -> None:
    fields = {"folder": text, "hint": [text, {"deep": (text,)}], "error": OSError(text), "n": 3}
    record = logging.makeLogRecord({"name": "trbatch", "msg": "x", "event": "e", **fields})
    shown = JsonLines().format(record)
    assert SECRET not in shown
    assert (json.loads(shown)["event"], json.loads(shown)["n"]) == ("e", 3)


def test_what_json_cannot_hold_is_written_all_the_same() -> None:
    record = logging.makeLogRecord({"msg": "lone \ud800", "rows": 2**70, "by": {3: "c"}})
    shown = json.loads(JsonLines().format(record))
    assert (shown["message"], shown["rows"], shown["by"]) == ("lone \ud800", 2**70, {"3": "c"})


def test_no_password_gets_into_a_repr_or_into_what_commands_print(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"memory://me:{SECRET}@host/jobs"
    settings = {"redis_url": f"redis://me:{SECRET}@host", "model": "m"}
    reprs = [repr(WorkerConfig(**settings)), repr(JobSpec(input=store, out=store))]
    assert "redis://me:***@host" in reprs[0]
    file = write_prompts(tmp_path)
    words = ["--model", "maker/echo", "--store", store]
    printed = []
    for command in (
        ["submit", file, "--name", "a", *words],
        ["submit", file, "--name", "b", *words, "--json"],
        ["submit", file, "--name", "c", *words, "--log-format", "json"],
        ["status", "a", "--store", store],
        ["status", "a", "--store", store, "--json"],
        ["status", "--store", store],
        ["status", "--store", store, "--json"],
        ["retry", "a", "--failed", "--store", store, "--json"],
        ["resume", "a", "--store", store, "--json"],
        ["status", "missing", "--store", store],
    ):
        done = CliRunner().invoke(cli.commands, command)
        assert done.exit_code == (2 if "missing" in command else 0), done.output
        printed.append(done.output)
    job = Job.open("a", store=store)
    assert repr(job) == "Job('memory://me:***@host/jobs/a')"
    everything = "\n".join([*reprs, *printed, repr(job), repr(job.status())])
    assert "memory://me:***@host/jobs/a" in printed[0]
    assert SECRET not in everything


@pytest.mark.parametrize("text", ["plain", "a@b.example", "s3://bucket/key", "3 @ 4", ""])
def test_what_holds_no_password_stays(text: str) -> None:
    assert mask_text(text) == text


def test_a_terminal_gets_letters_and_no_orders() -> None:
    record = logging.makeLogRecord({"msg": "name \x1b[2Jé\x07\r end\nnext\tline"})
    assert TextLines().format(record) == "name \\x1b[2Jé\\x07\\r end\nnext    line"
    assert printable("ü – ✓\n") == "ü – ✓\\n"


def test_fields_that_json_does_not_know_are_texts() -> None:
    record = logging.makeLogRecord({"msg": "x", "where": Path("/a"), "error": ValueError("no")})
    shown = json.loads(JsonLines().format(record))
    assert (shown["where"], shown["error"]) == ("/a", "no")


def test_a_note_is_a_line_or_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    note("hello", job="j")
    assert capsys.readouterr().err == "hello\n"
    log_to_stderr("WARNING", "json")
    note("hello", job="j")
    (event,) = lines(capsys.readouterr().err)
    assert (event["event"], event["message"], event["job"]) == ("note", "hello", "j")
