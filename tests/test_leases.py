"""Leases: who may work on a chunk, for how long, and how it comes back when nobody does."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from supervised import MODEL, submit

from trbatch import flight as flight_module
from trbatch import lease as lease_module
from trbatch import recovery
from trbatch.chunk_job import ChunkQueue
from trbatch.chunk_lease import Lease
from trbatch.flight import FlightRecord, Holdings
from trbatch.job import JobFolder
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue
from trbatch.queue_names import ModelKey
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
    assert flight.holdings() == Holdings()
    assert flight.running() == {}
    reader = FlightRecord(os.dup(flight.fd))
    for number in range(5):
        flight.note_holdings("w", ["queue"], {"e": (f"entry {number}", "queue")})
        flight.note_running([("e", number, 0), ("e", 7, 1), ("f", 8, 0)])
        found = Holdings("w", ("queue",), {"e": (f"entry {number}", "queue")})
        assert reader.holdings() == found
        assert reader.running() == {"e": [(number, 0), (7, 1)], "f": [(8, 0)]}
    reader.close()


def test_more_leases_than_a_note_has_room_for_are_noted_in_part(flight: FlightRecord) -> None:
    many = {f"{i:032x}": (f"a-job-of-an-ordinary-name-{i}", "queue" * 8) for i in range(30_000)}
    flight.note_holdings("w", ["queue"], many)
    found = flight.holdings()
    assert found.worker == "w" and found.queues == ("queue",)
    assert 3000 < len(found.leases) < 30_000 and found.leases.items() <= many.items()
    flight.note_holdings("w", [], {"e": ("x" * 2_000_000, "queue")})
    assert flight.holdings() == Holdings("w")
    flight.note_holdings("w", ["q" * 1000] * 3000, {})
    assert 500 < len(flight.holdings().queues) < 1100


def test_a_note_that_a_death_cut_short_leaves_the_one_before(flight: FlightRecord) -> None:
    flight.note_running([("e", 1, 0)])
    flight.note_running([("e", 2, 0)])
    last = flight_module._place(1, 2)
    os.pwrite(flight.fd, b"\xff" * 8, last + 20)
    assert flight.running() == {"e": [(1, 0)]}


def test_a_record_needs_no_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    record = FlightRecord.create()
    record.note_running([("e", 1, 0)])
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
    queues = (first.queue.name,)
    held = {lease.id: (lease.job.id, lease.queue.name) for lease in (first, second)}
    assert flight.holdings() == Holdings("worker", queues, held)
    worker.finish(first, {})
    worker.hand_back(second)
    assert flight.holdings() == Holdings("worker", queues)
    worker.leave()
    assert flight.holdings() == Holdings(), "nobody has to look after a worker that has left"


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
    assert jobs.counts(JobFolder.open(lease.folder)).failed == 0


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
