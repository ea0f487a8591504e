"""Outages: a server or a storage that is away costs time, and nothing else."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervised import MODEL, alive, rows_of, submit, supervised
from waiting import wait_for

from trbatch import server
from trbatch.errors import Unreachable
from trbatch.job import JobFolder
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue
from trbatch.queue_names import ModelKey
from trbatch.results import collect
from trbatch.worker import BatchWorker


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    with JobQueue.connect(redis_url, patient=True) as found:
        yield found


def kill_server() -> None:
    time.sleep(1.1)  # its log is synced every second
    os.kill(server.status().pid, signal.SIGKILL)
    wait_for(lambda: not server.status().running)


def outage(jobs: JobQueue, tmp_path: Path, seconds: float) -> None:
    """The server is away for a while; the worker neither loses a row nor its life."""
    count = 400 + int(40 * seconds)
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(count)])
    with supervised(jobs.url, tmp_path / "log", env={"ECHO_STEP_S": "0.2"}) as worker:
        wait_for(lambda: len(rows_of(job)) >= 12)
        (child,) = worker.children()
        kill_server()
        before = len(rows_of(job))
        time.sleep(seconds)
        assert len(rows_of(job)) > before, "what is finished needs no server to be published"
        server.ensure()
        begin = time.monotonic()
        wait_for(lambda: jobs.counts(job).finished > before // 8 + 4, timeout=20)
        assert time.monotonic() - begin < 15
        assert worker.children() == [child], "it was never replaced"
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait() == 143
    with supervised(jobs.url, tmp_path / "log", "--burst") as worker:
        assert worker.wait() == 0
    receipt = collect(JobFolder.open(job.path), str(tmp_path / "out.parquet"))
    assert receipt.complete and receipt.rows_ok == count and receipt.duplicates == 0


def test_a_server_that_is_away_for_seconds_costs_nothing_but_time(
    jobs: JobQueue, tmp_path: Path
) -> None:
    outage(jobs, tmp_path, 4.0)


@pytest.mark.long
@pytest.mark.torture
def test_a_server_that_is_away_for_a_minute_costs_nothing_but_time(
    jobs: JobQueue, tmp_path: Path
) -> None:
    outage(jobs, tmp_path, 60.0)


def test_a_worker_can_be_stopped_while_the_server_is_away(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(400)], chunk_size=400)
    with supervised(jobs.url, tmp_path / "log", "--grace=1", env={"ECHO_STEP_S": "0.2"}) as worker:
        wait_for(lambda: len(rows_of(job)) >= 4)
        kill_server()
        worker.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert worker.wait() == Unreachable.exit_code
        assert time.monotonic() - begin < 12
        assert "asked to stop while the queue" in worker.words
        assert "Traceback" not in worker.words
    server.ensure()


@pytest.fixture
def server_pid(jobs: JobQueue) -> Iterator[int]:
    """The server's process. Stopped, it hangs, as one does whose host drops every packet."""
    pid = server.status().pid
    yield pid
    os.kill(pid, signal.SIGCONT)


@pytest.mark.long
def test_workers_stop_within_their_grace_and_seconds_of_a_server_that_hangs(
    jobs: JobQueue, tmp_path: Path, server_pid: int
) -> None:
    """And a dead worker, whose chunks cannot be put back, keeps the signal from no other one."""
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(400)])
    env = {"ECHO_STEP_S": "0.3"}
    with supervised(jobs.url, tmp_path / "log", "--gpu=0,1", "--grace=1", env=env) as parent:
        wait_for(lambda: len({row["worker"] for row in rows_of(job)}) == 2)
        killed, other = parent.children()
        os.kill(server_pid, signal.SIGSTOP)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: "SIGKILL from outside" in parent.words)
        parent.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        wait_for(lambda: not alive(other), timeout=10)
        assert parent.wait() == Unreachable.exit_code
        assert time.monotonic() - begin < 10
        assert "Traceback" not in parent.words


@pytest.mark.long
def test_a_server_that_hangs_for_seconds_costs_nothing_but_time(
    jobs: JobQueue, tmp_path: Path, server_pid: int
) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(120)])
    with supervised(jobs.url, tmp_path / "log", env={"ECHO_STEP_S": "0.2"}) as worker:
        wait_for(lambda: len(rows_of(job)) >= 12)
        child = worker.children()
        os.kill(server_pid, signal.SIGSTOP)
        time.sleep(5.0)
        os.kill(server_pid, signal.SIGCONT)
        wait_for(lambda: jobs.counts(job).finished == 15)
        assert worker.children() == child, "it was never replaced"
        assert "Traceback" not in worker.words
    assert sorted(row["prompt_index"] for row in rows_of(job)) == list(range(120))


def test_a_worker_starts_the_embedded_server_again(home: Path, tmp_path: Path) -> None:
    with JobQueue.connect() as jobs:
        job = submit(jobs, tmp_path, [f"say {i}" for i in range(200)])
        with supervised("", tmp_path / "log", env={"ECHO_STEP_S": "0.1"}):
            wait_for(lambda: len(rows_of(job)) >= 12)
            kill_server()
            wait_for(lambda: len(rows_of(job)) == 200, timeout=60)
            assert server.status().running


def test_a_worker_that_never_had_a_queue_says_so_at_once(tmp_path: Path, home: Path) -> None:
    with supervised("redis://127.0.0.1:1", tmp_path / "log") as worker:
        assert worker.wait() == Unreachable.exit_code
        assert worker.words.count("error:") == 1


@pytest.mark.long
@pytest.mark.torture
def test_a_parent_tries_again_for_as_long_as_the_server_is_away(
    jobs: JobQueue, tmp_path: Path
) -> None:
    """More often than it would a worker that cannot load its model."""
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(60)])
    env = {"ECHO_STEP_S": "0.1", "ECHO_LOADS": str(tmp_path / "loads")}
    with supervised(jobs.url, tmp_path / "log", env=env) as worker:
        wait_for(lambda: len(rows_of(job)) >= 4)
        kill_server()
        worker.children() and os.kill(worker.children()[0], signal.SIGKILL)
        wait_for(lambda: worker.words.count("cannot be reached") >= 8, timeout=60)
        assert worker.process.poll() is None
        server.ensure()
        wait_for(lambda: jobs.counts(job).finished == 8, timeout=60)
    assert sorted(row["prompt_index"] for row in rows_of(job)) == list(range(60))


def test_a_queue_that_was_wiped_costs_a_resume(jobs: JobQueue, tmp_path: Path) -> None:
    """The job folder is the truth; workers survive it and take what is enqueued anew."""
    from trbatch import api

    job = submit(jobs, tmp_path, [f"say {i}" for i in range(100)])
    with supervised(jobs.url, tmp_path / "log", env={"ECHO_STEP_S": "0.1"}) as worker:
        wait_for(lambda: len(rows_of(job)) >= 12)
        child = worker.children()
        jobs.connection.flushall()
        wait_for(lambda: "lease was lost" in worker.words)
        chunks = api.resume(job.path, redis_url=jobs.url)
        assert chunks >= 8
        wait_for(lambda: jobs.counts(job).finished == chunks)
        assert worker.children() == child
    receipt = collect(JobFolder.open(job.path), str(tmp_path / "out.parquet"))
    assert receipt.complete and receipt.rows_ok == 100


# --- the storage ---


def test_a_full_disk_is_waited_for_and_costs_no_row_an_attempt(
    jobs: JobQueue, tmp_path: Path
) -> None:
    """A quota of nothing, by the limit on the size of files that a process may write."""
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(60)])
    with supervised(jobs.url, tmp_path / "log", env={"ECHO_STEP_S": "0.1"}) as worker:
        wait_for(lambda: len(rows_of(job)) >= 4)
        (child,) = worker.children()
        hard = resource.prlimit(child, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(child, resource.RLIMIT_FSIZE, (0, hard))
        time.sleep(0.5)
        full = len(rows_of(job))
        time.sleep(2.5)
        assert len(rows_of(job)) == full < 60
        resource.prlimit(child, resource.RLIMIT_FSIZE, (hard, hard))
        wait_for(lambda: jobs.counts(job).finished == 8)
        assert worker.children() == [child]
    found = rows_of(job)
    assert sorted(row["prompt_index"] for row in found) == list(range(60))
    assert {row["attempts"] for row in found} == {1}


@pytest.mark.parametrize("error", [Unreachable("no route to the storage"), MemoryError("full")])
def test_a_chunk_that_the_machine_cannot_read_waits_behind_the_others(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """No attempt is lost by it, and no chunk behind it is held up."""
    from test_worker import Loaded, config

    job = submit(jobs, tmp_path, [f"say {i}" for i in range(24)])
    failures = {0: 3}
    read = JobFolder.chunk_rows

    def sometimes(self: JobFolder, index: int) -> Any:
        if failures.get(index, 0):
            failures[index] -= 1
            raise error
        return read(self, index)

    monkeypatch.setattr(JobFolder, "chunk_rows", sometimes)
    monkeypatch.setattr("trbatch.backoff.FIRST_S", 0.05)
    settings = config(jobs.url, model=MODEL, chunks_in_flight=1)
    assert BatchWorker(settings, jobs, Loaded()).run() == 0
    found = rows_of(job)
    assert sorted(row["prompt_index"] for row in found) == list(range(24))
    assert {row["attempts"] for row in found} == {1}
    assert jobs.counts(job).failed == 0


def test_a_chunk_handed_back_behind_the_others_is_taken_last(
    jobs: JobQueue, tmp_path: Path
) -> None:
    submit(jobs, tmp_path, ["say"] * 3, chunk_size=1)
    queue = jobs.queue(ModelKey(MODEL).queue_name)
    worker = LeaseWorker(jobs.connection, "w", [queue])
    worker.open()
    first = worker.take(queue)
    assert first is not None
    worker.hand_back(first, front=False)
    order = [lease.chunk for _ in range(3) if (lease := worker.take(queue)) is not None]
    assert order == [1, 2, 0]
    worker.close()
