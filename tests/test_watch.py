"""`trbatch watch` and what `status` says of workers: live on a terminal, lines elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from echo_worker import EchoEngine
from rich.console import Console
from waiting import wait_for

from trbatch import api, cli, watching
from trbatch.engine.sequence import Completion
from trbatch.errors import Unreachable
from trbatch.figures import Figures, Progress
from trbatch.job_status import JobStatus, from_now
from trbatch.queue import Counts
from trbatch.queue_control import ChunkLease
from trbatch.segments import Footer
from trbatch.team import Share, team_of
from trbatch.watching import exit_code, jobs_in, screen, watch, words
from workers import submit, work, working

ROOT = Path(__file__).parent.parent


class Slow(EchoEngine):
    """Rows that take as long as they say."""

    def __init__(self) -> None:
        super().__init__(step_s=0.2)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.commands, list(map(str, arguments)))


def share(**changes: Any) -> Share:
    values: dict[str, Any] = {
        "worker": "gpu-a", "state": "busy", "chunks": 2, "rows": 240, "rows_failed": 10,
        "completion_tokens": 5000, "tokens_per_s": 510.0, "mean_acceptance_length": 2.5,
        "speedup": 1.9, "last_rows_s": 2.0,
    }  # fmt: skip
    return Share(**(values | changes))


def status(**changes: Any) -> JobStatus:
    figures: dict[str, Any] = {
        "rows": 1000, "rows_ok": 240, "rows_failed": 10, "rows_cancelled": 0,
        "prompt_tokens": 0, "completion_tokens": 5000, "num_spec_steps": 2000,
        "mean_acceptance_length": 2.5, "draft_acceptance_rate": 0.3, "speedup": 1.8,
        "busy_s": 10.0, "tokens_per_s": 500.0, "seconds_left": 3725.0, "last_row_at": None,
        "rows_repetitive": 0,
    }  # fmt: skip
    values: dict[str, Any] = {
        "id": "nightly", "path": "/jobs/nightly", "state": "in_progress", "model": "org/model",
        "task": "task", "chunks": Counts(queued=1, started=1), "workers": 1, "failures": {},
        "team": [share()], "errors": {"empty_prompt": 10},
    }  # fmt: skip
    known = {name: changes.pop(name) for name in list(changes) if name in figures}
    return JobStatus(progress=Progress(**(figures | known)), **(values | changes))


def drawn(statuses: Sequence[JobStatus], trouble: str = "", width: int = 100) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None, record=True)
    with console.capture() as captured:
        console.print(screen(statuses, trouble, width))
    return captured.get().splitlines()


def test_a_job_and_its_workers_are_a_line_each() -> None:
    head, job, worker, note = drawn([status()])
    assert head.split() == ["job", "rows", "tokens/s", "accept", "speed-up", "left"]
    assert job.split() == [
        "nightly", "━" * 10, "25%", "250/1,000", "510", "2.50", "1.80x", "1:02:05", "h",
    ]  # fmt: skip
    assert worker.split() == ["gpu-a", "busy,", "2", "chunks", "240", "510", "2.50", "1.90x"]
    assert note.strip() == "nightly: failed rows: 10 empty_prompt"


def test_what_is_wrong_stands_below() -> None:
    lines = drawn(
        [status(team=[], workers=0, failures={3: "Boom: \x1b[31mred"}, errors={}, ahead=7)],
        "the queue is away",
    )
    text = "\n".join(lines)
    assert "nightly: no worker holds its model; start one with: trbatch worker" in text
    assert "nightly: failed chunk 3: Boom: \\x1b[31mred" in text
    assert "nightly: 7 chunks of more urgent jobs wait before it" in text
    assert "the queue is away; trying again" in text


def lease(worker: str = "gpu-a", running_s: float | None = 100.0) -> ChunkLease:
    return ChunkLease(chunk=1, worker=worker, attempt=1, running_s=running_s, left_s=12.0)


def test_a_silent_worker_is_shown_as_such_and_one_that_is_gone_is_not() -> None:
    team = [share(last_rows_s=90.0), share(worker="gpu-b", state="gone")]
    text = "\n".join(drawn([status(team=team, leases=[lease("gpu-c")])]))
    assert "silent 1:30 min" in text
    assert "gpu-b" not in text
    alive = "\n".join(drawn([status(team=team, leases=[lease("gpu-a")])]))
    assert "no row for 1:30 min" in alive and "silent" not in alive
    idle = "\n".join(drawn([status(team=[share(chunks=0, last_rows_s=90.0)])]))
    assert "1:30 min" not in idle, "it has nothing to be silent about"
    ended = status(state="completed", rows_ok=990, seconds_left=None, team=team)
    assert "gpu-b" in "\n".join(drawn([ended]))


@pytest.mark.parametrize("width", [80, 100, 200])
def test_it_fits_the_terminal(width: int) -> None:
    long = "translations-of-a-very-long-name-for-a-job-2026-11-22"
    lines = drawn([status(id=long, state="queued"), status(paused=True)], width=width)
    assert all(len(line.rstrip()) <= width for line in lines)
    assert any("queued" in line for line in lines)
    assert any("paused" in line for line in lines)
    assert any("1:02:05 h" in line for line in lines)


def test_rows_that_flatter_the_figures_are_told() -> None:
    found = status(rows_repetitive=12)
    assert "12 going round in circles, 500 tokens/s" in words(found)
    text = " ".join("\n".join(drawn([found])).split())
    assert "nightly: 12 rows go round in circles, which flatters accept and speed-up" in text
    assert "circles" not in "\n".join(drawn([status()])) + words(status())


def test_a_line_says_the_same() -> None:
    assert words(status()) == (
        "250/1,000 rows, 10 failed, 500 tokens/s, acceptance length 2.50, 1:02:05 h left, "
        "speed-up 1.80x, 1 worker"
    )
    assert words(status(state="cancelled", seconds_left=None)).startswith("cancelled, 250/1,000")


@pytest.mark.parametrize(
    ("state", "failed", "code"),
    [("completed", 0, 0), ("completed", 1, 3), ("failed", 0, 4), ("cancelled", 1, 5),
     ("expired", 9, 6)],
)  # fmt: skip
def test_it_exits_like_wait(state: str, failed: int, code: int) -> None:
    assert exit_code(status(state=state, rows_failed=failed)) == code


class Recorded:
    def __init__(self) -> None:
        self.shown: list[tuple[list[str], str]] = []
        self.ended: list[str] = []

    def show(self, statuses: Sequence[JobStatus], trouble: str) -> None:
        self.shown.append(([one.state for one in statuses], trouble))

    def last(self, statuses: Sequence[JobStatus]) -> None:
        self.ended = [one.state for one in statuses]


class Scripted:
    """A job that is in one state after the other; an error is raised."""

    def __init__(self, path: str, states: Iterable[JobStatus | Unreachable]) -> None:
        self.path = path
        self._states = iter(states)

    def status(self) -> JobStatus:
        found = next(self._states)
        if isinstance(found, Unreachable):
            raise found
        return found


def test_it_waits_for_all_jobs_and_outlives_a_queue_that_is_away() -> None:
    away = Unreachable("the queue is away")
    done = status(state="completed", rows_failed=0)
    jobs: Any = [
        Scripted("a", [status(), away, done]),
        Scripted("b", [status(), status(), status(), status(state="cancelled")]),
    ]
    view = Recorded()
    assert watch(jobs, view, look_s=0.0) == 5, "of the one that ended worst"
    assert view.shown == [
        (["in_progress", "in_progress"], ""),
        (["in_progress", "in_progress"], "the queue is away"),
        (["completed", "in_progress"], ""),
    ]
    assert view.ended == ["completed", "cancelled"]


class OneLongRow(EchoEngine):
    """Ends every row at once but the prompt `long`, which goes on until it is let."""

    def __init__(self) -> None:
        super().__init__(step_s=0.02)
        self.end = threading.Event()

    def step(self) -> list[Completion]:
        long = [one for one in self._requests if one.prompt == "long" and not self.end.is_set()]
        self._requests = deque(one for one in self._requests if one not in long)
        done = super().step()
        self._requests.extend(long)
        return done


def test_one_long_row_makes_a_job_overdue_and_not_nearly_done(home: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "say x"} for _ in range(5)] + [{"prompt": "long"}]
    job = submit(tmp_path, rows, chunk_size=6)
    engine = OneLongRow()
    with working(engine, model="org/echo"):
        wait_for(lambda: job.status().progress.rows_done == 5)
        wait_for(lambda: job.status().overdue)
        found = job.status()
        assert (found.state, found.progress.seconds_left) == ("in_progress", None)
        assert "overdue: rows take longer than those before" in words(found)
        assert "left" not in words(found)
        assert drawn([found])[1].split()[-1] == "overdue"
        (line,) = [one for one in invoke("status").stdout.splitlines() if one.startswith("job ")][
            1:
        ]
        assert line.split()[-1] == "overdue"
        engine.end.set()
        wait_for(lambda: job.status().finished)
    assert not job.status().overdue


@pytest.mark.parametrize(
    ("running", "left"),
    [([None], 7.0), ([2.0, 100.0], 7.0), ([3.0], 37.0), ([], 40.0), ([39.0], 1.0)],
)
def test_an_estimate_runs_down_only_while_somebody_decodes(
    running: list[float | None], left: float
) -> None:
    progress = status(seconds_left=40.0, last_row_at=1000.0).progress
    leases = [lease(running_s=one) for one in running]
    now = 1033.0 if left != 1.0 else 2000.0  # long after the last row, and not long after the lease
    assert from_now(progress, leases, now).seconds_left == pytest.approx(left)


def test_an_estimate_that_has_passed_is_none_and_one_of_no_row_stays() -> None:
    progress = status(seconds_left=40.0, last_row_at=1000.0).progress
    assert from_now(progress, [lease(running_s=None)], 1040.0).seconds_left is None
    assert from_now(progress, [lease(running_s=None)], 990.0).seconds_left == 40.0, "a clock ahead"
    for nothing in (status(seconds_left=None, last_row_at=None), status(last_row_at=None)):
        assert from_now(nothing.progress, [lease()], 5000.0) == nothing.progress


def test_a_job_has_failed_when_it_was_seen_so_twice() -> None:
    failed, done = status(state="failed"), status(state="completed", rows_failed=0)
    taken_up: Any = Scripted("a", [failed, status(), done])
    assert watch([taken_up], Recorded(), look_s=0.0) == 0
    given_up: Any = Scripted("a", [status(), failed, failed])
    assert watch([given_up], Recorded(), look_s=0.0) == 4


def test_lines_come_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.0, 10.0, 31.0, 31.0, 32.0])
    lines = watching._Lines(30.0, now=lambda: next(clock))
    for done in range(4):
        lines.show([status(rows_ok=done)], "")
    lines.last([status(rows_ok=990, state="completed", seconds_left=None)])
    shown = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert [line.split(" rows")[0] for line in shown] == [
        "nightly: 10/1,000", "nightly: 12/1,000", "nightly: completed, 1,000/1,000",
    ]  # fmt: skip


def test_watching_a_real_job_in_lines_and_in_json(home: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, [{"prompt": f"say {i}"} for i in range(15)] + [{"prompt": "refuse"}])
    with working(Slow(), model="org/echo"):
        done = invoke("watch", job.id, "--json", "--every", "0.1")
    assert done.exit_code == 3
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["id"] for line in lines} == {"job"}
    assert lines[-1]["state"] == "completed"
    assert lines[-1]["progress"]["rows_done"] == 16
    assert [one["rows"] for one in lines[-1]["team"]] == [16]
    assert all(before["time"] <= after["time"] for before, after in itertools.pairwise(lines))
    done = invoke("watch", job.id)
    assert done.exit_code == 3
    (line,) = done.stdout.splitlines()
    assert "job: completed, 16/16 rows, 1 failed" in line


def test_on_a_terminal_it_is_live_and_ends_with_the_jobs(home: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, rows=24)
    mine, theirs = pty.openpty()
    os.set_blocking(mine, False)
    shown = b""
    command = [sys.executable, "-m", "trbatch", "watch"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, env=environment)
    os.close(theirs)
    wait_for(lambda: select.select([mine], [], [], 0)[0])
    with working(Slow(), model="org/echo"):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                piece = os.read(mine, 65536)
            except BlockingIOError:
                time.sleep(0.02)
                continue
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    assert process.wait(10) == 0
    os.close(mine)
    text = shown.decode()
    assert "\x1b[" in text and "━" in text
    assert job.id in text and "100%" in text and "completed" in text


def test_without_a_job_it_shows_those_that_have_not_ended(home: Path, tmp_path: Path) -> None:
    assert "no job is unfinished" in invoke("watch").stderr
    submit(tmp_path, name="old", rows=3)
    work()
    new = submit(tmp_path, name="new", rows=3)
    (home / "jobs" / "no-job").mkdir()
    (home / "jobs" / "damaged").mkdir()
    (home / "jobs" / "damaged" / "manifest.json").write_text("{}")
    assert [job.id for job in jobs_in("", "", unfinished=True)] == ["new"]
    assert [job.id for job in jobs_in("", "", unfinished=False)] == ["new", "old"]
    assert len(jobs_in("", "", unfinished=False, most=1)) == 1
    new.cancel()
    assert jobs_in("", "", unfinished=True) == []


def test_status_lists_jobs_and_workers(home: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, rows=4)
    work(name="gpu-7")
    shown = invoke("status").stdout
    assert "job" in shown and "completed  4/4" in shown
    shown = invoke("status", job.id).stdout
    assert "speed-up" in shown and "2.00x over plain decoding" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("gpu-7")]
    assert "ago" in line
    values = json.loads(invoke("status", "--json").stdout)
    assert [one["id"] for one in values["jobs"]] == [job.id]
    (one,) = values["jobs"][0]["team"]
    assert (one["rows"], one["state"]) == (4, "")


def test_a_store_that_is_away_does_not_hide_the_queue(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> list[api.Job]:
        raise Unreachable("the bucket is away")

    monkeypatch.setattr(cli, "jobs_in", away)
    done = invoke("status")
    assert done.exit_code == 0
    assert "nothing was ever queued" in done.stdout
    assert "the bucket is away" in done.stderr


def test_a_team_is_everyone_who_decoded_or_could() -> None:
    def footer(worker: str, end: float, tokens: int) -> Footer:
        return Footer(Figures(rows_ok=1, completion_tokens=tokens), (end - 50, end), worker, 50.0)

    @dataclasses.dataclass
    class Live:
        name: str
        state: str = "busy"
        chunks: int = 3

    footers = [
        footer("a", 50, 1000),
        footer("b", 60, 10),
        footer("a", 100, 100),
        footer("a", 150, 50),
    ]
    team = {one.worker: one for one in team_of(footers, [Live("a"), Live("c")], now=170.0)}
    assert [(name, one.state, one.rows) for name, one in team.items()] == [
        ("a", "busy", 3), ("b", "gone", 1), ("c", "busy", 0),
    ]  # fmt: skip
    assert team["a"].tokens_per_s == pytest.approx(150 / 100), "of late, not at the begin"
    assert (team["a"].last_rows_s, team["c"].last_rows_s) == (20.0, None)
    assert {one.state for one in team_of(footers, None)} == {""}
