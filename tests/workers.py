"""A worker in a thread of the test's process, and jobs for it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echo_worker import EchoEngine

from trbatch import api
from trbatch.config import WorkerConfig
from trbatch.queue import JobQueue
from trbatch.worker import BatchWorker, run_worker

MODEL = "org/echo"


def write_rows(path: Path, rows: int | list[Any]) -> Path:
    """A JSON Lines file of the rows, or of so many that say their number."""
    if isinstance(rows, int):
        rows = [{"id": f"r{i}", "prompt": f"say {i}"} for i in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def submit(folder: Path, rows: int | list[Any] = 12, **settings: Any) -> api.Job:
    """A job in chunks of 4 unless told."""
    name = settings.setdefault("name", "job")
    file = write_rows(folder / f"{name}.jsonl", rows)
    return api.submit(file, **{"model": MODEL, "chunk_size": 4} | settings)


def work(engine: EchoEngine | None = None, **settings: Any) -> EchoEngine:
    """Be a worker until the queue is empty. Returns the engine."""
    found = engine or EchoEngine()
    config = WorkerConfig(**{"burst": True, "publish_s": 0.05} | settings)
    assert run_worker(config, load=lambda model: found) == 0
    return found


@contextmanager
def working(engine: EchoEngine, **settings: Any) -> Iterator[BatchWorker]:
    """A worker that goes on until the context ends; it then hands back what it has."""
    with JobQueue.connect(patient=True) as jobs:
        config = WorkerConfig(**{"publish_s": 0.05} | settings)
        worker = BatchWorker(config, jobs, lambda model: engine)
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            yield worker
        finally:
            for _ in range(2):
                worker.stop.asked_at = 0.0
                worker.stop.ask(signal.SIGTERM)
            thread.join(20)
            assert not thread.is_alive()
