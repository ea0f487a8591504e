"""Leases: who holds a chunk, how it comes back, and that it never runs twice."""

from __future__ import annotations

import time

import pytest
from queue_tools import FakeFolder, beat, counts, queue, run_out, take, take_all
from rq.command import send_stop_job_command
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from waiting import wait_for

from trbatch import lease as lease_module
from trbatch.chunk_job import RETRIES
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue
from trbatch.queue_names import chunk_id


def test_a_failing_chunk_comes_back_until_its_retries_are_used_up(
    jobs: JobQueue, worker: LeaseWorker
) -> None:
    jobs.enqueue(FakeFolder(), [4, 5])
    attempts = []
    for _ in range(RETRIES + 1):
        found = take(jobs, worker)
        assert found.chunk == 4, "a retry goes before what has not been tried"
        attempts.append(found.attempt)
        worker.fail(found, ValueError("cannot read it"))
    assert attempts == [1, 2, 3, 4]
    assert counts(jobs) == (1, 0, 1, 0)
    assert jobs.failures(FakeFolder()) == {4: "ValueError: cannot read it"}


def test_a_chunk_handed_back_is_the_next_and_loses_no_retry(
    jobs: JobQueue, worker: LeaseWorker, other: LeaseWorker
) -> None:
    jobs.enqueue(FakeFolder(), [0, 1])
    assert worker.hand_back(take(jobs, worker))
    assert counts(jobs) == (2, 0, 0, 0)
    assert worker.current_execution_count == 0
    found = take(jobs, other)
    assert (found.chunk, found.attempt) == (0, 1)


def test_a_beat_keeps_a_lease_alive(jobs: JobQueue, worker: LeaseWorker) -> None:
    jobs.enqueue(FakeFolder(), [0])
    found = take(jobs, worker)
    key, member = found.job.started_job_registry.key, found.execution.composite_key
    jobs.connection.zadd(key, {member: time.time() + 1})
    assert beat(worker) == []
    assert jobs.connection.zscore(key, member) > time.time() + lease_module.LEASE_S - 2


def test_the_chunk_of_a_dead_worker_goes_to_another(
    jobs: JobQueue, worker: LeaseWorker, other: LeaseWorker
) -> None:
    jobs.enqueue(FakeFolder(), [0])
    found = take(jobs, worker)
    beat(other)
    assert other.take(queue(jobs)) is None, "the lease still runs"
    run_out(jobs, found)
    beat(other)
    again = take(jobs, other)
    assert (again.chunk, again.attempt) == (0, 2)


def test_a_worker_that_lost_its_lease_can_end_nothing(
    jobs: JobQueue, worker: LeaseWorker, other: LeaseWorker
) -> None:
    jobs.enqueue(FakeFolder(), [0])
    lost = take(jobs, worker)
    run_out(jobs, lost)
    beat(other)
    again = take(jobs, other)
    assert not worker.finish(lost, {})
    assert counts(jobs) == (0, 1, 0, 0)
    assert other.finish(again, {})
    assert counts(jobs) == (0, 0, 0, 1)


def test_a_lost_lease_is_reported_by_the_beat(
    jobs: JobQueue, worker: LeaseWorker, other: LeaseWorker
) -> None:
    jobs.enqueue(FakeFolder(), [0, 1])
    lost, kept = take(jobs, worker), take(jobs, worker)
    run_out(jobs, lost)
    beat(other)
    assert beat(worker) == [lost]
    assert list(worker.leases.values()) == [kept]


def test_after_an_outage_leases_of_others_are_left_alone_for_a_while(
    jobs: JobQueue, worker: LeaseWorker, other: LeaseWorker
) -> None:
    jobs.enqueue(FakeFolder(), [0])
    found = take(jobs, worker)
    run_out(jobs, found)
    other._last_beat -= lease_module.LEASE_S + 1
    other.beat()
    assert beat(worker) == [], "its owner had the time to renew it"
    assert worker.finish(found, {})


def test_an_id_that_was_pushed_three_times_runs_once(
    jobs: JobQueue, worker: LeaseWorker, other: LeaseWorker
) -> None:
    folder = FakeFolder()
    jobs.enqueue(folder, [0])
    for _ in range(2):
        jobs.connection.rpush(queue(jobs).key, chunk_id(folder, 0))
    assert take_all(jobs, worker) + take_all(jobs, other) == [0]
    assert jobs.connection.llen(queue(jobs).intermediate_queue_key) == 0


def test_an_id_that_another_worker_is_taking_is_passed_over(
    jobs: JobQueue, worker: LeaseWorker
) -> None:
    folder = FakeFolder()
    jobs.enqueue(folder, [0, 1])
    claim = f"trbatch:claim:{chunk_id(folder, 0)}"
    jobs.connection.set(claim, "another", ex=10)
    assert take_all(jobs, worker) == [1]
    assert jobs.connection.get(claim) == b"another"


def test_an_id_lost_between_pop_and_lease_is_brought_back(
    jobs: JobQueue, worker: LeaseWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.enqueue(FakeFolder(), [0])
    jobs.connection.lmove(queue(jobs).key, queue(jobs).intermediate_queue_key)
    monkeypatch.setattr("trbatch.chunk_job.STUCK_S", 0)
    beat(worker)
    assert worker.take(queue(jobs)) is None, "seen for the first time: its taker may still live"
    beat(worker)
    assert take(jobs, worker).chunk == 0


def test_a_worker_that_redis_forgot_appears_again(jobs: JobQueue, worker: LeaseWorker) -> None:
    jobs.connection.delete("rq:workers", worker.key)
    assert jobs.workers() == []
    beat(worker)
    assert [found.name for found in jobs.workers()] == ["worker"]


def test_the_second_of_two_chunks_can_be_stopped(jobs: JobQueue, worker: LeaseWorker) -> None:
    jobs.enqueue(FakeFolder(), [0, 1])
    first, second = take(jobs, worker), take(jobs, worker)
    send_stop_job_command(jobs.connection, second.job.id, serializer=JSONSerializer)
    assert wait_for(worker.stopped, timeout=5) == [second]
    worker.stop_chunk(second)
    assert second.job.get_status() == JobStatus.STOPPED
    assert counts(jobs) == (0, 1, 1, 0)
    assert list(worker.leases.values()) == [first]
