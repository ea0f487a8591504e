"""What tests of the queue share: a job folder that is none, and shorthands for a worker's words."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import redis

from trbatch import lease as lease_module
from trbatch.chunk_job import ChunkQueue
from trbatch.chunk_lease import Lease
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue
from trbatch.queue_names import ModelKey

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


def counts(jobs: JobQueue, job: Any = None) -> tuple[int, int, int, int]:
    return dataclasses.astuple(jobs.counts(job or FakeFolder()))


def beat(worker: LeaseWorker) -> list[Lease]:
    """A beat that is due."""
    worker._last_beat -= lease_module.BEAT_S
    return worker.beat()


def run_out(jobs: JobQueue, found: Lease) -> None:
    """Let a lease run out, as if its worker had been silent for long."""
    key = found.job.started_job_registry.key
    jobs.connection.zadd(key, {found.execution.composite_key: time.time() - 1})
