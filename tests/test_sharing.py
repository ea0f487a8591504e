"""The shared matrix: packed changes through a real server, and equal copies at the end."""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_worker import Background, config, submit, wait_for

from trbatch import matrix_stream, sharing
from trbatch.engine import replica
from trbatch.engine.calibration import Calibration
from trbatch.engine.host_rows import HostRows
from trbatch.engine.matrix import Contexts, Matrix
from trbatch.engine.paths import PathCounts
from trbatch.engine.replica import BadDelta, Copies, Delta, unpack
from trbatch.engine.sequence import TaskKey
from trbatch.engine.tasks import Tasks
from trbatch.engine_thread import Changes, EngineThread, Whole
from trbatch.matrix_stream import ENTRIES_A_SNAPSHOT, MatrixStream
from trbatch.queue import JobQueue
from trbatch.sharing import Sharing
from trbatch.worker import run_worker

CPU = torch.device("cpu")
VOCAB = 40
KEY = "trbatch:matrix:test"
TASK = TaskKey("task")


def small_matrix() -> Matrix:
    return Matrix(
        slots=1, vocab_size=VOCAB, tasks=2, device=CPU, candidates=4, own_rows=16, pair_rows=64
    )


def write(matrix: Matrix, seed: int, task: int = 1, count: int = 12) -> None:
    """Some rows at random, as a step would write them."""
    generator = torch.Generator().manual_seed(seed)
    at = Contexts(
        slots=torch.zeros(count, dtype=torch.long), tasks=torch.full((count,), task),
        tokens=torch.randint(0, VOCAB, (count, 3), generator=generator),
    )  # fmt: skip
    rows = torch.randint(0, VOCAB, (count, 4), generator=generator)
    matrix.write(at, rows, torch.arange(count), torch.arange(count))


def same(one: Matrix, other: Matrix, task: int = 1) -> bool:
    """Whether a task's rows are the same, also behind pairs."""
    there = one.pair_keys[task] >= 0
    return (
        torch.equal(one.shared[task], other.shared[task])
        and torch.equal(one.pair_keys[task], other.pair_keys[task])
        and torch.equal(one.pair_rows[task][there], other.pair_rows[task][there])
    )


# --- deltas ---


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=4))
def test_changes_packed_and_applied_make_the_same_rows(seeds: list[int]) -> None:
    one, other = small_matrix(), small_matrix()
    for seed in seeds:
        write(one, seed)
    packed = replica.take_changes(one, 1).pack()
    replica.apply(other, 1, unpack(packed, other))
    assert same(one, other)
    assert not len(replica.take_changes(one, 1)), "they are taken once"
    assert not len(replica.take_changes(other, 1)), "what others changed is not ours to send"


def test_what_the_cpus_rows_write_is_a_change_too() -> None:
    one, other = small_matrix(), small_matrix()
    rows = HostRows.of(one)
    rows.write_shared(1, [5, 6, 7], np.array([1, 2, 3, 4], dtype=np.int32))
    replica.apply(other, 1, replica.take_changes(one, 1))
    assert same(one, other)
    assert other.shared[1, 5].tolist() == [1, 2, 3, 4]


def test_a_row_that_changed_here_and_was_not_sent_stays() -> None:
    here, there = small_matrix(), small_matrix()
    write(there, 1)
    write(here, 2)
    before = here.shared[1].clone()
    mine = here.changed[1].clone()
    replica.apply(here, 1, replica.take_changes(there, 1))
    assert torch.equal(here.shared[1][mine], before[mine])
    assert torch.equal(here.shared[1][~mine], there.shared[1][~mine])


def test_what_could_not_be_sent_is_sent_the_next_time() -> None:
    one = small_matrix()
    write(one, 1)
    lost = replica.take_changes(one, 1)
    replica.put_back(one, 1, lost)
    again = replica.take_changes(one, 1)
    assert again.tokens.tolist() == lost.tokens.tolist()
    assert sorted(again.pair_keys.tolist()) == sorted(lost.pair_keys.tolist())


def test_another_task_is_not_touched() -> None:
    one, other = small_matrix(), small_matrix()
    write(one, 1, task=0)
    write(one, 2, task=1)
    replica.apply(other, 1, replica.take_changes(one, 1))
    assert (other.shared[0] == -1).all()


def delta(**changes: Any) -> Delta:
    fields = {
        "tokens": np.array([3], np.int32), "rows": np.array([[1, 2, 3, -1]], np.int32),
        "pair_keys": np.array([7], np.int64), "pair_rows": np.array([[1, 2, 3, 4]], np.int32),
    }  # fmt: skip
    return Delta(**(fields | changes))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no delta", zlib.compress(b""), zlib.compress(b"TRD1" + b"\xff" * 12),
        delta().pack()[:-4], zlib.compress(zlib.decompress(delta().pack())[:-1]),
        zlib.compress(zlib.decompress(delta().pack()) + b"\0"),
        zlib.compress(b"\0" * (1 << 24)),
        delta(rows=np.ones((1, 3), np.int32), pair_rows=np.ones((1, 3), np.int32)).pack(),
        delta(tokens=np.array([VOCAB], np.int32)).pack(),
        delta(tokens=np.array([-1], np.int32)).pack(),
        delta(rows=np.array([[1, 2, 3, VOCAB]], np.int32)).pack(),
        delta(rows=np.array([[1, 2, 3, -2]], np.int32)).pack(),
        delta(pair_keys=np.array([VOCAB * VOCAB], np.int64)).pack(),
        delta(pair_rows=np.array([[1, 2, 3, 1 << 30]], np.int32)).pack(),
    ],
)  # fmt: skip
def test_what_is_no_delta_for_this_matrix_is_refused(data: bytes) -> None:
    unpack(delta().pack(), small_matrix())
    with pytest.raises(BadDelta):
        unpack(data, small_matrix())


# --- the stream ---


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    connection = redis.Redis.from_url(redis_url)
    yield connection
    connection.close()


class Copy:
    """A worker's copy without its worker."""

    def __init__(self, server: redis.Redis) -> None:
        self.matrix = small_matrix()
        calibration, paths = Calibration(2, CPU), [PathCounts(), PathCounts()]
        self.tasks = Tasks(self.matrix, calibration, paths, places=2, model="m")
        self.tasks.open(TaskKey("other"), busy=set())
        self.index = self.tasks.open(TASK, busy=set()).index
        self.copies = Copies(self.matrix, self.tasks)
        self.stream = MatrixStream(server, KEY)

    def join(self) -> None:
        whole = self.stream.join(self.copies.whole(TASK))
        self.copies.merge(TASK, whole, [], self.stream.position)

    def exchange(self) -> None:
        news = self.stream.exchange(self.copies.take(TASK))
        assert not news.lost
        self.copies.merge(TASK, news.whole, news.deltas, self.stream.position)
        if self.stream.wants_snapshot():
            self.stream.write_snapshot(self.copies.whole(TASK), self.copies.position(TASK))


@pytest.mark.parametrize("seed", range(6))
def test_copies_end_equal_whatever_the_order_and_a_late_one_has_it_all(
    server: redis.Redis, seed: int
) -> None:
    order = random.Random(seed)
    copies = [Copy(server) for _ in range(3)]
    write(copies[0].matrix, 999)  # it comes with a saved matrix
    for copy in copies:
        copy.join()
    assert same(copies[0].matrix, copies[2].matrix), "the first one's is everybody's beginning"
    for step in range(60):
        copy = order.choice(copies)
        if order.random() < 0.6:
            write(copy.matrix, seed * 1000 + step)
        else:
            copy.exchange()
    late = Copy(server)
    late.join()
    for copy in [*copies, late] * 2:
        copy.exchange()
    for other in (*copies[1:], late):
        assert same(copies[0].matrix, other.matrix)
    assert (copies[0].matrix.shared[1] >= 0).any()


def test_what_is_kept_on_the_server_is_bounded(server: redis.Redis) -> None:
    one, other = Copy(server), Copy(server)
    one.join()
    other.join()
    for step in range(4 * ENTRIES_A_SNAPSHOT):
        write(one.matrix, step)
        one.exchange()
        server.delete(f"{KEY}:turn")  # half a minute has passed
    assert server.xlen(KEY) <= ENTRIES_A_SNAPSHOT + 1
    # What was trimmed before the other one read it, the snapshot has.
    write(other.matrix, 5000)
    for copy in (other, one, other):
        copy.exchange()
    assert same(one.matrix, other.matrix)
    assert 0 < server.ttl(KEY) <= 24 * 3600
    assert 0 < server.ttl(f"{KEY}:snapshot") <= 24 * 3600


def test_only_one_worker_writes_the_next_snapshot(server: redis.Redis) -> None:
    copies = [Copy(server), Copy(server)]
    for copy in copies:
        copy.join()
        copy.stream._since_snapshot = ENTRIES_A_SNAPSHOT
    assert [copy.stream.wants_snapshot() for copy in copies] == [True, False]


def test_a_wiped_server_is_noticed_and_joined_again(server: redis.Redis) -> None:
    copy = Copy(server)
    copy.join()
    write(copy.matrix, 1)
    copy.exchange()
    server.flushall()
    write(copy.matrix, 2)
    assert copy.stream.exchange(copy.copies.take(TASK)).lost
    copy.join()
    other = Copy(server)
    other.join()
    assert same(copy.matrix, other.matrix)


def test_entries_and_snapshots_that_cannot_be_read_are_skipped(
    server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = Copy(server), Copy(server)
    one.join()
    other.join()
    server.xadd(KEY, {"d": b"hostile"})
    server.xadd(KEY, {"x": b"nothing of ours"})
    server.xadd(KEY, {"d": delta(tokens=np.array([VOCAB + 5], np.int32)).pack()})
    write(one.matrix, 1)
    for copy in (one, other):
        copy.exchange()
    assert same(one.matrix, other.matrix)
    assert "skipped" in caplog.text
    server.set(f"{KEY}:snapshot", b"not-a-position\nnonsense")
    late = Copy(server)
    late.join()
    late.exchange()
    assert same(one.matrix, late.matrix)


# --- workers ---


class LoadedTiny:
    """Makes engines of one tiny model and remembers them."""

    def __init__(self) -> None:
        self.model = tiny.loaded("llama")
        self.engines: list[Any] = []

    def __call__(self, _: Any) -> Any:
        self.engines.append(tiny.engine(self.model, max_num_seqs=2, tree_size=0, max_tree_size=9))
        return self.engines[-1]


def prompts(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": " ".join(map(str, ids))} for ids in tiny.repetitive(count, length=20, seed=3)
    ]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exchanges every tenth of a second; step costs are timed in a cache of their own."""
    monkeypatch.setattr(sharing, "EVERY_S", 0.1)
    monkeypatch.setattr(sharing, "RETRY_S", 0.2)
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    with JobQueue.connect(redis_url) as found:
        yield found


def task_of(engine: Any, name: str) -> Any:
    """The open task of this name, whatever its folder; None if there is none."""
    return next((t for key, t in engine._tasks._tasks.items() if key.name == name), None)


def rows_of_task(engine: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    task, matrix = task_of(engine, name), engine._matrix
    assert task is not None
    keys = matrix.pair_keys[task.index]
    rows = matrix.pair_rows[task.index].masked_fill((keys < 0)[:, None], -1)
    return matrix.shared[task.index], keys, rows


def equal(one: Any, other: Any, name: str) -> bool:
    pairs = zip(rows_of_task(one, name), rows_of_task(other, name), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_two_workers_of_a_job_end_with_the_same_matrix_and_a_late_one_has_it(
    jobs: JobQueue, tmp_path: Path, quick: None
) -> None:
    load = LoadedTiny()
    job = submit(
        jobs, tmp_path, prompts(24), chunk_size=2, task="night", sampling={"max_tokens": 40}
    )
    workers = [Background(jobs.url, load) for _ in range(2)]
    try:
        wait_for(lambda: job.progress().complete, 60)
        one, other = load.engines
        assert one.stats()["tokens"] and other.stats()["tokens"], "one did all the work"
        wait_for(lambda: equal(one, other, "night"))
        assert (rows_of_task(one, "night")[0] >= 0).any()
        late = Background(jobs.url, load)
        workers.append(late)
        more = submit(jobs, tmp_path, prompts(1), name="more", task="night")
        wait_for(lambda: more.progress().complete and len(load.engines) == 3)
        # Whoever decoded it: the third one takes part as soon as it is given a chunk of the task.
        while task_of(load.engines[2], "night") is None:
            again = submit(jobs, tmp_path, prompts(8), name=f"m{time.monotonic_ns()}", task="night",
                           chunk_size=1)  # fmt: skip
            wait_for(lambda again=again: again.progress().complete)
        wait_for(lambda: equal(load.engines[2], one, "night") and equal(one, other, "night"))
    finally:
        for worker in workers:
            worker.stop()


def test_a_worker_without_the_server_decodes_on_and_shares_later(
    jobs: JobQueue, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    away = threading.Event()
    away.set()
    exchange = MatrixStream.exchange

    def failing(self: MatrixStream, data: bytes) -> Any:
        if away.is_set():
            raise redis.ConnectionError("nobody there")
        return exchange(self, data)

    monkeypatch.setattr(MatrixStream, "exchange", failing)
    load = LoadedTiny()
    job = submit(jobs, tmp_path, prompts(6), task="night", sampling={"max_tokens": 20})
    worker = Background(jobs.url, load)

    def streams() -> list[bytes]:
        return [key for key in jobs.connection.keys("trbatch:matrix:*") if key.count(b":") == 2]

    try:
        wait_for(lambda: job.progress().complete, 60)
        wait_for(lambda: "cannot be reached" in caplog.text)
        time.sleep(1.0)  # several tries
        assert caplog.text.count("cannot be reached") == 1, "said once"
        assert not streams()
        away.clear()
        wait_for(streams)
        # Nothing was lost: whoever joins now has what was learned meanwhile.
        wait_for(lambda: task_of(load.engines[0], "night").position != matrix_stream.BEGIN)
        engine = load.engines[0]
        copy = Matrix(slots=1, vocab_size=tiny.VOCAB, tasks=1, device=CPU)
        late = MatrixStream(jobs.connection, streams()[0].decode())
        whole = late.join(b"")
        news = late.exchange(b"")
        for data in (whole, *news.deltas):
            replica.apply(copy, 0, unpack(data, copy))
        assert torch.equal(copy.shared[0], rows_of_task(engine, "night")[0])
    finally:
        worker.stop()


def test_a_private_matrix_is_neither_shared_nor_saved(
    jobs: JobQueue, tmp_path: Path, quick: None
) -> None:
    load = LoadedTiny()
    job = submit(
        jobs, tmp_path, prompts(4), task="night", private_matrix=True,
        sampling={"max_tokens": 12},
    )  # fmt: skip
    worker = Background(jobs.url, load)
    try:
        wait_for(lambda: job.progress().complete, 60)
        time.sleep(0.5)
        assert task_of(load.engines[0], "night") is None
        assert task_of(load.engines[0], f"night (job {job.id} alone)") is not None
        assert not jobs.connection.keys("trbatch:matrix:*")
    finally:
        worker.stop()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_cold_job_takes_the_place_of_what_its_task_had_learned(
    jobs: JobQueue, tmp_path: Path, quick: None
) -> None:
    """Also in a worker that has the task open, and for the jobs that come after it."""
    rows = prompts(8)
    load = LoadedTiny()
    worker = Background(jobs.url, load)

    def decode(name: str, rows: list[dict[str, str]], **settings: Any) -> torch.Tensor:
        job = submit(jobs, tmp_path, rows, name=name, task="night",
                     sampling={"max_tokens": 4}, **settings)  # fmt: skip
        wait_for(lambda: jobs.counts(job.id).finished == len(job.manifest.chunk_samples), 60)
        engine = load.engines[0]
        wait_for(lambda: engine._tasks.get(job.task_key).position)
        task = engine._tasks.get(job.task_key)
        return (engine._matrix.shared[task.index, :, 0] >= 0).clone()

    try:
        warm = decode("warm", rows)
        cold = decode("cold", rows[:1], cold=True)
        gone = warm & ~cold
        assert gone.sum() > 10
        later = decode("later", rows[:1])
        # Where drafts were tried, later has a row or two of its own.
        assert (later & cold).sum() == cold.sum() and (later & gone).sum() < gone.sum() / 2
    finally:
        worker.stop()


def test_a_short_burst_shares_all_it_learned_and_does_not_linger(
    jobs: JobQueue, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "CLOSE_S", 60.0)
    waiting = JobQueue.waiting

    def slow(self: JobQueue, model: Any) -> int:
        time.sleep(0.3)  # so that the engine has answered by the time the worker ends
        return waiting(self, model)

    monkeypatch.setattr(JobQueue, "waiting", slow)
    load = LoadedTiny()
    job = submit(jobs, tmp_path, prompts(4), task="night", sampling={"max_tokens": 20})
    begin = time.monotonic()
    assert run_worker(config(jobs.url), load=load) == 0
    assert time.monotonic() - begin < 30.0
    stream = MatrixStream(
        jobs.connection, matrix_stream.stream_key(load.model.fingerprint, job.task_key)
    )
    copy = Matrix(slots=1, vocab_size=tiny.VOCAB, tasks=1, device=CPU)
    for data in (stream.join(b""), *stream.exchange(b"").deltas):
        replica.apply(copy, 0, unpack(data, copy))
    rows = rows_of_task(load.engines[0], "night")[0]
    assert (rows >= 0).any() and torch.equal(copy.shared[0], rows)


def test_what_is_learned_after_the_last_question_is_still_sent(
    jobs: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may end while the engine is being asked: then it is asked once more."""
    monkeypatch.setattr(sharing, "EVERY_S", 0.0)
    asked: list[str] = []
    task = TaskKey("night")

    class Asked:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: asked.append(name)

    shared = Sharing(Asked(), jobs)
    shared.open(task, "m")
    shared.heed(Whole(task, b"whole", ""))
    shared.tick()
    shared.finish(task)
    assert asked == ["send_whole", "merge", "send_changes"]
    shared.heed(Changes(task, b"", matrix_stream.BEGIN))
    assert asked[3:] == ["merge", "send_changes"]
    shared.heed(Changes(task, b"", matrix_stream.BEGIN))
    assert asked[5:] == ["merge", "save"]


def test_nobody_waits_for_an_engine_that_is_dead(jobs: JobQueue) -> None:
    thread = EngineThread(lambda _: pytest.fail("nothing is loaded"))
    thread.start()
    assert thread.alive
    thread.stop(5.0)
    shared = Sharing(thread, jobs)
    shared.open(TaskKey("night"), "m")
    begin = time.monotonic()
    shared.close()
    assert time.monotonic() - begin < 1.0


def test_streams_can_be_forgotten(server: redis.Redis) -> None:
    stream = MatrixStream(server, matrix_stream.stream_key("m", TaskKey("night")))
    stream.join(b"whole")
    stream.exchange(b"delta")
    assert server.keys("trbatch:matrix:*")
    matrix_stream.forget(server, "m", TaskKey("night"))
    assert not server.keys("trbatch:matrix:*")
