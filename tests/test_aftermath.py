"""What a dead worker held is back in its queue at once, wherever in its taking it died."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from queue_tools import MODEL, FakeFolder, beat, counts, queue, take, take_all
from rq.job import Job, JobStatus
from waiting import wait_for

from trbatch import recovery
from trbatch.aftermath import Settling, settle
from trbatch.deaths import judge
from trbatch.flight import FlightRecord
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue
from trbatch.queue_names import CLAIM, chunk_id


class Died(BaseException):
    """No `except` of the worker's catches a death, and no `finally` says anything to the queue."""


class Mortal:
    """A worker that dies instead of saying what it was going to say after `commands` others."""

    def __init__(self, jobs: JobQueue) -> None:
        self.flight = FlightRecord.create()
        self.commands: int | None = None
        self._connection = redis.Redis.from_url(jobs.url)
        self._make_mortal(self._connection.connection_pool)
        queues = [jobs.queue(name) for name in MODEL.queue_names]
        self.worker = LeaseWorker(self._connection, "mortal", queues, self.flight)
        self.worker.open()

    def _make_mortal(self, pool: redis.ConnectionPool) -> None:
        mortal = self

        class Connection(pool.connection_class):  # type: ignore[misc, name-defined]
            def send_packed_command(self, command: Any, check_health: bool = True) -> None:
                if mortal.commands == 0:
                    raise Died
                if mortal.commands is not None:
                    mortal.commands -= 1
                super().send_packed_command(command, check_health)

        pool.connection_class = Connection

    def dies_taking(self, jobs: JobQueue, commands: int) -> bool:
        """Whether it had more to say than these commands until the chunk was its own."""
        self.commands = commands
        try:
            assert self.worker.take(queue(jobs)) is not None
        except Died:
            return True
        return False

    def close(self) -> None:
        self.commands = None
        self.worker.leave()  # without a word: what it is in Redis is for `settle` to remove
        self.flight.close()


@contextlib.contextmanager
def mortal(jobs: JobQueue) -> Iterator[Mortal]:
    found = Mortal(jobs)
    try:
        yield found
    finally:
        found.close()


def dies_after(jobs: JobQueue, commands: int) -> bool:
    """A worker dies after so many commands, and another has its chunk at once.

    Returns:
        Whether it died at all; else it took its chunk.
    """
    jobs.connection.flushall()
    jobs.enqueue(FakeFolder(), [0])
    with mortal(jobs) as one:
        died = one.dies_taking(jobs, commands)
        begun = counts(jobs)[1]
        settling = Settling(jobs.url, one.flight, judge(-9, hung=False, out_of_memory=False))
        wait_for(lambda: settling.over)
        assert counts(jobs) == (1, 0, 0, 0)
        assert jobs.connection.llen(queue(jobs).key) == 1
        assert jobs.connection.llen(queue(jobs).intermediate_queue_key) == 0
        assert jobs.workers() == []
    with mortal(jobs) as other:
        found = take(jobs, other.worker)
        assert found.chunk == 0
        assert found.attempt == 1 + begun, "as if its lease had run out"
        assert other.worker.finish(found, {})
    assert counts(jobs) == (0, 0, 0, 1)
    return died


def test_wherever_in_its_taking_a_worker_dies_its_chunk_is_back_at_once(jobs: JobQueue) -> None:
    deaths = 0
    while dies_after(jobs, deaths):
        deaths += 1
    assert deaths >= 6, "a pop, a claim, a lease, and what is asked between them"


def test_only_what_it_was_taking_is_released(
    jobs: JobQueue, worker: LeaseWorker, other: LeaseWorker
) -> None:
    """Another that is in the middle of its own taking keeps what it has claimed."""
    folder = FakeFolder()
    jobs.enqueue(folder, [0, 1, 2])
    kept = take(jobs, other)
    claim = CLAIM + chunk_id(folder, 1)
    jobs.connection.lmove(queue(jobs).key, queue(jobs).intermediate_queue_key)
    jobs.connection.set(claim, other.name, ex=10)
    with mortal(jobs) as one:
        assert one.dies_taking(jobs, 4)
        assert settle(jobs, one.flight, "SIGKILL", own=False).chunks == 1
        assert jobs.connection.get(claim) == other.name.encode()
        assert other.holds(kept)
    assert take_all(jobs, worker) == [2]


def test_an_id_whose_claimant_died_unseen_is_not_lost(
    jobs: JobQueue, worker: LeaseWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease is back while its claim still stands: whoever pops it then must not drop it."""
    folder = FakeFolder()
    jobs.enqueue(folder, [0])
    claim = CLAIM + chunk_id(folder, 0)
    jobs.connection.set(claim, "dead", ex=10)
    assert worker.take(queue(jobs)) is None
    jobs.connection.delete(claim)  # it runs out
    monkeypatch.setattr("trbatch.chunk_job.STUCK_S", 0)
    beat(worker)
    beat(worker)
    assert take(jobs, worker).chunk == 0


def test_a_lease_by_half_whose_claim_ran_out_is_undone(jobs: JobQueue, worker: LeaseWorker) -> None:
    """Else it would run out one day and take the chunk away from whoever has it then."""
    jobs.enqueue(FakeFolder(), [0])
    started = queue(jobs).started_job_registry.key
    commands = half = 0
    while not half:
        with mortal(jobs) as one:
            assert one.dies_taking(jobs, commands)
            commands += 1
            half = jobs.connection.zcard(started)
            jobs.connection.delete(CLAIM + chunk_id(FakeFolder(), 0))
            settle(jobs, one.flight, "SIGKILL", own=False)
    assert half == 1 and jobs.connection.zcard(started) == 0
    kept = take(jobs, worker)
    assert worker.holds(kept) and counts(jobs) == (0, 1, 0, 0)


def test_a_lease_that_is_known_keeps_its_suspects(jobs: JobQueue) -> None:
    """It is put back as such, though its worker was just popping the same id once more."""
    jobs.enqueue(FakeFolder(), [0])
    with mortal(jobs) as one:
        held = take(jobs, one.worker)
        jobs.connection.set(CLAIM + held.job.id, "mortal", ex=10)
        one.flight.note_running([(held.id, 5, 0)])
        after = settle(jobs, one.flight, "SIGSEGV", own=True)
        assert (after.chunks, after.suspects) == (1, 1)
    with mortal(jobs) as other:
        again = take(jobs, other.worker)
        assert again.suspects and again.attempt == 2


def test_what_is_strange_in_one_queue_keeps_nothing_in_another(
    jobs: JobQueue, other: LeaseWorker
) -> None:
    jobs.enqueue(FakeFolder(), [0, 1])
    urgent = jobs.queue(MODEL.queue_of("high"))
    jobs.connection.set(urgent.intermediate_queue_key, "no list")
    jobs.connection.set(urgent.started_job_registry.key, "no set")
    with mortal(jobs) as one:
        take(jobs, one.worker)
        assert settle(jobs, one.flight, "SIGKILL", own=False).chunks == 1
        lost = take(jobs, one.worker)
        jobs.connection.zadd(lost.job.started_job_registry.key, {lost.execution.composite_key: 1})
        other.queues = [urgent, queue(jobs)]
        beat(other)
    assert counts(jobs) == (2, 0, 0, 0)


def test_an_id_that_comes_back_while_its_copy_is_passed_over_is_not_lost(
    jobs: JobQueue, worker: LeaseWorker, other: LeaseWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its state and its removal, another hands it back and a third pops it."""
    jobs.enqueue(FakeFolder(), [0])
    held = take(jobs, other)
    jobs.connection.rpush(queue(jobs).key, held.job.id)

    def status(job: Job) -> JobStatus | None:
        found = job.get_status(refresh=True)
        assert found == JobStatus.STARTED
        popped = queue(jobs).intermediate_queue_key
        jobs.connection.lrem(popped, 1, job.id)  # a clean-up takes it for stale
        assert recovery.give_back(queue(jobs), job.id, held.id)
        jobs.connection.lmove(queue(jobs).key, popped)
        return found

    monkeypatch.setattr(worker, "_status", status)
    assert worker.take(queue(jobs)) is None
    monkeypatch.undo()
    assert jobs.connection.lrange(queue(jobs).intermediate_queue_key, 0, -1), "it waits there"
    monkeypatch.setattr("trbatch.chunk_job.STUCK_S", 0)
    beat(worker)
    beat(worker)
    assert take(jobs, worker).chunk == 0
