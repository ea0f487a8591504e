"""Disks that are full or closed: a clear error for who waits, patience for who works."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from disks import FAILURES, Disk, small_disk
from test_matrix_store import learned
from waiting import wait_for
from worker_tools import (
    Background,
    EchoEngine,
    Loaded,
    config,
    expected,
    rows_of,
    submit,
    texts_of,
)

from trbatch import cli, matrices
from trbatch.backoff import Backoff
from trbatch.chunk_work import Folders
from trbatch.errors import Unreachable
from trbatch.queue import JobQueue
from trbatch.worker import run_worker

HINTS = {"full": "make room there", "closed": "must be allowed to write there"}
both = pytest.mark.parametrize("how", FAILURES)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", monkeypatch) as found:
        yield found


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    with JobQueue.connect(redis_url) as found:
        yield found


def spoil(disk: Disk, how: str) -> str:
    """Make the disk fail. Returns what its errors say."""
    getattr(disk, FAILURES[how][0])()
    return FAILURES[how][2]


def cure(disk: Disk, how: str) -> None:
    getattr(disk, FAILURES[how][1])()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.commands, arguments)


def write_prompts(tmp_path: Path, count: int) -> str:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i} " * 50}) + "\n" for i in range(count)))
    return str(file)


@both
def test_submit_says_what_is_wrong_and_leaves_no_half_of_a_job(
    home: Path, tmp_path: Path, disk: Disk, how: str
) -> None:
    words = spoil(disk, how)
    store = disk.path / "store"
    command = ["submit", write_prompts(tmp_path, 100), "--store", str(store), "--name", "job"]
    command += ["--model", "maker/echo"]
    done = invoke(*command)
    assert done.exit_code == 75
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith(f"error: cannot write {store}/job/")
    assert words in error
    assert HINTS[how] in hint
    assert not list(store.rglob("*.parquet"))
    cure(disk, how)
    assert invoke(*command).exit_code == 0
    assert run_worker(config(""), load=Loaded()) == 0
    assert invoke("collect", "job", "--store", str(store)).exit_code == 0


@both
def test_a_worker_waits_for_a_disk_and_goes_on_by_itself(
    jobs: JobQueue, tmp_path: Path, disk: Disk, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = submit(jobs, tmp_path, 60, out=str(disk.path / "store"))
    worker = Background(jobs.url, Loaded(lambda: EchoEngine(capacity=4, step_s=0.02)))
    wait_for(lambda: jobs.counts(job).finished >= 2)
    words = spoil(disk, how)
    wait_for(lambda: worker.worker._publisher.failures >= 2)
    held = jobs.counts(job)
    time.sleep(1.0)
    assert jobs.counts(job) == held, "nothing is finished, nothing more is taken"
    assert held.failed == 0
    assert words in caplog.text
    assert worker.thread.is_alive()
    cure(disk, how)
    wait_for(lambda: jobs.counts(job).finished == 15, timeout=40)
    worker.stop()
    assert texts_of(job) == expected(60), "every row once"
    assert {row["attempts"] for row in rows_of(job)} == {1}, "and it cost no retry"


def test_a_worker_that_must_go_while_the_disk_is_full_hands_its_chunks_back(
    jobs: JobQueue, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    job = submit(jobs, tmp_path, 40, chunk_size=20, out=str(disk.path / "store"))
    worker = Background(jobs.url, Loaded(lambda: EchoEngine(capacity=4, step_s=0.02)))
    wait_for(lambda: len(rows_of(job)) >= 4)
    disk.fill()
    wait_for(lambda: worker.worker._publisher.failures >= 1)
    assert worker.stop(times=2) == 128 + signal.SIGTERM
    assert "finished rows could not be published and are given up" in caplog.text
    counts = jobs.counts(job)
    assert (counts.started, counts.failed) == (0, 0)
    disk.free()
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(job) == expected(40)


def test_a_chunk_that_cannot_be_read_now_is_put_back_at_no_cost(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four failures in a row: one more than a chunk has retries."""
    job = submit(jobs, tmp_path, 4)
    monkeypatch.setattr("trbatch.backoff.FIRST_S", 0.01)
    opened, failures = Folders.open, [Unreachable("stale file handle")] * 4

    def sometimes(self: Folders, lease: Any) -> Any:
        if failures:
            raise failures.pop()
        return opened(self, lease)

    monkeypatch.setattr(Folders, "open", sometimes)
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert not failures
    assert texts_of(job) == expected(4)
    assert {row["attempts"] for row in rows_of(job)} == {1}


@both
def test_collect_says_what_is_wrong_and_spoils_no_earlier_dataset(
    home: Path, tmp_path: Path, disk: Disk, how: str
) -> None:
    output = disk.path / "answers.parquet"
    invoke("submit", write_prompts(tmp_path, 20), "--name", "job", "--model", "maker/echo")
    run_worker(config(""), load=Loaded())
    assert invoke("collect", "job", "-o", str(output)).exit_code == 0
    before = output.read_bytes()
    words = spoil(disk, how)
    done = invoke("collect", "job", "-o", str(output))
    assert done.exit_code == 75
    assert f"error: cannot write {output}" in done.stderr
    assert words in done.stderr
    assert output.read_bytes() == before
    cure(disk, how)
    assert [path.name for path in disk.path.iterdir()] == ["answers.parquet"], "nothing half-done"
    assert invoke("collect", "job", "-o", str(output)).exit_code == 0
    assert pq.read_table(output).num_rows == 20


@both
def test_a_matrix_that_cannot_be_saved_is_told_and_the_one_before_stays(
    disk: Disk, how: str
) -> None:
    room = learned(disk.path / "matrices", 7)
    words = spoil(disk, how)
    room.write(0, 9, 20)
    with pytest.raises((Unreachable, OSError), match=words):
        room.tasks.save()
    (saved,) = matrices.all_in(disk.path / "matrices")
    assert saved.facts.rows == 1
    cure(disk, how)
    left = {path.name for path in (disk.path / "matrices" / "model").iterdir()}
    assert left == {".lock", Path(saved.file).name}, "no half of a file"
    room.tasks.save()
    assert matrices.all_in(disk.path / "matrices")[0].facts.rows == 2


def test_pauses_grow_to_a_quarter_of_a_minute_and_end_with_success() -> None:
    tries = Backoff()
    assert not tries.failing
    pauses = [tries.failed() for _ in range(8)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    assert tries.resting
    assert tries.failing_s >= 0.0
    tries.worked()
    assert not tries.failing
    assert not tries.resting
    assert tries.failed() == 0.5


def test_a_failing_store_does_not_keep_another_one_waiting(
    jobs: JobQueue, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = submit(jobs, tmp_path, 8, name="stuck", out=str(disk.path / "store"))
    free = submit(jobs, tmp_path, 8, name="free")
    disk.fill()
    with caplog.at_level(logging.INFO, "trbatch"):
        worker = Background(jobs.url, Loaded(lambda: EchoEngine(capacity=16)))
        wait_for(lambda: jobs.counts(free).finished == 2)
        assert jobs.counts(stuck).finished == 0
        disk.free()
        wait_for(lambda: jobs.counts(stuck).finished == 2, timeout=30)
        worker.stop()
    assert "can be written again" in caplog.text
    assert texts_of(stuck) == texts_of(free) == expected(8)
