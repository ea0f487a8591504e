"""What tests of the worker share: an engine that echoes, numbered prompts, workers to stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from child import Child

from trbatch.config import JobSpec, WorkerConfig
from trbatch.engine.sequence import Completion, Request, TaskKey
from trbatch.job import JobFolder
from trbatch.queue import JobQueue
from trbatch.queue_names import ModelKey
from trbatch.worker import BatchWorker

MODEL = "maker/echo"


class EchoEngine:
    """Answers each prompt with itself in capitals, one forward per word, a batch at a time."""

    copies = None  # it has no matrices
    steps: Mapping[tuple[int, int], int] = {}  # nobody asks of what kind

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

    def add_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.add(request)

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
            self.worker.stop.asked_at = 0.0
            self.worker.stop.ask(signal.SIGTERM)
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.jobs.close()
        assert self.code is not None
        return self.code


SCRIPT = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, {tests!r})
    import worker_tools
    from trbatch.worker import run_worker
    load = worker_tools.Loaded(lambda: worker_tools.EchoEngine(capacity=2, step_s=0.05))
    sys.exit(run_worker(worker_tools.config({url!r}, burst=False), load=load))
    """
)


def start_process(jobs: JobQueue) -> Child:
    code = SCRIPT.format(tests=str(Path(__file__).parent), url=jobs.url)
    return Child([sys.executable, "-c", code], stderr=subprocess.PIPE)
