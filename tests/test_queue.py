"""The queue: chunks go in once, come out in order, each model's apart."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from queue_tools import MODEL, FakeFolder, counts, queue, take, take_all
from rq.serializers import JSONSerializer

from trbatch.chunk_job import RETRIES, ChunkJob
from trbatch.lease import LeaseWorker
from trbatch.queue import BATCH, FUNCTION, JobQueue
from trbatch.queue_control import forget, withdraw
from trbatch.queue_names import ModelKey, chunk_id


def test_chunks_come_out_in_order_and_end_as_finished(jobs: JobQueue, worker: LeaseWorker) -> None:
    assert jobs.enqueue(FakeFolder(), [0, 1, 2]) == 3
    assert counts(jobs) == (3, 0, 0, 0)
    first = take(jobs, worker)
    assert (first.folder, first.chunk, first.generation) == ("/store/job", 0, 0)
    assert first.attempt == 1
    assert counts(jobs) == (2, 1, 0, 0)
    assert worker.finish(first, {"rows": 5})
    assert take_all(jobs, worker) == [1, 2]
    assert counts(jobs) == (0, 2, 0, 1)


def test_enqueueing_twice_adds_nothing(jobs: JobQueue, worker: LeaseWorker) -> None:
    folder = FakeFolder()
    jobs.enqueue(folder, [0, 1])
    take(jobs, worker)
    assert jobs.enqueue(folder, [0, 1, 2]) == 1, "0 runs, 1 waits"
    assert take_all(jobs, worker) == [1, 2]


def test_who_sleeps_longer_than_its_lock_lives_enqueues_all_the_same(
    jobs: JobQueue, worker: LeaseWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by Ctrl-Z in the middle, while another command enqueues the same chunks."""
    folder, another = FakeFolder(), JobQueue.connect(jobs.url)
    statuses = jobs._statuses

    def sleepy(ids: Sequence[str]) -> dict[str, Any]:
        found = statuses(ids)
        if len(ids) == BATCH:
            (lock,) = jobs.connection.keys("trbatch:enqueue:*")
            jobs.connection.delete(lock)
            another.enqueue(folder, [0, 1])
        return found

    monkeypatch.setattr(jobs, "_statuses", sleepy)
    chunks = list(range(2 * BATCH))
    assert jobs.enqueue(folder, chunks) == len(chunks)
    another.close()
    assert sorted(take_all(jobs, worker)) == chunks, "each of them is leased once"


def test_a_finished_chunk_can_be_enqueued_again(jobs: JobQueue, worker: LeaseWorker) -> None:
    folder = FakeFolder()
    jobs.enqueue(folder, [0])
    worker.finish(take(jobs, worker), {})
    assert jobs.enqueue(folder, [0]) == 1
    assert counts(jobs) == (1, 0, 0, 0)
    assert take(jobs, worker).attempt == 1


def test_a_failed_chunk_can_be_enqueued_again_with_all_its_retries(
    jobs: JobQueue, worker: LeaseWorker
) -> None:
    folder = FakeFolder()
    jobs.enqueue(folder, [0])
    worker.fail(take(jobs, worker), ValueError("no"), final=True)
    assert counts(jobs) == (0, 0, 1, 0)
    assert jobs.enqueue(folder, [0]) == 1
    assert counts(jobs) == (1, 0, 0, 0)
    assert queue(jobs).failed_job_registry.get_job_ids() == []
    again = take(jobs, worker)
    assert again.job.retries_left == RETRIES


def test_jobs_of_one_name_in_two_stores_do_not_meet(jobs: JobQueue, worker: LeaseWorker) -> None:
    one, other = FakeFolder(path="/a/job"), FakeFolder(path="/b/job")
    assert jobs.enqueue(one, [0]) == jobs.enqueue(other, [0]) == 1
    assert [take(jobs, worker).folder for _ in range(2)] == ["/a/job", "/b/job"]
    assert counts(jobs, one) == counts(jobs, other) == (0, 1, 0, 0)


def test_taking_a_job_out_of_the_queue_leaves_its_namesake_in_another_store(
    jobs: JobQueue, worker: LeaseWorker
) -> None:
    one, other = FakeFolder(path="/a/job"), FakeFolder(path="/b/job")
    for folder in (one, other):
        jobs.enqueue(folder, [0, 1])
    assert withdraw(jobs, one) == 2
    assert (counts(jobs, one), counts(jobs, other)) == ((0, 0, 0, 0), (2, 0, 0, 0))
    forget(jobs, one)
    assert take(jobs, worker).folder == take(jobs, worker).folder == "/b/job"


def test_a_new_generation_of_chunks_is_queued_beside_the_old(
    jobs: JobQueue, worker: LeaseWorker
) -> None:
    jobs.enqueue(FakeFolder(generation=0), [0])
    assert jobs.enqueue(FakeFolder(generation=1), [0]) == 1
    assert [take(jobs, worker).generation for _ in range(2)] == [0, 1]


def test_what_failed_in_an_older_generation_counts_no_more(
    jobs: JobQueue, worker: LeaseWorker
) -> None:
    jobs.enqueue(FakeFolder(generation=0), [0, 1])
    worker.fail(take(jobs, worker), ValueError("no"), final=True)
    assert counts(jobs) == (1, 0, 1, 0)
    jobs.enqueue(FakeFolder(generation=1), [0])
    assert counts(jobs) == (2, 0, 0, 0), "the other old one still waits, and must be seen to wait"


@pytest.mark.parametrize("name", ["plain", "nightly 2026-01-02.v2", "a:b/c", "ü" * 300])
def test_any_job_name_makes_an_id_that_rq_takes(
    jobs: JobQueue, worker: LeaseWorker, name: str
) -> None:
    folder = FakeFolder(id=name)
    assert jobs.enqueue(folder, [7]) == 1
    assert take(jobs, worker).chunk == 7
    assert jobs.counts(folder).started == 1


def test_a_thousand_chunks_are_enqueued_in_a_second(jobs: JobQueue) -> None:
    """50,000 rows a second at 256 rows a chunk is 195 chunks a second; this asks for 1,000."""
    begin = time.perf_counter()
    assert jobs.enqueue(FakeFolder(), range(3000)) == 3000
    assert time.perf_counter() - begin < 3.0
    assert counts(jobs) == (3000, 0, 0, 0)


def test_only_references_lie_in_redis(jobs: JobQueue) -> None:
    jobs.enqueue(FakeFolder(), [3])
    job = ChunkJob.fetch(chunk_id(FakeFolder(), 3), jobs.connection, JSONSerializer)
    assert json.loads(job.data) == [FUNCTION, None, ["/store/job", 3, 0], {}]
    assert job.timeout == -1


def test_each_model_and_revision_has_its_own_queue() -> None:
    keys = [
        ModelKey("maker/model"),
        ModelKey("maker/model", "v2"),
        ModelKey("other/model"),
        ModelKey("maker/Model"),
    ]
    assert len({key.queue_name for key in keys}) == 4
    assert all(key.queue_name.startswith("trbatch-model-") for key in keys)


def test_a_local_model_has_one_name_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert ModelKey.of("tiny") == ModelKey.of(str(tmp_path / "tiny"))
    assert ModelKey.of("maker/absent").name == "maker/absent"


def test_a_folder_called_like_a_hub_name_changes_nothing(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "maker" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelKey.of("maker/model") == MODEL
    jobs.enqueue(FakeFolder(), [0])
    assert take(jobs, worker).chunk == 0
    (tmp_path / "maker" / "model" / "config.json").touch()
    assert ModelKey.of("maker/model") != MODEL, "now it is a model"
    jobs.enqueue(FakeFolder(), [1])
    assert take(jobs, worker).chunk == 1, "a manifest's name is final"


def test_a_worker_gets_no_chunk_of_another_model(jobs: JobQueue, worker: LeaseWorker) -> None:
    jobs.enqueue(FakeFolder(id="b", path="/store/b", model="maker/big"), [0])
    assert worker.take(queue(jobs)) is None
    assert jobs.waiting(ModelKey("maker/big")) == 1
    assert jobs.waiting(MODEL) == 0


def test_the_longest_waiting_model_is_named(jobs: JobQueue, worker: LeaseWorker) -> None:
    assert jobs.longest_waiting() is None
    jobs.enqueue(FakeFolder(path="/store/v2", revision="v2"), [0])
    jobs.enqueue(FakeFolder(), [0])
    assert jobs.longest_waiting() == ModelKey(MODEL.name, "v2")
    worker.take(jobs.queue(ModelKey(MODEL.name, "v2").queue_name))
    assert jobs.longest_waiting() == MODEL


def test_queues_and_workers_are_listed(jobs: JobQueue, worker: LeaseWorker) -> None:
    jobs.enqueue(FakeFolder(), [0, 1, 2])
    take(jobs, worker)
    worker.fail(take(jobs, worker), ValueError("no"), final=True)
    worker.say("busy", str(MODEL))
    (info,) = jobs.queues()
    assert (info.model, info.queued, info.started, info.failed, info.workers) == (MODEL, 1, 1, 1, 1)
    (found,) = jobs.workers()
    assert (found.name, found.model, found.chunks, found.failed) == ("worker", MODEL.name, 1, 1)
    assert found.pid > 0
