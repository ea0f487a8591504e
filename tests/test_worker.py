"""The worker: every row of every chunk ends in a segment once, whatever happens on the way."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trbatch import worker as worker_module
from trbatch.config import JobSpec, SamplingParams, WorkerConfig
from trbatch.engine.sequence import Completion, Request, TaskKey
from trbatch.errors import ModelError, TrbatchError, Unreachable, WorkerError
from trbatch.job import JobFolder
from trbatch.queue import JobQueue, ModelKey
from trbatch.results import collect
from trbatch.worker import BatchWorker, run_worker

MODEL = "maker/echo"


class EchoEngine:
    """Answers each prompt with itself in capitals, one forward per word, a batch at a time."""

    copies = None  # it has no matrices

    def __init__(self, capacity: int = 4, step_s: float = 0.0) -> None:
        self._capacity = capacity
        self.step_s = step_s
        self.waiting: list[Request] = []
        self.running: dict[Hashable, tuple[Request, int]] = {}
        self.saved = 0
        self.opened: list[TaskKey] = []
        self.batches: list[int] = []
        self.fail_at_step = 0  # 0: never
        self.thread = threading.current_thread()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def open_task(self, key: TaskKey) -> None:
        if key not in self.opened:
            self.opened.append(key)

    def add(self, request: Request) -> None:
        assert threading.current_thread() is self.thread
        self.waiting.append(request)

    def step(self) -> list[Completion]:
        time.sleep(self.step_s)
        while self.waiting and len(self.running) < self._capacity:
            request = self.waiting.pop(0)
            self.running[request.key] = (request, words(request))
        self.batches.append(len(self.running))
        if len(self.batches) == self.fail_at_step:
            raise RuntimeError("device on fire")
        self.running = {key: (r, left - 1) for key, (r, left) in self.running.items()}
        done = [request for request, left in self.running.values() if left <= 0]
        for request in done:
            del self.running[request.key]
        return [echo(request) for request in done]

    def abort(self, keys: Iterable[Hashable]) -> None:
        gone = set(keys)
        self.waiting = [request for request in self.waiting if request.key not in gone]
        self.running = {key: value for key, value in self.running.items() if key not in gone}

    def save_tasks(self) -> None:
        self.saved += 1

    def stats(self) -> dict[str, Any]:
        return {"forwards": len(self.batches), "dtype": "float32"}


def text_of(request: Request) -> str:
    if request.prompt is not None:
        return request.prompt
    assert request.messages is not None
    return str(request.messages[-1]["content"])


def words(request: Request) -> int:
    return min(len(text_of(request).split()), request.sampling.max_tokens)


def echo(request: Request) -> Completion:
    if "unspeakable" in text_of(request):
        return Completion(
            key=request.key,
            finish_reason="error",
            error_code="prompt_too_long",
            error_message="longer than the model takes",
        )
    return Completion(
        key=request.key,
        finish_reason="stop",
        text=f"{text_of(request).upper()} #{request.sample_index}",
        token_ids=list(range(words(request))),
        seed=request.seed,
        sample_index=request.sample_index,
        decode_s=0.5,
        num_spec_steps=words(request),
    )


def write_prompts(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_job(tmp_path: Path, rows: int | list[dict[str, Any]] = 20, **settings: Any) -> JobFolder:
    """A job of numbered prompts (or of the given rows), in chunks of 4 unless told."""
    name = settings.setdefault("name", "job")
    if isinstance(rows, int):
        rows = [{"prompt": f"say {'very ' * (i % 3)}{i}"} for i in range(rows)]
    file = write_prompts(tmp_path / f"{name}.jsonl", rows)
    values = {"model": MODEL, "chunk_size": 4, "out": str(tmp_path / "store")} | settings
    return JobFolder.submit(JobSpec(input=str(file), **values))


def submit(jobs: JobQueue, tmp_path: Path, *args: Any, **settings: Any) -> JobFolder:
    job = make_job(tmp_path, *args, **settings)
    jobs.enqueue(job, job.missing_chunks())
    return job


def rows_of(job: JobFolder) -> list[dict[str, Any]]:
    """Every row of every segment, duplicates included."""
    files = sorted((Path(job.path) / "segments").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def texts_of(job: JobFolder) -> dict[int, str]:
    found = rows_of(job)
    texts = {row["prompt_index"]: row["text"] for row in found}
    assert len(texts) == len(found), "a row was published twice"
    return texts


def expected(count: int) -> dict[int, str]:
    return {i: f"SAY {'VERY ' * (i % 3)}{i} #0" for i in range(count)}


def config(url: str, **settings: Any) -> WorkerConfig:
    return WorkerConfig(
        **({"redis_url": url, "burst": True, "publish_s": 0.1, "model": MODEL} | settings)
    )


class Loaded:
    """A loader that remembers what it loaded and can refuse."""

    def __init__(
        self,
        make: Callable[[], EchoEngine] = EchoEngine,
        refuse: dict[str, Exception] | None = None,
    ) -> None:
        self.make = make
        self.refuse = refuse or {}
        self.models: list[str] = []
        self.engines: list[EchoEngine] = []

    def __call__(self, model: ModelKey) -> EchoEngine:
        self.models.append(str(model))
        if model.name in self.refuse:
            raise self.refuse[model.name]
        self.engines.append(self.make())
        return self.engines[-1]

    @property
    def engine(self) -> EchoEngine:
        (engine,) = self.engines
        return engine


@pytest.fixture
def jobs(redis_url: str) -> Any:
    with JobQueue.connect(redis_url) as found:
        yield found


class Background:
    """A worker in a thread of this process, to be stopped as by signals."""

    def __init__(self, url: str, load: Loaded, **settings: Any) -> None:
        self.jobs = JobQueue.connect(url, patient=True)
        self.worker = BatchWorker(config(url, burst=False, **settings), self.jobs, load)
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.code = self.worker.run()

    def stop(self, times: int = 1) -> int:
        for _ in range(times):
            self.worker._asked_at = 0.0
            self.worker.request_stop(signal.SIGTERM)
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.jobs.close()
        assert self.code is not None
        return self.code


def wait_for(condition: Callable[[], Any], timeout: float = 15.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# --- decoding what was submitted ---


def test_a_burst_decodes_every_row_once_and_empties_the_queue(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 30)
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(job) == expected(30)
    counts = jobs.counts(job.id)
    assert (counts.open, counts.failed, counts.finished) == (0, 0, 8)
    assert JobFolder.open(job.path).missing_chunks() == []
    assert jobs.workers() == []


def test_the_model_is_loaded_once_for_all_chunks_and_jobs(jobs: JobQueue, tmp_path: Path) -> None:
    first = submit(jobs, tmp_path, 9, name="first")
    second = submit(jobs, tmp_path, 9, name="second")
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.models == [MODEL]
    assert texts_of(first) == texts_of(second) == expected(9)


def test_the_batch_does_not_drain_between_chunks(jobs: JobQueue, tmp_path: Path) -> None:
    """Chunks of 2 rows, a batch of 8: only the end of the queue may see fewer than 8."""
    submit(jobs, tmp_path, 64, chunk_size=2)
    load = Loaded(lambda: EchoEngine(capacity=8, step_s=0.02))
    run_worker(config(jobs.url), load=load)
    full = [size == 8 for size in load.engine.batches]
    assert sum(full) >= 0.7 * len(full), load.engine.batches


def test_no_more_chunks_are_taken_than_the_batch_needs(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 60, chunk_size=4)
    worker = Background(jobs.url, Loaded(lambda: EchoEngine(capacity=4, step_s=0.2)))
    wait_for(lambda: jobs.counts(job.id).started)
    time.sleep(0.3)
    assert jobs.counts(job.id).started <= 4, "others want some too"
    worker.stop(times=2)


def test_chunks_in_flight_can_be_limited(jobs: JobQueue, tmp_path: Path) -> None:
    submit(jobs, tmp_path, 16, chunk_size=2)
    load = Loaded(lambda: EchoEngine(capacity=8))
    run_worker(config(jobs.url, chunks_in_flight=1), load=load)
    assert max(load.engine.batches) == 2


def test_the_engine_is_not_given_all_samples_at_once(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "AHEAD", 12)
    job = submit(jobs, tmp_path, 2, sampling=SamplingParams(n=100))
    most = 0

    class Counting(EchoEngine):
        def step(self) -> list[Completion]:
            nonlocal most
            most = max(most, self.unfinished)
            return super().step()

    load = Loaded(lambda: Counting(capacity=4))
    assert run_worker(config(jobs.url), load=load) == 0
    assert len(rows_of(job)) == 200
    assert len({(row["prompt_index"], row["sample_index"]) for row in rows_of(job)}) == 200
    assert 4 < most <= 16
    assert sum(size == 4 for size in load.engine.batches) >= 45, "and it is never kept waiting"


def test_messages_samples_seeds_and_sampling_reach_the_engine(
    jobs: JobQueue, tmp_path: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 2, "seed": 7},
        {"prompt": "four"},
    ]
    job = submit(jobs, tmp_path, rows, sampling=SamplingParams(n=2, temperature=0.5))
    run_worker(config(jobs.url), load=Loaded())
    found = {(row["prompt_index"], row["sample_index"]): row for row in rows_of(job)}
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[0, 1]["text"] == "ONE TWO THREE #1"
    assert found[0, 0]["completion_tokens"] == 2
    assert found[0, 0]["seed"] == 7
    assert found[1, 0]["completion_tokens"] == 1


def test_a_row_that_fails_is_a_row_and_not_the_end(jobs: JobQueue, tmp_path: Path) -> None:
    rows = [{"prompt": "fine"}, {"prompt": "unspeakable"}, {"prompt": "fine too"}]
    job = submit(jobs, tmp_path, rows)
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    found = {row["prompt_index"]: row for row in rows_of(job)}
    assert [found[i]["finish_reason"] for i in range(3)] == ["stop", "error", "stop"]
    assert found[1]["error_code"] == "prompt_too_long"
    assert jobs.counts(job.id).failed == 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_error_row_names_its_place_in_the_input_whoever_found_it(
    jobs: JobQueue, tmp_path: Path, kind: str
) -> None:
    """What the engine refuses is told as what `submit` refuses: file and line."""
    prompts = ["fine", "", "unspeakable"]
    file = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        write_prompts(file, [{"prompt": text} for text in prompts])
    else:
        pq.write_table(pa.table({"prompt": prompts}), file)
    spec = JobSpec(input=str(file), name="job", model=MODEL, out=str(tmp_path / "store"))
    job = JobFolder.submit(spec)
    jobs.enqueue(job, job.missing_chunks())
    run_worker(config(jobs.url), load=Loaded())
    found = collect(JobFolder.open(job.path), str(tmp_path / "out.jsonl"), "jsonl")
    assert found.rows_failed == 2
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    errors = (Path(job.path) / "errors.jsonl").read_text().splitlines()
    for texts in (
        [line["error"]["message"] for line in lines if line["error"]],
        [json.loads(line)["error_message"] for line in errors],
    ):
        by_submit, by_worker = texts
        place = by_submit.partition(": ")[0].removesuffix("2") + "3"
        assert str(file) in place
        assert by_worker == f"{place}: longer than the model takes"


def test_bad_input_rows_need_no_engine(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [{"prompt": "fine"}, {"nothing": 1}, {"prompt": ""}])
    run_worker(config(jobs.url), load=Loaded())
    assert texts_of(job) == {0: "FINE #0"}
    progress = JobFolder.open(job.path).progress()
    assert progress.rows == 3
    assert progress.rows_failed == 2


def test_rows_that_are_done_are_not_decoded_again(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 8)
    run_worker(config(jobs.url), load=Loaded())
    jobs.enqueue(job, [0, 1])
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.engine.batches == []
    assert texts_of(job) == expected(8)
    assert jobs.counts(job.id).finished == 2


def test_only_the_missing_rows_of_a_chunk_are_decoded(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 8, chunk_size=8)
    run_worker(config(jobs.url, publish_s=0.0), load=Loaded(lambda: EchoEngine(capacity=2)))
    segments = sorted((Path(job.path) / "segments").glob("*.parquet"))
    assert len(segments) > 1
    lost = {row["prompt_index"] for row in pq.read_table(segments[0]).to_pylist()}
    segments[0].unlink()
    again = JobFolder.open(job.path)
    jobs.enqueue(again, again.missing_chunks())
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert 0 < len(lost) < 8
    assert texts_of(job) == expected(8)


def test_rows_are_published_while_their_chunk_still_runs(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 40, chunk_size=40)
    load = Loaded(lambda: EchoEngine(capacity=2, step_s=0.05))
    worker = Background(jobs.url, load, publish_s=0.1)
    wait_for(lambda: JobFolder.open(job.path).progress().rows_ok >= 2)
    assert jobs.counts(job.id).started == 1
    worker.stop(times=2)


def test_each_row_names_worker_model_task_and_attempt(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 3, task="greetings")
    run_worker(config(jobs.url, name="gpu0"), load=Loaded())
    found = rows_of(job)
    assert {row["model"] for row in found} == {MODEL}
    assert {row["task"] for row in found} == {"greetings"}
    assert {row["attempts"] for row in found} == {1}
    (worker,) = {row["worker"] for row in found}
    assert worker.startswith("gpu0-")
    assert job.ledger.facts() == {"dtype": ["float32"]}


def test_matrices_are_opened_per_task_and_saved_after_the_job(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 6, task="greetings", cold=True)
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.engine.opened == [TaskKey("greetings", job.matrices, job.id, cold=True)]
    assert load.engine.saved >= 2, "once with the last chunk, once at the end"


def test_jobs_that_share_a_tasks_name_share_its_matrix_only_where_they_should(
    jobs: JobQueue, tmp_path: Path
) -> None:
    stores = {name: str(tmp_path / name) for name in ("here", "there")}
    first = submit(jobs, tmp_path, 4, name="first", task="t", out=stores["here"])
    submit(jobs, tmp_path, 4, name="second", task="t", out=stores["here"])
    cold = submit(jobs, tmp_path, 4, name="cold", task="t", out=stores["here"], cold=True)
    far = submit(jobs, tmp_path, 4, name="first", task="t", out=stores["there"])
    private = submit(jobs, tmp_path, 4, name="private", task="t", private_matrix=True)
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.engine.opened == [
        TaskKey("t", first.matrices),
        TaskKey("t", first.matrices, cold.id, cold=True),
        TaskKey("t", far.matrices),
        TaskKey(private.manifest.matrix, apart=private.path),
    ]


# --- which model ---


def test_a_worker_of_one_model_leaves_the_chunks_of_others(jobs: JobQueue, tmp_path: Path) -> None:
    mine = submit(jobs, tmp_path, 4, name="mine")
    other = submit(jobs, tmp_path, 4, name="other", model="maker/other")
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.models == [MODEL]
    assert texts_of(mine) == expected(4)
    assert jobs.counts(other.id).queued == 1
    assert rows_of(other) == []


def test_a_worker_without_a_model_loads_what_the_next_chunk_needs(
    jobs: JobQueue, tmp_path: Path
) -> None:
    first = submit(jobs, tmp_path, 8, name="first", model="maker/b")
    second = submit(jobs, tmp_path, 8, name="second", model="maker/a")
    third = submit(jobs, tmp_path, 8, name="third", model="maker/b")
    load = Loaded()
    assert run_worker(config(jobs.url, model=""), load=load) == 0
    assert load.models == ["maker/b", "maker/a"], "in order of arrival, each once"
    assert texts_of(first) == texts_of(second) == texts_of(third) == expected(8)


def test_nothing_is_loaded_for_an_empty_queue(jobs: JobQueue) -> None:
    load = Loaded()
    assert run_worker(config(jobs.url), load=load) == 0
    assert run_worker(config(jobs.url, model=""), load=load) == 0
    assert load.models == []


def test_an_idle_worker_finds_what_is_submitted_later(jobs: JobQueue, tmp_path: Path) -> None:
    worker = Background(jobs.url, Loaded(), model="")
    wait_for(lambda: jobs.workers())
    for name, model in (("a", "maker/a"), ("b", "maker/b"), ("c", "maker/a")):
        job = submit(jobs, tmp_path, 5, name=name, model=model)
        wait_for(lambda job=job: jobs.counts(job.id).finished == 2)
        assert texts_of(job) == expected(5)
    assert worker.stop() == 128 + signal.SIGTERM


def test_no_chunk_is_taken_before_the_model_stands(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 4)
    seen: list[int] = []

    def slow() -> EchoEngine:
        time.sleep(0.3)
        seen.append(jobs.counts(job.id).started)
        return EchoEngine()

    run_worker(config(jobs.url), load=Loaded(slow))
    assert seen == [0]
    assert texts_of(job) == expected(4)


def test_a_configured_model_that_cannot_be_loaded_ends_the_worker(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 4)
    with pytest.raises(ModelError, match="no such model"):
        run_worker(config(jobs.url), load=Loaded(refuse={MODEL: ModelError("no such model")}))
    assert jobs.counts(job.id).queued == 1
    assert jobs.workers() == []


def test_a_jobs_model_that_cannot_be_loaded_fails_that_job_alone(
    jobs: JobQueue, tmp_path: Path
) -> None:
    bad = submit(jobs, tmp_path, 8, name="bad", model="maker/bad")
    good = submit(jobs, tmp_path, 8, name="good")
    load = Loaded(refuse={"maker/bad": ModelError("no such model")})
    assert run_worker(config(jobs.url, model=""), load=load) == 4
    assert jobs.failures(bad.id) == dict.fromkeys(
        (0, 1), "trbatch.errors.ModelError: no such model"
    )
    assert texts_of(good) == expected(8)


def test_a_jobs_model_that_fails_in_an_unknown_way_fails_that_job_alone(
    jobs: JobQueue, tmp_path: Path
) -> None:
    bad = submit(jobs, tmp_path, 4, name="bad", model="maker/bad")
    good = submit(jobs, tmp_path, 8, name="good")
    load = Loaded(refuse={"maker/bad": TypeError("NoneType has no items")})
    assert run_worker(config(jobs.url, model=""), load=load) == 4
    assert "TypeError: NoneType has no items" in jobs.failures(bad.id)[0]
    assert texts_of(good) == expected(8)


def test_a_worker_that_cannot_load_anything_fails_no_chunk(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 12)
    load = Loaded(refuse={MODEL: WorkerError("no GPU that torch can use")})
    with pytest.raises(WorkerError, match="no GPU") as caught:
        run_worker(config(jobs.url, model=""), load=load)
    assert caught.value.exit_code == 4
    counts = jobs.counts(job.id)
    assert (counts.queued, counts.failed) == (3, 0)
    assert run_worker(config(jobs.url, model=""), load=Loaded()) == 0
    assert texts_of(job) == expected(12)


@pytest.mark.parametrize(
    "engine", [{"device": "cuda:99"}, {"device": "cpu", "max_model_len": 10**8}]
)
def test_a_worker_of_wrong_options_leaves_the_queue_as_it_was(
    jobs: JobQueue, tmp_path: Path, small_model: Path, engine: dict[str, Any]
) -> None:
    job = submit(jobs, tmp_path, 8, model=str(small_model))
    with pytest.raises(WorkerError):
        run_worker(config(jobs.url, model="", engine=engine))
    counts = jobs.counts(job.id)
    assert (counts.queued, counts.failed) == (2, 0)


# --- stopping ---


def test_one_signal_finishes_what_was_taken_and_leaves_the_rest(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 60, chunk_size=4)
    worker = Background(jobs.url, Loaded(lambda: EchoEngine(capacity=4, step_s=0.02)))
    wait_for(lambda: jobs.counts(job.id).finished >= 1)
    assert worker.stop() == 128 + signal.SIGTERM
    counts = jobs.counts(job.id)
    assert counts.started == counts.failed == 0
    assert counts.queued > 0
    assert len(texts_of(job)) == 4 * counts.finished
    assert jobs.workers() == []


def test_two_signals_hand_back_what_was_taken_and_keep_what_is_done(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 40, chunk_size=20)
    load = Loaded(lambda: EchoEngine(capacity=2, step_s=0.05))
    worker = Background(jobs.url, load, publish_s=60.0)
    wait_for(lambda: worker.worker._publisher.rows >= 2)
    begin = time.monotonic()
    assert worker.stop(times=2) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 2.0
    counts = jobs.counts(job.id)
    assert (counts.queued, counts.started, counts.failed) == (2, 0, 0)
    assert 2 <= len(texts_of(job)) < 40
    assert load.engine.saved == 1
    run_worker(config(jobs.url), load=Loaded())
    assert texts_of(job) == expected(40)
    assert {row["attempts"] for row in rows_of(job)} == {1}


def test_the_third_signal_waits_for_no_step(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 4)
    worker = Background(jobs.url, Loaded(lambda: EchoEngine(step_s=6.0)))
    wait_for(lambda: jobs.counts(job.id).started)
    begin = time.monotonic()
    worker.worker.stops = 3
    worker.thread.join(20)
    assert time.monotonic() - begin < 3.0
    worker.worker._leases.close()  # which is left to the end of the process
    worker.jobs.close()


def test_the_same_signal_passed_on_twice_counts_once(jobs: JobQueue) -> None:
    worker = BatchWorker(config(jobs.url), jobs, Loaded())
    worker.request_stop(signal.SIGINT)
    worker.request_stop(signal.SIGINT)
    assert worker.stops == 1
    assert worker.exit_code == 130


SCRIPT = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, {tests!r})
    import test_worker
    from trbatch.worker import run_worker
    load = test_worker.Loaded(lambda: test_worker.EchoEngine(capacity=2, step_s=0.05))
    sys.exit(run_worker(test_worker.config({url!r}, burst=False), load=load))
    """
)


def start_process(jobs: JobQueue) -> subprocess.Popen[bytes]:
    code = SCRIPT.format(tests=str(Path(__file__).parent), url=jobs.url)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_stops_cleanly_on_a_signal(
    jobs: JobQueue, tmp_path: Path, number: int, code: int
) -> None:
    job = submit(jobs, tmp_path, 60, chunk_size=4)
    with start_process(jobs) as process:
        wait_for(lambda: jobs.counts(job.id).finished)
        process.send_signal(number)
        assert process.wait(20) == code
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert jobs.counts(job.id).started == 0
    assert len(texts_of(job)) == 4 * jobs.counts(job.id).finished


def test_what_a_killed_worker_held_is_decoded_by_the_next(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(jobs, tmp_path, 24, chunk_size=12)
    with start_process(jobs) as process:
        wait_for(lambda: JobFolder.open(job.path).progress().rows_ok >= 2)
        process.kill()
    assert jobs.counts(job.id).started >= 1
    wip = jobs.queue(ModelKey(MODEL).queue_name).started_job_registry.key
    for member in jobs.connection.zrange(wip, 0, -1):
        jobs.connection.zadd(wip, {member: time.time() - 1})  # half a minute goes by
    worker = Background(jobs.url, Loaded())
    wait_for(lambda: jobs.counts(job.id).finished == 2)
    worker.stop()
    assert texts_of(job) == expected(24)


# --- when things break ---


def test_an_engine_that_raises_ends_the_worker_and_costs_no_row(
    jobs: JobQueue, tmp_path: Path
) -> None:
    def fragile() -> EchoEngine:
        engine = EchoEngine(capacity=2)
        engine.fail_at_step = 6
        return engine

    job = submit(jobs, tmp_path, 20)
    with pytest.raises(TrbatchError, match="the engine failed: RuntimeError: device on fire"):
        run_worker(config(jobs.url), load=Loaded(fragile))
    counts = jobs.counts(job.id)
    assert counts.started == counts.failed == 0, "a retry is left for each chunk"
    assert len(texts_of(job)) > 0
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(job) == expected(20)
    assert {row["attempts"] for row in rows_of(job)} == {1, 2}


def test_a_chunk_that_cannot_be_read_fails_alone(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 12)
    (Path(job.path) / job.manifest.chunk_name(1)).write_bytes(b"this is not Parquet")
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert set(texts_of(job)) == {*range(4), *range(8, 12)}
    assert list(jobs.failures(job.id)) == [1]


def test_a_job_folder_outside_the_allowed_ones_is_not_read(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 4)
    run_worker(config(jobs.url, roots=(str(tmp_path / "elsewhere"),)), load=Loaded())
    assert rows_of(job) == []
    assert "outside what this worker may read" in jobs.failures(job.id)[0]
    jobs.enqueue(job, [0])
    run_worker(config(jobs.url, roots=(str(tmp_path),)), load=Loaded())
    assert texts_of(job) == expected(4)


def test_a_path_that_climbs_out_of_an_allowed_folder_is_not_read(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 4)
    climbing = tmp_path / "allowed" / ".." / "store" / job.id

    class Disguised:
        id, manifest, path = job.id, job.manifest, str(climbing)

    (tmp_path / "allowed").mkdir()
    jobs.enqueue(Disguised(), [0])
    run_worker(config(jobs.url, roots=(str(tmp_path / "allowed"),)), load=Loaded())
    assert rows_of(job) == []


def test_chunks_of_an_older_generation_are_passed_over(jobs: JobQueue, tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"say {i}"} for i in range(6)]
    submit(jobs, tmp_path, rows)
    rows += [{"id": f"r{i}", "prompt": f"say {i}"} for i in range(6, 10)]
    grown = submit(jobs, tmp_path, rows)
    assert grown.manifest.generation > 0
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(grown) == {i: f"SAY {i} #0" for i in range(10)}
    assert jobs.counts(grown.id).open == 0


def test_a_storage_that_fails_for_a_moment_loses_nothing(
    jobs: JobQueue,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = submit(jobs, tmp_path, 12)
    publish, failures = JobFolder.publish, [OSError("no space left"), Unreachable("no network")]

    def sometimes(self: JobFolder, *args: Any, **settings: Any) -> str:
        if failures:
            raise failures.pop()
        return publish(self, *args, **settings)

    monkeypatch.setattr(JobFolder, "publish", sometimes)
    with caplog.at_level(logging.WARNING):
        assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(job) == expected(12)
    assert "no space left" in caplog.text


def test_a_storage_that_fails_for_long_ends_the_worker(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(jobs, tmp_path, 12)
    monkeypatch.setattr("trbatch.publishing.PATIENCE_S", 0.3)

    def never(self: JobFolder, *args: Any, **settings: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(JobFolder, "publish", never)
    with pytest.raises(Unreachable, match="no space left"):
        run_worker(config(jobs.url), load=Loaded())
    assert jobs.counts(job.id).finished == 0


def test_matrices_that_cannot_be_saved_stop_nothing(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: EchoEngine) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(EchoEngine, "save_tasks", full)
    job = submit(jobs, tmp_path, 8)
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(job) == expected(8)


def test_the_queue_server_may_be_killed_and_started_again(jobs: JobQueue, tmp_path: Path) -> None:
    from trbatch import server

    job = submit(jobs, tmp_path, 40)
    load = Loaded(lambda: EchoEngine(capacity=2, step_s=0.03))
    worker = Background(jobs.url, load)
    wait_for(lambda: jobs.counts(job.id).finished >= 1)
    time.sleep(1.1)  # the log is synced every second
    os.kill(server.status().pid, signal.SIGKILL)
    time.sleep(0.5)
    server.ensure()
    wait_for(lambda: jobs.counts(job.id).finished == 10, timeout=30)
    worker.stop()
    assert set(texts_of(job)) == set(range(40))


def test_two_workers_share_a_job_without_doubling_a_row(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 60, chunk_size=2)
    workers = [
        Background(jobs.url, Loaded(lambda: EchoEngine(capacity=2, step_s=0.01))) for _ in range(2)
    ]
    wait_for(lambda: jobs.counts(job.id).finished == 30, timeout=30)
    for worker in workers:
        worker.stop()
    assert texts_of(job) == expected(60)
    assert len({row["worker"] for row in rows_of(job)}) == 2


def test_the_worker_module_imports_no_torch() -> None:
    code = "import sys, trbatch.worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
