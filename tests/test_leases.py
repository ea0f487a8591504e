"""Leases: who may work on a chunk, for how long, and how it comes back when nobody does."""

from __future__ import annotations

import contextvars
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from supervised import MODEL, Supervised, rows_of, submit, supervised, wait_for

from trbatch import flight as flight_module
from trbatch import lease as lease_module
from trbatch import recovery
from trbatch.chunk_job import ChunkQueue
from trbatch.flight import FlightRecord
from trbatch.job import JobFolder
from trbatch.lease import Lease, LeaseWorker
from trbatch.queue import JobQueue, ModelKey
from trbatch.results import collect
from trbatch.suspects import Suspects


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    with JobQueue.connect(redis_url) as found:
        yield found


@pytest.fixture
def flight() -> Iterator[FlightRecord]:
    record = FlightRecord.create()
    yield record
    record.close()


@pytest.fixture
def worker(jobs: JobQueue, flight: FlightRecord) -> Iterator[LeaseWorker]:
    with redis.Redis.from_url(jobs.url) as connection:
        found = LeaseWorker(connection, "worker", [queue_of(jobs)], flight)
        found.open()
        yield found
        found.close()


def queue_of(jobs: JobQueue) -> ChunkQueue:
    return jobs.queue(ModelKey(MODEL).queue_name)


def taken(jobs: JobQueue, worker: LeaseWorker, tmp_path: Path, chunks: int) -> list[Lease]:
    submit(jobs, tmp_path, ["say"] * chunks, chunk_size=1)
    leases = [worker.take(queue_of(jobs)) for _ in range(chunks)]
    assert all(leases)
    return [lease for lease in leases if lease is not None]


def beat(worker: LeaseWorker) -> list[Lease]:
    worker._last_beat -= lease_module.BEAT_S
    return worker.beat()


def expiry(jobs: JobQueue, lease: Lease) -> float:
    """Seconds until a lease runs out."""
    key = lease.job.started_job_registry.key
    score = jobs.connection.zscore(key, lease.execution.composite_key)
    assert score is not None
    return float(score) - time.time()


def run_out(jobs: JobQueue, leases: list[Lease]) -> None:
    for lease in leases:
        key = lease.job.started_job_registry.key
        jobs.connection.zadd(key, {lease.execution.composite_key: time.time() - 1})


def waiting(jobs: JobQueue) -> list[str]:
    return [rq_id.decode() for rq_id in jobs.connection.lrange(queue_of(jobs).key, 0, -1)]


# --- the engine's pulse keeps a lease ---


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(flight: FlightRecord) -> Clock:
    found = Clock()
    flight.pulse._clock = found
    return found


def test_the_lease_of_an_engine_that_hangs_is_not_renewed(
    jobs: JobQueue, worker: LeaseWorker, flight: FlightRecord, clock: Clock, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (lease,) = taken(jobs, worker, tmp_path, 1)
    with flight.pulse.step():
        clock.now += lease_module.LEASE_S - 1
        beat(worker)
        assert expiry(jobs, lease) > lease_module.LEASE_S - 1
        jobs.connection.zadd(
            lease.job.started_job_registry.key, {lease.execution.composite_key: time.time() + 5}
        )
        clock.now += 2
        for _ in range(3):
            beat(worker)
        assert expiry(jobs, lease) < 5
        assert caplog.text.count("no sign of life") == 1
    beat(worker)
    assert expiry(jobs, lease) > lease_module.LEASE_S - 1, "it moves again"


def test_an_engine_without_work_keeps_its_leases(
    jobs: JobQueue, worker: LeaseWorker, flight: FlightRecord, clock: Clock, tmp_path: Path
) -> None:
    (lease,) = taken(jobs, worker, tmp_path, 1)
    flight.pulse.idle()
    clock.now += 10_000
    assert beat(worker) == []
    assert expiry(jobs, lease) > lease_module.LEASE_S - 1


def test_a_declared_phase_holds_a_lease_for_ten_minutes(flight: FlightRecord, clock: Clock) -> None:
    pulse = flight.pulse
    with pulse.declared():
        clock.now += 599
        assert pulse.beats(15) and not pulse.stepping
        clock.now += 2
        assert not pulse.beats(15)
    assert pulse.beats(15)


def test_a_phase_that_fails_is_over(flight: FlightRecord, clock: Clock) -> None:
    with pytest.raises(ValueError), flight.pulse.declared():  # noqa: PT011
        raise ValueError
    clock.now += 10_000
    assert flight.pulse.beats(15)


def test_a_phase_in_the_middle_of_a_step_makes_no_slow_step_of_it(
    flight: FlightRecord, clock: Clock
) -> None:
    pulse = flight.pulse
    with flight_module.declared():  # in a thread that is no engine's
        assert pulse.beats(15)
    contextvars.copy_context().run(compile_in_a_step, flight, clock)
    assert pulse.allowed(15) == 20.0, "ten times the 2 s beside the 300 that were declared"


def compile_in_a_step(flight: FlightRecord, clock: Clock) -> None:
    flight.pulse.adopt()
    with flight.pulse.step():
        clock.now += 1
        with flight_module.declared():
            assert not flight.pulse.stepping
            clock.now += 300
            assert flight.pulse.beats(15)
        assert flight.pulse.stepping
        clock.now += 1


def test_slow_steps_are_allowed_to_engines_whose_steps_are_slow(
    flight: FlightRecord, clock: Clock
) -> None:
    pulse = flight.pulse
    with pulse.step():
        clock.now += 14
    with pulse.step():
        clock.now += 139
        assert pulse.beats(15), "the slowest so far took 14 s"
        clock.now += 2
        assert not pulse.beats(15)


# --- the flight record ---


def test_what_was_noted_last_is_read(flight: FlightRecord) -> None:
    assert flight.holdings() == ("", {})
    assert flight.running() == {}
    reader = FlightRecord(os.dup(flight.fd))
    for number in range(5):
        flight.note_holdings("w", {"e": (f"entry {number}", "queue")})
        flight.note_running([(("e", 0), number, 0), (("e", 1), 7, 1), (("f", 0), 8, 0)])
        assert reader.holdings() == ("w", {"e": (f"entry {number}", "queue")})
        assert reader.running() == {"e": [(number, 0), (7, 1)], "f": [(8, 0)]}
    reader.close()


def test_a_note_that_a_death_cut_short_leaves_the_one_before(flight: FlightRecord) -> None:
    flight.note_running([(("e", 0), 1, 0)])
    flight.note_running([(("e", 0), 2, 0)])
    last = flight_module._place(1, 2)
    os.pwrite(flight.fd, b"\xff" * 8, last + 20)
    assert flight.running() == {"e": [(1, 0)]}


def test_a_record_needs_no_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    record = FlightRecord.create()
    record.note_running([(("e", 0), 1, 0)])
    assert record.running() == {"e": [(1, 0)]}
    record.close()


def test_a_record_of_another_parent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trbatch.errors import WorkerError

    monkeypatch.setenv("TRBATCH_FLIGHT", "1:3")
    with pytest.raises(WorkerError, match="process 1, is gone"):
        FlightRecord.inherited()
    assert FlightRecord.inherited() is None, "it is taken out of the environment"


def test_leases_are_noted_as_they_come_and_go(
    jobs: JobQueue, worker: LeaseWorker, flight: FlightRecord, tmp_path: Path
) -> None:
    first, second = taken(jobs, worker, tmp_path, 2)
    name, held = flight.holdings()
    assert name == "worker"
    assert held == {lease.id: (lease.job.id, lease.queue.name) for lease in (first, second)}
    worker.finish(first, {})
    worker.hand_back(second)
    assert flight.holdings() == ("worker", {})


# --- back into the queue ---


def test_many_who_recover_at_once_bring_each_chunk_back_once(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path
) -> None:
    """rq's own clean-up enqueues twice when two run at a time."""
    leases = taken(jobs, worker, tmp_path, 30)
    run_out(jobs, leases)
    gate = threading.Barrier(6)
    back: list[int] = []

    def recover() -> None:
        with JobQueue.connect(jobs.url) as mine:
            gate.wait()
            back.append(recovery.recover(queue_of(mine)))

    threads = [threading.Thread(target=recover) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(back) == 30
    assert sorted(waiting(jobs)) == sorted(lease.job.id for lease in leases)


def test_a_crash_costs_a_chunk_no_retry_however_often_it_happens(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path
) -> None:
    (lease,) = taken(jobs, worker, tmp_path, 1)
    for attempt in range(2, 12):
        run_out(jobs, [lease])
        assert recovery.recover(queue_of(jobs)) == 1
        assert beat(worker) == [lease], "it was lost"
        found = worker.take(queue_of(jobs))
        assert found is not None and found.attempt == attempt
        lease = found
    assert lease.job.retries_left == 3
    assert jobs.counts("job").failed == 0


def test_what_was_given_back_once_is_not_given_back_again(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path
) -> None:
    (lease,) = taken(jobs, worker, tmp_path, 1)
    arguments: Any = (queue_of(jobs), lease.job.id, lease.id)
    assert recovery.give_back(*arguments)
    assert not recovery.give_back(*arguments)
    assert waiting(jobs) == [lease.job.id]


def test_a_finished_chunk_does_not_come_back(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path
) -> None:
    (lease,) = taken(jobs, worker, tmp_path, 1)
    worker.finish(lease, {})
    jobs.connection.zadd(lease.job.started_job_registry.key, {f"{lease.job.id}:x": 1})
    assert recovery.recover(queue_of(jobs)) == 0
    assert waiting(jobs) == []


def test_strange_entries_of_the_registry_stop_nothing(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path
) -> None:
    (lease,) = taken(jobs, worker, tmp_path, 1)
    wip = lease.job.started_job_registry.key
    jobs.connection.set("rq:job:text", "no hash")
    strange = {"no colon": 1, "text:1": 1, ":": 1, "absent:1": 1, "%d%s:1": 1}
    jobs.connection.zadd(wip, strange)
    run_out(jobs, [lease])
    assert recovery.recover(queue_of(jobs)) == 1
    assert waiting(jobs) == [lease.job.id]
    assert jobs.connection.zcard(wip) == 0


def test_suspects_travel_with_the_chunk(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path
) -> None:
    (lease,) = taken(jobs, worker, tmp_path, 1)
    suspects = Suspects().after_crash([(0, 0)], "SIGSEGV", alone=True)
    assert worker.hand_back(lease, lost=True, suspects=suspects)
    again = worker.take(queue_of(jobs))
    assert again is not None and again.suspects == suspects
    jobs.connection.hset(again.job.key, recovery.SUSPECTS, "nonsense")
    jobs.connection.hset(again.job.key, recovery.LOST, "-3")
    worker.hand_back(again, front=False)
    assert recovery.history(jobs.connection, again.job.id) == (0, Suspects())


# --- whole workers ---


@pytest.mark.long
def test_a_burst_does_not_end_before_the_chunks_of_the_dead_are_done(
    jobs: JobQueue, tmp_path: Path
) -> None:
    """`trbatch run` again, right after a power cut: the queue is empty, its leases still run."""
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(16)])
    with supervised(jobs.url, tmp_path / "dead", env={"ECHO_STEP_S": "5"}) as dead:
        wait_for(lambda: jobs.counts(job.id).started == 2)
        dead.process.kill()
    with supervised(jobs.url, tmp_path / "next", "--burst") as worker:
        assert worker.wait() == 0
    assert len(rows_of(job)) == 16


@pytest.mark.long
def test_a_burst_leaves_the_chunks_of_the_living_to_them(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(16)])
    with supervised(jobs.url, tmp_path / "living", env={"ECHO_STEP_S": "10"}):
        wait_for(lambda: jobs.counts(job.id).started == 2)
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
        child = wait_for(lambda: jobs.counts(job.id).started and zombie.children())[0]
        time.sleep(1.3)  # four rows are decoded and not published
        os.kill(child, signal.SIGSTOP)
        wip = queue_of(jobs).started_job_registry.key
        for member in jobs.connection.zrange(wip, 0, -1):
            jobs.connection.zadd(wip, {member: time.time() - 1})  # the lease's time goes by
        assert recovery.recover(queue_of(jobs)) == 1
        with supervised(jobs.url, tmp_path / "other", "--burst", "--name=other") as other:
            wait_for(lambda: jobs.counts(job.id).finished == 1)
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
        wait_for(lambda: jobs.counts(job.id).started >= 1)
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


def test_a_dead_workers_chunks_run_elsewhere_within_half_a_minute(
    jobs: JobQueue, tmp_path: Path
) -> None:
    check_recovery(jobs, tmp_path, 1)


@pytest.mark.long
def test_ten_dead_workers_chunks_run_elsewhere_within_half_a_minute(
    jobs: JobQueue, tmp_path: Path
) -> None:
    check_recovery(jobs, tmp_path, 10)
