"""The queue: chunks go in once, come out leased, and nothing that Redis says is ever run."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from rq import Queue
from rq.command import send_stop_job_command
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from trbatch import lease as lease_module
from trbatch.chunk_job import ChunkJob, ChunkQueue
from trbatch.errors import Unreachable
from trbatch.lease import BadChunk, Lease, LeaseWorker
from trbatch.queue import FUNCTION, RETRIES, JobQueue, ModelKey, chunk_id

MODEL = ModelKey("maker/model")


@dataclass
class FakeFolder:
    """As much of a job folder as the queue looks at."""

    id: str = "job"
    path: str = "/store/job"
    model: str = MODEL.name
    revision: str = ""
    generation: int = 0
    manifest: Any = field(init=False)

    def __post_init__(self) -> None:
        self.manifest = SimpleNamespace(
            model=self.model, revision=self.revision, generation=self.generation
        )


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    with JobQueue.connect(redis_url) as found:
        yield found


@pytest.fixture
def worker(jobs: JobQueue) -> Iterator[LeaseWorker]:
    yield from open_worker(jobs, "worker")


@pytest.fixture
def other(jobs: JobQueue) -> Iterator[LeaseWorker]:
    yield from open_worker(jobs, "other")


def open_worker(jobs: JobQueue, name: str) -> Iterator[LeaseWorker]:
    with redis.Redis.from_url(jobs.url) as connection:
        found = LeaseWorker(connection, name, [jobs.queue(MODEL.queue_name)])
        found.open()
        yield found
        found.close()


def queue(jobs: JobQueue) -> ChunkQueue:
    return jobs.queue(MODEL.queue_name)


def take(jobs: JobQueue, worker: LeaseWorker) -> Lease:
    found = worker.take(queue(jobs))
    assert found is not None
    return found


def take_all(jobs: JobQueue, worker: LeaseWorker) -> list[int]:
    chunks = []
    while (found := worker.take(queue(jobs))) is not None:
        chunks.append(found.chunk)
    return chunks


def counts(jobs: JobQueue, job: str = "job") -> tuple[int, int, int, int]:
    return dataclasses.astuple(jobs.counts(job))


def beat(worker: LeaseWorker) -> list[Lease]:
    """A beat that is due."""
    worker._last_beat -= lease_module.BEAT_S
    return worker.beat()


def run_out(jobs: JobQueue, found: Lease) -> None:
    """Let a lease run out, as if its worker had been silent for long."""
    key = found.job.started_job_registry.key
    jobs.connection.zadd(key, {found.execution.composite_key: time.time() - 1})


# --- putting in ---


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
    jobs.enqueue(FakeFolder(path="/a/job"), [0])
    assert jobs.enqueue(FakeFolder(path="/b/job"), [0]) == 1
    assert [take(jobs, worker).folder for _ in range(2)] == ["/a/job", "/b/job"]


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
    jobs.enqueue(FakeFolder(path="/elsewhere/job"), [0])
    worker.fail(take(jobs, worker), ValueError("no"), final=True)
    assert counts(jobs) == (2, 0, 1, 0)
    jobs.enqueue(FakeFolder(generation=1), [0])
    assert counts(jobs) == (3, 0, 0, 0), "the other old one still waits, and must be seen to wait"


@pytest.mark.parametrize("name", ["plain", "nightly 2026-01-02.v2", "a:b/c", "ü" * 300])
def test_any_job_name_makes_an_id_that_rq_takes(
    jobs: JobQueue, worker: LeaseWorker, name: str
) -> None:
    assert jobs.enqueue(FakeFolder(id=name), [7]) == 1
    assert take(jobs, worker).chunk == 7
    assert jobs.counts(name).started == 1


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


# --- one queue per model ---


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


# --- leases ---


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
    assert jobs.failures("job") == {4: "ValueError: cannot read it"}


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
    deadline = time.monotonic() + 5
    while not (asked := worker.stopped()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert asked == [second]
    worker.stop_chunk(second)
    assert second.job.get_status() == JobStatus.STOPPED
    assert counts(jobs) == (0, 1, 1, 0)
    assert list(worker.leases.values()) == [first]


# --- what Redis says is not believed ---


def push(jobs: JobQueue, job: ChunkJob) -> None:
    found = queue(jobs)
    found.enqueue_job(job)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("os.system", ["touch {file}"]),
        ("os.system", ["/store/job", 0, 0]),
        (FUNCTION, ["touch {file}"]),
        (FUNCTION, ["/store/job", "0", 0]),
        (FUNCTION, ["/store/job", -1, 0]),
        (FUNCTION, []),
    ],
)
def test_an_entry_that_is_no_chunk_fails_and_runs_nothing(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path, function: str, arguments: list[Any]
) -> None:
    marker = tmp_path / "marker"
    arguments = [str(a).format(file=marker) if isinstance(a, str) else a for a in arguments]
    plain = Queue(MODEL.queue_name, connection=jobs.connection, serializer=JSONSerializer)
    job = plain.enqueue(function, args=arguments, retry=None)
    jobs.enqueue(FakeFolder(), [0])
    assert take(jobs, worker).chunk == 0, "the chunk behind it is handed out"
    assert job.get_status() == JobStatus.FAILED
    assert not marker.exists()


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("where", ["data", "meta", "status", "no hash"])
def test_a_poisoned_entry_runs_nothing_and_stops_nothing(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path, where: str
) -> None:
    marker = tmp_path / "marker"
    folder = FakeFolder()
    jobs.enqueue(folder, [0, 1])
    key = ChunkJob.key_for(chunk_id(folder, 0))
    if where == "no hash":
        jobs.connection.delete(key)
    else:
        jobs.connection.hset(key, where, pickle.dumps(_Bomb(marker)))
    assert 1 in take_all(jobs, worker)
    assert not marker.exists()


def test_callbacks_and_webhooks_of_an_entry_are_ignored(
    jobs: JobQueue, worker: LeaseWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq.webhook.Webhook.send", lambda *a, **k: pytest.fail("a webhook"))
    folder = FakeFolder()
    jobs.enqueue(folder, [0, 1])
    hooks = [
        {"url": "http://localhost:1/", "job_status": status} for status in ("finished", "failed")
    ]
    for chunk in (0, 1):
        key = ChunkJob.key_for(chunk_id(folder, chunk))
        jobs.connection.hset(
            key,
            mapping={
                "success_callback_name": "builtins.exit",
                "failure_callback_name": "builtins.exit",
                "stopped_callback_name": "builtins.exit",
                "webhooks": json.dumps(hooks),
            },
        )
    assert worker.finish(take(jobs, worker), {})
    assert worker.fail(take(jobs, worker), BadChunk("no"), final=True)
    assert counts(jobs) == (0, 0, 1, 1)


def test_the_function_of_a_chunk_cannot_be_had(jobs: JobQueue) -> None:
    jobs.enqueue(FakeFolder(), [0])
    job = ChunkJob.fetch(chunk_id(FakeFolder(), 0), jobs.connection, JSONSerializer)
    with pytest.raises(PermissionError):
        job.perform()


# --- connections ---


def test_without_a_url_the_embedded_server_is_started_and_used(home: Path) -> None:
    with JobQueue.connect() as found:
        assert found.url.startswith("unix://")
        assert found.connection.ping()


def test_the_nearer_url_wins(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    away = "unix:///nowhere/at/all"
    monkeypatch.setenv("REDIS_URL", away)
    monkeypatch.setenv("TRBATCH_REDIS_URL", redis_url)
    with JobQueue.connect() as found:
        assert found.url == redis_url
    monkeypatch.setenv("TRBATCH_REDIS_URL", away)
    with JobQueue.connect(redis_url) as found:
        assert found.url == redis_url


def test_a_server_that_is_away_is_unreachable_and_its_password_stays_secret() -> None:
    with pytest.raises(Unreachable) as caught:
        JobQueue.connect("redis://me:s3cr%40t@localhost:1/0")
    assert caught.value.exit_code == 75
    text = f"{caught.value} {caught.value.hint}"
    assert "redis://me:***@localhost:1/0" in text
    assert "s3cr" not in text


def test_a_wrong_password_is_unreachable(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        connection.config_set("requirepass", "right")
        with pytest.raises(Unreachable):
            JobQueue.connect(f"{redis_url}?password=wrong")
        connection.auth("right")
        connection.config_set("requirepass", "")


def test_the_password_is_not_in_the_repr(redis_url: str) -> None:
    with JobQueue.connect(f"{redis_url}?db=1") as found:
        found.url = "redis://me:secret@host"
        assert "secret" not in repr(found)


def test_the_client_side_imports_no_torch() -> None:
    code = "import sys, trbatch.queue; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
