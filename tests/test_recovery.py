"""A dead worker's chunks: who takes them over, and how soon; what comes back from the dead."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervised import MODEL, Supervised, rows_of, submit, supervised
from waiting import wait_for

from trbatch import recovery
from trbatch.chunk_job import ChunkQueue
from trbatch.job import JobFolder
from trbatch.queue import JobQueue
from trbatch.queue_names import ModelKey
from trbatch.results import collect


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    with JobQueue.connect(redis_url) as found:
        yield found


def queue_of(jobs: JobQueue) -> ChunkQueue:
    return jobs.queue(ModelKey(MODEL).queue_name)


def waiting(jobs: JobQueue) -> list[str]:
    return [rq_id.decode() for rq_id in jobs.connection.lrange(queue_of(jobs).key, 0, -1)]


@pytest.mark.long
@pytest.mark.torture
def test_a_burst_does_not_end_before_the_chunks_of_the_dead_are_done(
    jobs: JobQueue, tmp_path: Path
) -> None:
    """`trbatch run` again, right after a power cut: the queue is empty, its leases still run."""
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(16)])
    with supervised(jobs.url, tmp_path / "dead", env={"ECHO_STEP_S": "5"}) as dead:
        wait_for(lambda: jobs.counts(job).started == 2)
        dead.process.kill()
    with supervised(jobs.url, tmp_path / "next", "--burst") as worker:
        assert worker.wait() == 0
    assert len(rows_of(job)) == 16


@pytest.mark.long
def test_a_burst_does_not_end_before_a_chunk_that_somebody_died_over_taking(
    jobs: JobQueue, tmp_path: Path
) -> None:
    """Its id is neither in the queue nor leased: a worker popped it and was gone."""
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(16)])
    queue = queue_of(jobs)
    assert jobs.connection.lmove(queue.key, queue.intermediate_queue_key)
    with supervised(jobs.url, tmp_path / "log", "--burst") as worker:
        assert worker.wait() == 0
    assert len(rows_of(job)) == 16
    assert jobs.counts(job).finished == 2


@pytest.mark.long
@pytest.mark.torture
def test_a_burst_leaves_the_chunks_of_the_living_to_them(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(16)])
    with supervised(jobs.url, tmp_path / "living", env={"ECHO_STEP_S": "10"}):
        wait_for(lambda: jobs.counts(job).started == 2)
        begin = time.monotonic()
        with supervised(jobs.url, tmp_path / "next", "--burst") as worker:
            assert worker.wait() == 0
        assert time.monotonic() - begin < 18
        assert len(rows_of(job)) < 16


def test_a_zombies_rows_are_harmless_and_counted(jobs: JobQueue, tmp_path: Path) -> None:
    """A worker that is stopped for longer than its lease comes back and publishes what it has."""
    prompts = [f"say {i}" for i in range(8)]
    job = submit(jobs, tmp_path, prompts)
    slow = {"ECHO_STEP_S": "1.0"}
    with supervised(
        jobs.url, tmp_path / "zombie", "--publish-seconds=30", "--name=zombie", env=slow
    ) as zombie:
        child = wait_for(lambda: jobs.counts(job).started and zombie.children())[0]
        time.sleep(1.3)  # four rows are decoded and not published
        os.kill(child, signal.SIGSTOP)
        wip = queue_of(jobs).started_job_registry.key
        for member in jobs.connection.zrange(wip, 0, -1):
            jobs.connection.zadd(wip, {member: time.time() - 1})  # the lease's time goes by
        assert recovery.recover(queue_of(jobs)) == 1
        with supervised(jobs.url, tmp_path / "other", "--burst", "--name=other") as other:
            wait_for(lambda: jobs.counts(job).finished == 1)
            os.kill(child, signal.SIGCONT)
            wait_for(lambda: len(rows_of(job)) > 8)
            zombie.process.send_signal(signal.SIGTERM)
            assert zombie.wait() == 143
            assert other.wait() == 0
        assert "died" not in zombie.words
    receipt = collect(JobFolder.open(job.path), str(tmp_path / "out.parquet"))
    assert receipt.complete and receipt.rows_ok == 8
    assert receipt.duplicates == len(rows_of(job)) - 8 >= 1
    assert f"{receipt.duplicates} duplicates left out" in str(receipt)
    stats = json.loads((Path(job.path) / "stats.json").read_text())
    assert stats["receipt"]["duplicates"] == receipt.duplicates


def seconds_until_elsewhere(jobs: JobQueue, tmp_path: Path, number: int) -> float:
    """Kill a worker and its supervisor with chunks in flight while another worker is busy.

    Returns:
        Seconds until none of its chunks is its own any more and all run elsewhere or are done.
    """
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(400)], name=f"kill-{number}")
    slow = {"ECHO_STEP_S": "0.2"}
    log = tmp_path / f"log-{number}"
    with supervised(jobs.url, log, "--name=victim", env=slow) as victim:
        wait_for(lambda: jobs.counts(job).started >= 1)
        with supervised(jobs.url, log, "--name=other", env=slow) as other:
            wait_for(lambda: "other" in "".join(row["worker"] for row in rows_of(job)))
            child = victim.children()[0]
            held = held_by(jobs, "victim")
            assert held
            victim.process.kill()  # nobody is left to put anything back
            begin = time.monotonic()
            wait_for(lambda: not Path(f"/proc/{child}").exists(), timeout=5)
            wait_for(lambda: not held & held_by(jobs, "victim"), timeout=60)
            wait_for(lambda: all(moved(jobs, entry) for entry in held), timeout=60)
            seconds = time.monotonic() - begin
            stop(other)
    for entry in waiting(jobs):
        jobs.connection.lrem(queue_of(jobs).key, 0, entry)
    return seconds


def stop(worker: Supervised) -> None:
    for _ in range(2):
        worker.process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
    worker.wait()


def held_by(jobs: JobQueue, name: str) -> set[str]:
    """Entries that a worker of this name has begun."""
    wip = queue_of(jobs).started_job_registry.key
    entries = {member.decode().rpartition(":")[0] for member in jobs.connection.zrange(wip, 0, -1)}
    owners = {e: jobs.connection.hget(f"rq:job:{e}", "worker_name") for e in entries}
    return {entry for entry, owner in owners.items() if owner and owner.startswith(name.encode())}


def moved(jobs: JobQueue, entry: str) -> bool:
    owner = jobs.connection.hget(f"rq:job:{entry}", "worker_name")
    status = jobs.connection.hget(f"rq:job:{entry}", "status")
    return status == b"finished" or (status == b"started" and b"other" in (owner or b""))


def check_recovery(jobs: JobQueue, tmp_path: Path, kills: int) -> None:
    seconds = [seconds_until_elsewhere(jobs, tmp_path, number) for number in range(kills)]
    print(f"seconds until elsewhere: {[round(s, 1) for s in seconds]}")
    assert statistics.median(seconds) <= 30
    assert max(seconds) <= 45


@pytest.mark.long
def test_a_dead_workers_chunks_run_elsewhere_within_half_a_minute(
    jobs: JobQueue, tmp_path: Path
) -> None:
    check_recovery(jobs, tmp_path, 1)


@pytest.mark.long
@pytest.mark.torture
def test_ten_dead_workers_chunks_run_elsewhere_within_half_a_minute(
    jobs: JobQueue, tmp_path: Path
) -> None:
    check_recovery(jobs, tmp_path, 10)
