"""The command line: what goes to stdout and to stderr, exit codes, options, the worker child."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
from child import Child
from click.testing import CliRunner, Result
from rich.console import Console
from supervised import alive

from trbatch import api, cli, cli_configs, local
from trbatch.cli_output import print_table
from trbatch.config import EngineConfig, JobSpec, SamplingParams, WorkerConfig
from trbatch.errors import TrbatchError, Unreachable, UsageError
from trbatch.figures import Progress
from trbatch.progress import describe, duration, reporter
from trbatch.queue import Counts

ECHO = str(Path(__file__).with_name("echo_worker.py"))


@pytest.fixture
def echo_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """`trbatch run` starts workers whose engine echoes."""
    monkeypatch.setattr(local, "WORKER_COMMAND", (sys.executable, ECHO, "worker"))
    root = str(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", root)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path, [{"id": f"r{i}", "prompt": f"say {i}"} for i in range(6)])


def write_rows(folder: Path, rows: list[Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])


def every_command(
    group: click.Group = cli.commands, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(every_command())


def parsed(command: click.Command, arguments: list[str]) -> dict[str, Any]:
    """The settings that a command makes of its arguments, below the program as in real life."""
    above = click.Context(cli.commands, **cli.commands.context_settings)
    return command.make_context(str(command.name), list(arguments), parent=above).params


def test_the_commands_are_those_of_the_design() -> None:
    names = {" ".join(path) for path in COMMANDS if path}
    plain = "run submit worker status wait collect resume".split()
    plain += "cancel pause continue retry prune watch report completion".split()
    grouped = ["server", *(f"server {verb}" for verb in ("start", "stop", "status"))]
    grouped += ["bench", "bench acceptance", "bench speed", "matrix"]
    grouped += [f"matrix {verb}" for verb in ("list", "show", "export", "import", "reset")]
    assert names == {*plain, *grouped}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_help_ends_in_an_example_that_the_command_line_understands(
    path: tuple[str, ...], flag: str
) -> None:
    result = invoke(*path, flag)
    assert result.exit_code == 0
    lines = result.stdout.rstrip().splitlines()
    assert lines[-2].strip() == "Example:"
    example = lines[-1].split()
    assert example[: 1 + len(path)] == ["trbatch", *path]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_example_parses(path: tuple[str, ...], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").touch()
    (tmp_path / "prompts.jsonl").touch()
    (tmp_path / "m.safetensors").touch()
    words = (COMMANDS[path].epilog or "").split("trbatch ")[-1].partition(">")[0].split()
    command: click.Command = cli.commands
    context = None
    while isinstance(command, click.Group):
        context = click.Context(command, parent=context, **command.context_settings)
        name, *words = words
        command = command.commands[name]
    assert command.make_context(str(command.name), list(words), parent=context)


def test_every_command_that_prints_data_has_json() -> None:
    without = {
        " ".join(path)
        for path, command in COMMANDS.items()
        if not isinstance(command, click.Group)
        and "as_json" not in {parameter.name for parameter in command.params}
    }
    # What they print is a file, a script or a sentence; a worker prints nothing.
    silent = {"worker", "completion"}
    assert without == {*silent, "matrix export", "matrix import", "matrix reset"}


@pytest.mark.parametrize("config", [SamplingParams, JobSpec, EngineConfig, WorkerConfig])
def test_defaults_on_the_command_line_are_those_of_the_config_classes(config: type) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    checked = 0
    for path, command in COMMANDS.items():
        for option in command.params:
            # A benchmark has sizes of its own, a job's name is not a worker's; a matrix is a file.
            if (
                path[:1] in (("bench",), ("matrix",))
                or option.name not in defaults
                or option.name == "name"
                or defaults[option.name] is dataclasses.MISSING
            ):
                continue
            if isinstance(option, click.Argument):
                continue
            assert option.default == defaults[option.name], (path, option.name)
            checked += 1
    assert checked > 3


def test_worker_options_make_the_config_that_they_name() -> None:
    arguments = "--device cuda:1 --dtype float16 --model m --burst --root /a --root /b"
    arguments += " --no-speculate --grace 5 --until 07:00"
    config = cli_configs.worker_config(parsed(cli.worker_command, arguments.split()))
    assert config == WorkerConfig(
        model="m",
        burst=True,
        roots=("/a", "/b"),
        grace_s=5.0,
        until="07:00",
        engine=EngineConfig(device="cuda:1", dtype="float16", speculate=False),
    )


def test_job_options_make_the_spec_that_they_name() -> None:
    arguments = "in.jsonl --stop A --stop B --stop-token-id 3 --top-k 5 --seed 4 --task t --cold"
    spec = cli_configs.job_spec("in.jsonl", parsed(cli.submit_command, arguments.split()))
    assert spec == JobSpec(
        input="in.jsonl",
        seed=4,
        task="t",
        cold=True,
        sampling=SamplingParams(stop=("A", "B"), stop_token_ids=(3,), top_k=5),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": "-odd name", "burst": True, "speculate": False, "dtype": "bfloat16"},
        {"roots": ("/a b", "s3://c"), "gpu_memory_utilization": 0.5, "tree_size": 4},
    ],
)
def test_a_workers_settings_survive_the_way_through_its_arguments(
    settings: dict[str, Any],
) -> None:
    arguments = cli_configs.arguments_for(cli.worker_command, settings)
    defaults = parsed(cli.worker_command, [])
    assert parsed(cli.worker_command, arguments) == defaults | settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "p.jsonl", "--top-p", "2"], "--top-p must"),
        (["worker", "--gpu", "0", "--device", "cpu"], "contradict"),
        (["worker", "--gpu", "-1"], "--gpu"),
        (["worker", "--gpu", "0,x"], "--gpu"),
        (["worker", "--gpu", "1,1"], "twice"),
        (["worker", "--until", "seven"], "07:00"),
        (["worker", "--until", "25:00"], "07:00"),
        (["worker", "--grace", "-1"], "grace"),
        (["submit", "missing.jsonl"], "missing.jsonl"),
        (["collect", "no-such-job"], "no-such-job"),
        (["status", "x", "--nonsense"], "--nonsense"),
    ],
)
def test_mistakes_of_the_user_end_with_2_and_a_message_on_stderr(
    home: Path, arguments: list[str], message: str
) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("output", "format"), [("x.csv", "parquet"), ("x.jsonl", "parquet"), ("x.parquet", "jsonl")]
)
def test_run_refuses_an_output_that_would_mislead_before_it_decodes_anything(
    home: Path, prompts: Path, output: str, format: str
) -> None:
    result = invoke("run", prompts, "--model", "org/echo", "-o", output, "--format", format)
    assert (result.exit_code, result.stdout) == (2, "")
    assert output in result.stderr
    assert "hint:" in result.stderr
    assert not (home / "jobs").exists()


@pytest.mark.parametrize(
    ("raised", "code"),
    [(UsageError("bad", hint="cure"), 2), (Unreachable("away"), 75), (TrbatchError("bug"), 1)],
)
def test_an_error_becomes_message_hint_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, raised: TrbatchError, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(api, "status", fail)
    result = invoke("status", "some-job")
    hint = f"hint: {raised.hint}\n" if raised.hint else ""
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"error: {raised.message}\n{hint}"


def test_an_unreachable_redis_ends_with_75_and_hides_the_password(
    home: Path, prompts: Path
) -> None:
    url = "redis://user:secret@127.0.0.1:1/0"
    result = invoke("submit", prompts, "--model", "org/echo", "--redis-url", url)
    assert result.exit_code == Unreachable.exit_code
    assert "secret" not in result.stderr
    assert "127.0.0.1" in result.stderr


def test_submit_prints_the_job_id_alone_on_stdout(home: Path, prompts: Path) -> None:
    result = invoke("submit", prompts, "--model", "org/echo", "--name", "my-job")
    assert (result.exit_code, result.stdout) == (0, "my-job\n")
    assert "6 rows" in result.stderr
    assert "task" in result.stderr


def test_two_terminals_meet_in_the_embedded_server(
    home: Path, prompts: Path, tmp_path: Path, echo_worker: None
) -> None:
    job = invoke("submit", prompts, "--model", "org/echo").stdout.strip()
    status = json.loads(invoke("status", job, "--json").stdout)
    assert (status["state"], status["chunks"]["queued"]) == ("queued", 1)
    queue = json.loads(invoke("status", "--json").stdout)
    assert [(q["model"]["name"], q["queued"]) for q in queue["queues"]] == [("org/echo", 1)]
    subprocess.run([*local.WORKER_COMMAND, "--burst"], check=True, capture_output=True, timeout=60)
    assert invoke("wait", job, "--timeout", "5").exit_code == 0
    output = tmp_path / "out.parquet"
    result = invoke("collect", job, "-o", output, "--json")
    receipt = json.loads(result.stdout)
    assert (result.exit_code, receipt["rows_ok"], receipt["complete"]) == (0, 6, True)
    assert pq.read_table(output)["text"].to_pylist() == [f"SAY {i}" for i in range(6)]


def test_waiting_too_long_ends_with_6(home: Path, prompts: Path) -> None:
    job = invoke("submit", prompts, "--model", "org/echo").stdout.strip()
    result = invoke("wait", job, "--timeout", "0.1")
    assert (result.exit_code, result.stdout) == (6, "")


def test_run_prints_the_summary_on_stdout_and_exits_3_when_rows_failed(
    home: Path, tmp_path: Path, echo_worker: None
) -> None:
    rows = [{"prompt": "say one"}, {"prompt": "refuse"}, {"neither": 1}]
    output = tmp_path / "out.parquet"
    result = invoke("run", write_rows(tmp_path, rows), "-o", output, "--model", "org/echo")
    assert result.exit_code == 3
    table = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines())
    assert table["rows"] == "1 ok, 2 failed"
    assert table["dataset"] == str(output)
    assert table["measured speed-up"].startswith("2.00x")
    assert {"tokens", "tokens/s", "mean acceptance length", "receipt"} <= set(table)
    assert pq.read_table(output)["error_code"].to_pylist() == [None, "refused", "missing_prompt"]


def test_run_again_collects_without_a_worker(
    home: Path, prompts: Path, echo_worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("run", prompts, "--model", "org/echo").exit_code == 0
    monkeypatch.setattr(local, "WORKER_COMMAND", ("/nowhere",))
    result = invoke("run", prompts, "--model", "org/echo", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["figures"]["rows_ok"] == 6


def test_run_with_a_row_that_kills_its_worker_ends_with_all_others(
    home: Path, tmp_path: Path, echo_worker: None
) -> None:
    rows = write_rows(tmp_path, [{"prompt": "say 1"}, {"prompt": "die"}, {"prompt": "say 2"}])
    output = tmp_path / "out.parquet"
    result = invoke("run", rows, "--model", "org/echo", "-o", output)
    assert result.exit_code == 3
    table = pq.read_table(output)
    assert table["text"].to_pylist() == ["SAY 1", None, "SAY 2"]
    assert table["error_code"].to_pylist() == [None, "poison", None]
    assert "exit code 9" in result.stderr


@pytest.mark.long
def test_run_with_a_worker_that_never_stands_ends_with_4_and_says_so(
    home: Path, prompts: Path, echo_worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHO_LOADING", "die")
    result = invoke("run", prompts, "--model", "org/echo")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "worker ended with exit code 4" in result.stderr
    assert "5 times" in result.stderr
    assert "hint:" in result.stderr


@contextlib.contextmanager
def running(prompts: Path) -> Iterator[subprocess.Popen[str]]:
    """`trbatch run` in a process of its own, with a chunk in flight."""
    start = (
        f"import sys; from trbatch import cli, local;"
        f"local.WORKER_COMMAND = (sys.executable, {ECHO!r}, 'worker'); cli.main()"
    )
    command = [sys.executable, "-c", start, "run", str(prompts), "--model", "org/echo"]
    slow = os.environ | {"ECHO_STEP_S": "1.0"}
    with Child(command, env=slow, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "is ready" in line:
                break
        time.sleep(0.5)  # a chunk is in flight now
        yield process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_run_and_its_worker_and_the_same_command_goes_on(
    home: Path, prompts: Path, echo_worker: None, number: int, code: int
) -> None:
    with running(prompts) as process:
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == code
    queue = json.loads(invoke("status", "--json").stdout)
    assert queue["workers"] == []
    again = invoke("run", prompts, "--model", "org/echo", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["rows_ok"] == 6


def test_a_run_that_is_killed_leaves_no_worker_behind(
    home: Path, prompts: Path, echo_worker: None
) -> None:
    with running(prompts) as process:
        (worker,) = children(process.pid)
        (child,) = children(worker)
        process.kill()
        begin = time.monotonic()
        while alive(worker) or alive(child):
            assert time.monotonic() - begin < 15, "it goes on for nobody"
            time.sleep(0.1)
    queue = json.loads(invoke("status", "--json").stdout)
    assert queue["workers"] == []
    assert [(q["queued"], q["started"]) for q in queue["queues"]] == [(1, 0)], "handed back"


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_server_starts_tells_and_stops(home: Path) -> None:
    assert json.loads(invoke("server", "status", "--json").stdout)["running"] is False
    assert "running" in invoke("server", "start").stdout
    assert json.loads(invoke("server", "status", "--json").stdout)["running"] is True
    assert invoke("server", "stop").stdout == "stopped\n"
    assert invoke("server", "stop").stdout == "was not running\n"


def test_bench_batches_must_be_whole_numbers(prompts: Path) -> None:
    result = invoke("bench", "speed", "--prompts", prompts, "--batch", "1,many")
    assert result.exit_code == 2
    assert "--batch" in result.stderr


def test_a_benchmark_table_shows_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"mean": 2.5, "runs": [{"batch": 1, "ratio": 1.25}, {"batch": 8, "ratio": None}]}
    print_table(values, as_json=False)
    words = capsys.readouterr().out.split()
    assert words == ["mean", "2.500", "runs", "batch", "ratio", "1", "1.250", "8", "-"]
    print_table(values, as_json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == values


def job_status(**changes: Any) -> api.JobStatus:
    figures: dict[str, Any] = {
        "rows": 1000, "rows_ok": 240, "rows_failed": 10, "rows_cancelled": 0,
        "prompt_tokens": 0, "completion_tokens": 5000, "num_spec_steps": 2000,
        "mean_acceptance_length": 2.5, "draft_acceptance_rate": 0.3, "speedup": 1.2,
        "busy_s": 10.0, "tokens_per_s": 500.0, "seconds_left": 3725.0,
    }  # fmt: skip
    values: dict[str, Any] = {
        "id": "job", "path": "/jobs/job", "state": "in_progress", "model": "org/model",
        "task": "task", "chunks": Counts(queued=1, started=1), "workers": 1, "failures": {},
    }  # fmt: skip
    known = {name: changes.pop(name) for name in list(changes) if name in figures}
    return api.JobStatus(progress=Progress(**(figures | known)), **(values | changes))


def test_progress_tells_rows_rate_acceptance_and_time_left() -> None:
    assert describe(job_status()) == (
        "250/1,000 rows, 10 failed, 500 tokens/s, acceptance length 2.50, 1:02:05 h left"
    )
    assert "no worker holds org/model yet" in describe(job_status(workers=0))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3:05 min"), (7384, "2:03:04 h")]
)
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_progress_is_a_line_now_and_then_and_one_at_the_end() -> None:
    out = io.StringIO()
    with reporter(Console(file=out, width=200)) as show:
        for done in range(5):
            show.update(job_status(rows_ok=done))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["10/1,000", "14/1,000"]
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_progress_is_one_live_line_and_log_lines_stay_above_it() -> None:
    out = io.StringIO()
    with reporter(Console(file=out, width=120, force_terminal=True, color_system=None)) as show:
        show.update(job_status())
        show.log("a worker's [line]")
    assert "250/1,000 rows" in out.getvalue()
    assert "a worker's [line]" in out.getvalue()
