"""Workers that share a task's matrix through a real server end with equal copies."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import tiny
import torch
from click.testing import CliRunner
from matrix_tools import CPU
from waiting import wait_for
from worker_tools import Background, config, submit

from trbatch import matrix_stream, sharing
from trbatch.cli import commands
from trbatch.engine import replica
from trbatch.engine.engine import MAX_TASKS
from trbatch.engine.matrix import Matrix
from trbatch.engine.replica import unpack
from trbatch.engine.sequence import TaskKey
from trbatch.engine_events import Changes, Whole
from trbatch.engine_thread import EngineThread
from trbatch.matrix_stream import MatrixStream
from trbatch.queue import JobQueue
from trbatch.sharing import Sharing
from trbatch.worker import run_worker


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
        begin = f"{matrix_stream.BEGIN}/"
        wait_for(lambda: not task_of(load.engines[0], "night").position.startswith(begin))
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
        wait_for(lambda: jobs.counts(job).finished == len(job.manifest.chunk_samples), 60)
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


class Silent:
    """An engine's thread that only notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.asked.append(name)


def test_what_is_learned_after_the_last_question_is_still_sent(
    jobs: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may end while the engine is being asked: then it is asked once more."""
    monkeypatch.setattr(sharing, "EVERY_S", 0.0)
    engine, task = Silent(), TaskKey("night")
    asked = engine.asked
    shared = Sharing(engine, jobs)
    shared.open(task, "m")
    shared.heed(Whole(task, b"whole", ""))
    shared.tick()
    shared.finish(task)
    assert asked == ["send_whole", "merge", "send_changes"]
    begin = shared._shares[task].stream.position
    shared.heed(Changes(task, b"", begin))
    assert asked[3:] == ["merge", "send_changes"]
    shared.heed(Changes(task, b"", begin))
    assert asked[5:] == ["merge", "save"]


def test_a_task_whose_rows_wait_for_a_place_is_shared_once_it_has_one(
    jobs: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "EVERY_S", 0.0)
    engine, task = Silent(), TaskKey("night")
    shared = Sharing(engine, jobs)
    shared.open(task, "m")
    for _ in range(3):
        shared.heed(Whole(task, b"", ""))
        shared.tick()
    assert engine.asked == ["send_whole"] * 4
    shared.heed(Whole(task, b"whole", ""))
    assert engine.asked[4:] == ["merge"]
    shared.tick()
    assert engine.asked[5:] == ["send_changes"]
    shared.finish(task)
    shared.heed(Changes(task, b"", "elsewhere"))  # it has made room
    shared.heed(Whole(task, b"", ""))
    assert engine.asked[-1] == "save" and task not in shared._shares


def test_what_a_cold_job_replaces_is_forgotten_as_soon_as_the_server_can(
    jobs: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "RETRY_S", 0.0)
    monkeypatch.setattr(sharing, "EVERY_S", 0.0)
    tries: list[bool] = []

    def forget(*args: Any) -> None:
        tries.append(len(tries) > 0)
        if not tries[-1]:
            raise redis.ConnectionError("away")
        matrix_stream.forget(*args)

    monkeypatch.setattr(sharing, "forget", forget)
    warm, cold = TaskKey("night"), TaskKey("night", apart="job", cold=True)
    old = MatrixStream(jobs.connection, matrix_stream.stream_key("m", warm))
    old.join(b"old")
    shared = Sharing(Silent(), jobs)
    shared.open(cold, "m")
    shared.heed(Whole(cold, b"whole", "", cold=True))
    position = shared._shares[cold].stream.position
    for _ in range(3):
        shared.heed(Changes(cold, b"", position))
    assert tries == [False, True]
    assert old.exchange(b"").stale


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


class Left:
    """How the world of an idle worker changes behind its back."""

    def __init__(self, jobs: JobQueue, store: str) -> None:
        self.jobs, self.store = jobs, store

    def expired(self) -> None:
        self.jobs.connection.delete(*self.jobs.connection.keys("trbatch:matrix:*"))

    def wiped(self) -> None:
        self.jobs.connection.flushall()

    def poisoned(self) -> None:
        for key in self.jobs.connection.keys("trbatch:matrix:*:snapshot"):
            self.jobs.connection.set(key, b"0-0\n")

    def reset(self) -> None:
        arguments = ["matrix", "reset", "night", "--force", "--store", self.store]
        done = CliRunner().invoke(commands, [*arguments, "--redis-url", self.jobs.url])
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("how", ["expired", "wiped", "poisoned", "reset"])
def test_an_idle_worker_outlives_what_it_shares(
    how: str, jobs: JobQueue, tmp_path: Path, quick: None
) -> None:
    load = LoadedTiny()
    job = submit(jobs, tmp_path, prompts(6), task="night", sampling={"max_tokens": 16})
    worker = Background(jobs.url, load)
    try:
        wait_for(lambda: job.progress().complete, 60)
        wait_for(lambda: job.task_key.folder and list(tmp_path.rglob("*.safetensors")))
        wait_for(lambda: task_of(load.engines[0], "night").position)
        filled = int((rows_of_task(load.engines[0], "night")[0] >= 0).any(1).sum())
        getattr(Left(jobs, str(Path(job.path).parent)), how)()
        time.sleep(1.0)  # ten exchanges
        again = submit(jobs, tmp_path, prompts(1), name="again", task="night",
                       sampling={"max_tokens": 2})  # fmt: skip
        wait_for(lambda: again.progress().complete, 60)
        wait_for(lambda: task_of(load.engines[0], "night").position)
        now = int((rows_of_task(load.engines[0], "night")[0] >= 0).any(1).sum())
        assert now < filled / 2 if how == "reset" else now >= filled / 2
        assert worker.thread.is_alive()
    finally:
        worker.stop()


def test_a_cold_job_of_one_worker_makes_another_forget_and_live(
    jobs: JobQueue, tmp_path: Path, quick: None
) -> None:
    """The other holds the warm matrix open, which must not come back through the stream."""
    load = LoadedTiny()
    workers = [Background(jobs.url, load) for _ in range(2)]
    try:
        first = submit(jobs, tmp_path, prompts(24), chunk_size=2, task="night",
                       sampling={"max_tokens": 40})  # fmt: skip
        wait_for(lambda: first.progress().complete, 60)
        assert all(engine.stats()["tokens"] for engine in load.engines), "one did all the work"
        wait_for(lambda: equal(*load.engines, "night"))
        warm = (rows_of_task(load.engines[0], "night")[0] >= 0).any(1)
        cold = submit(jobs, tmp_path, prompts(1), name="cold", task="night", cold=True,
                      sampling={"max_tokens": 4})  # fmt: skip
        wait_for(lambda: jobs.counts(cold).finished == len(cold.manifest.chunk_samples), 60)
        time.sleep(1.0)
        later = submit(jobs, tmp_path, prompts(8), chunk_size=1, name="later", task="night",
                       sampling={"max_tokens": 2})  # fmt: skip
        wait_for(lambda: later.progress().complete, 60)
        time.sleep(0.5)
        for engine in load.engines:
            if (task := engine._tasks.current(later.task_key)) is not None:
                now = (engine._matrix.shared[task.index] >= 0).any(1)
                assert now.sum() < warm.sum() / 2
        assert all(worker.thread.is_alive() for worker in workers)
    finally:
        for worker in workers:
            worker.stop()


def test_a_task_that_made_room_is_shared_no_longer_and_joins_again(
    jobs: JobQueue, tmp_path: Path, quick: None
) -> None:
    load = LoadedTiny()
    worker = Background(jobs.url, load)
    done: list[Any] = []
    try:
        for number in range(MAX_TASKS + 2):
            job = submit(jobs, tmp_path, prompts(1), name=f"n{number}", task=f"t{number}",
                         sampling={"max_tokens": 4})  # fmt: skip
            wait_for(lambda job=job: job.progress().complete, 60)
            done.append(job)
        for key in jobs.connection.keys("trbatch:matrix:*:snapshot"):
            jobs.connection.delete(key)
        time.sleep(1.0)
        snapshots = len(jobs.connection.keys("trbatch:matrix:*:snapshot"))
        assert snapshots <= MAX_TASKS, "somebody has shared what is not open"
        again = submit(jobs, tmp_path, prompts(1), name="again", task="t0",
                       sampling={"max_tokens": 4})  # fmt: skip
        wait_for(lambda: again.progress().complete, 60)
        wait_for(lambda: task_of(load.engines[0], "t0").position)
        assert worker.thread.is_alive()
    finally:
        worker.stop()
