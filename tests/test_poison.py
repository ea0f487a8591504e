"""A row that takes its worker down: found, told, and nobody else's loss."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervised import Supervised, rows_of, submit, supervised
from waiting import wait_for

from trbatch.job import JobFolder
from trbatch.queue import JobQueue
from trbatch.results import collect


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    with JobQueue.connect(redis_url) as found:
        yield found


def prompts(count: int, bad: dict[int, str]) -> list[str]:
    return [bad.get(i, f"say {i}") for i in range(count)]


def assert_poisoned(job: JobFolder, count: int, bad: dict[int, str]) -> dict[int, dict[str, Any]]:
    """Every row once: the bad ones poison, all others done. Returns the bad ones."""
    found = {row["prompt_index"]: row for row in rows_of(job)}
    assert len(found) == len(rows_of(job)) == count
    good = {place: row["text"] for place, row in found.items() if place not in bad}
    assert good == {i: f"SAY {i}" for i in range(count) if i not in bad}
    assert all(found[place]["error_code"] == "poison" for place in bad)
    return {place: found[place] for place in bad}


def test_one_row_that_kills_its_worker_is_poison_and_the_others_are_done(
    jobs: JobQueue, tmp_path: Path
) -> None:
    bad = {37: "die11"}
    job = submit(jobs, tmp_path, prompts(64, bad), chunk_size=64)
    loads = tmp_path / "loads"
    env = {"ECHO_LOADS": str(loads)}
    with supervised(jobs.url, tmp_path / "log", "--burst", env=env) as worker:
        assert worker.wait(120) == 0
    (row,) = assert_poisoned(job, 64, bad).values()
    assert row["error_message"].startswith(f"{job.manifest.input.path}:38: decoding this row alone")
    assert "SIGSEGV" in row["error_message"]
    assert (row["finish_reason"], row["text"]) == ("error", None)
    restarts = len(loads.read_text().splitlines()) - 1
    assert restarts <= math.log2(64) + 4
    receipt = collect(job, str(tmp_path / "out.parquet"))
    assert receipt.complete and (receipt.rows_ok, receipt.rows_failed) == (63, 1)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["die", "raise"])
def test_a_death_by_exit_code_or_by_an_exception_of_the_engine_counts_as_well(
    jobs: JobQueue, tmp_path: Path, kind: str
) -> None:
    bad = {3: kind}
    job = submit(jobs, tmp_path, prompts(8, bad))
    with supervised(jobs.url, tmp_path / "log", "--burst") as worker:
        assert worker.wait(120) == 0
    (row,) = assert_poisoned(job, 8, bad).values()
    assert ("device on fire" if kind == "raise" else "exit code 9") in row["error_message"]


def test_a_row_at_which_the_engine_hangs_is_poison_too(jobs: JobQueue, tmp_path: Path) -> None:
    bad = {2: "hang"}
    job = submit(jobs, tmp_path, prompts(4, bad))
    env = {"ECHO_HUNG_S": "1"}
    with supervised(jobs.url, tmp_path / "log", "--burst", env=env) as worker:
        assert worker.wait(120) == 0
        assert "no sign of life" in worker.words
    (row,) = assert_poisoned(job, 4, bad).values()
    assert "its engine hung" in row["error_message"]


@pytest.mark.long
def test_other_chunks_are_done_and_in_no_quarantine(jobs: JobQueue, tmp_path: Path) -> None:
    """Two bad rows in two chunks of five; another job beside them."""
    bad = {9: "die6", 30: "die"}
    job = submit(jobs, tmp_path, prompts(40, bad), name="bad")
    other = submit(jobs, tmp_path, prompts(40, {}), name="other")
    with supervised(jobs.url, tmp_path / "log", "--burst") as worker:
        assert worker.wait(180) == 0
    assert_poisoned(job, 40, bad)
    assert_poisoned(other, 40, {})


@pytest.mark.long
def test_several_workers_find_a_bad_row_in_no_more_restarts_than_one(
    jobs: JobQueue, tmp_path: Path
) -> None:
    """Who takes the suspects first lets its other chunks come to their end."""
    bad = {20: "die"}
    job = submit(jobs, tmp_path, prompts(32, bad), chunk_size=32, name="bad")
    other = submit(jobs, tmp_path, prompts(240, {}), name="other")
    loads = tmp_path / "loads"
    env = {"ECHO_LOADS": str(loads), "ECHO_STEP_S": "0.05"}
    with (
        supervised(jobs.url, tmp_path / "one", "--burst", env=env) as one,
        supervised(jobs.url, tmp_path / "two", "--burst", env=env) as two,
    ):
        assert one.wait(120) == two.wait(120) == 0
    assert_poisoned(job, 32, bad)
    assert_poisoned(other, 240, {})
    assert len(loads.read_text().splitlines()) - 2 <= math.log2(32) + 4


@pytest.mark.long
def test_kills_from_outside_never_make_a_row_suspect(jobs: JobQueue, tmp_path: Path) -> None:
    """Far more of them than a row may crash by itself."""
    job = submit(jobs, tmp_path, prompts(60, {}), chunk_size=60)
    loads = tmp_path / "loads"
    env = {"ECHO_STEP_S": "0.4", "ECHO_LOADS": str(loads)}
    with supervised(jobs.url, tmp_path / "log", "--publish-seconds=60", env=env) as worker:
        killed: list[int] = []
        for number in [
            signal.SIGKILL,
            signal.SIGUSR2,
            signal.SIGKILL,
            signal.SIGUSR1,
            signal.SIGKILL,
        ]:
            child = wait_for(lambda: new_child(worker, killed, jobs, job))
            os.kill(child, number)
            killed.append(child)
            wait_for(lambda: not jobs.counts(job).started)
    assert "suspect" not in worker.words
    with supervised(jobs.url, tmp_path / "log2", "--burst") as worker:
        assert worker.wait() == 0
    assert_poisoned(job, 60, {})
    assert {row["attempts"] for row in rows_of(job)} == {6}


def new_child(worker: Supervised, killed: list[int], jobs: JobQueue, job: JobFolder) -> int:
    """A worker that has taken a chunk; 0 while there is none."""
    live = [pid for pid in worker.children() if pid not in killed]
    return live[0] if live and jobs.counts(job).started else 0


@pytest.mark.long
def test_a_kill_in_the_middle_of_a_quarantine_counts_for_nothing(
    jobs: JobQueue, tmp_path: Path
) -> None:
    bad = {3: "die"}
    job = submit(jobs, tmp_path, prompts(8, bad))
    with supervised(jobs.url, tmp_path / "log", env={"ECHO_STEP_S": "0.3"}) as worker:
        wait_for(lambda: "suspect" in worker.words)
        child = wait_for(lambda: jobs.counts(job).started and worker.children())[0]
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: jobs.counts(job).finished == 1, timeout=120)
    assert_poisoned(job, 8, bad)


@pytest.mark.long
def test_a_chunk_that_was_enqueued_anew_begins_without_suspects(
    jobs: JobQueue, tmp_path: Path
) -> None:
    bad = {0: "die"}
    job = submit(jobs, tmp_path, prompts(2, bad))
    with supervised(jobs.url, tmp_path / "log", "--burst") as worker:
        assert worker.wait(120) == 0
    for segment in (Path(job.path) / "segments").iterdir():
        segment.unlink()
    jobs.enqueue(job, [0])
    with supervised(jobs.url, tmp_path / "log2", "--burst") as worker:
        assert worker.wait(120) == 0
        assert "suspect rows" in worker.words
    assert_poisoned(job, 2, bad)
