"""The queue: which chunks wait, run and failed. The only owner of rq; `queue_names` has the names.

A queued chunk is one rq job: a constant function name and JSON `[job folder, chunk, generation]`.
There is one rq queue per model and priority, so that a worker is only handed chunks of the model it
holds, the more urgent first.
What a chunk holds, and which of its rows are done, is written in the job folder and not here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import redis
from redis.exceptions import LockError
from rq import Queue, Retry
from rq.job import JobStatus
from rq.queue import EnqueueData
from rq.serializers import JSONSerializer
from rq.utils import get_version
from rq.worker_registration import REDIS_WORKER_KEYS, get_keys

from trbatch import server
from trbatch.chunk_job import (
    FAILURE_TTL_S,
    LOCK_S,
    RESULT_TTL_S,
    RETRIES,
    ChunkJob,
    ChunkQueue,
)
from trbatch.config import PRIORITIES
from trbatch.connection import Breaks, Patience, connect, mask_url, reaching
from trbatch.errors import UsageError
from trbatch.queue_names import PREFIX, Folder, ModelKey, Place, chunk_id, index_key, priority_of
from trbatch.untrusted import answers_of, entry_of, failure_of, number_of, text_of

logger = logging.getLogger("trbatch.queue")

MODELS_KEY = f"{PREFIX}models"  # hash: rq queue name -> JSON of its `ModelKey`
FUNCTION = "trbatch.decode_chunk"  # what every rq job says; compared with, never imported
BATCH = 64  # rq jobs a pipeline
ANSWER_S = 10.0  # that a command of a client may take, and that each of its repetitions may
WORKER_ANSWER_S = 3.0  # the same of a worker: it repeats for minutes, and stops in between
MINIMUM_SERVER = (6, 2, 0)
_STATUSES = {status.value.encode(): status for status in JobStatus}
WAITING = frozenset({JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.DEFERRED})


@dataclass(frozen=True, slots=True)
class Counts:
    """Chunks of one job by where they are."""

    queued: int = 0
    started: int = 0
    failed: int = 0
    finished: int = 0

    @property
    def open(self) -> int:
        """Chunks that still wait or run."""
        return self.queued + self.started


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """One model's queue of one priority: chunks waiting, running and failed."""

    name: str
    model: ModelKey
    priority: str
    queued: int
    started: int
    failed: int
    workers: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that has said that it lives. `model` is empty while it holds none."""

    name: str
    state: str
    model: str
    host: str
    pid: int
    born: str
    last_heartbeat: str
    chunks: int  # in flight
    finished: int
    failed: int


class JobQueue:
    """One connection to the queue: put chunks in, ask what became of them."""

    def __init__(
        self,
        connection: redis.Redis,
        url: str,
        breaks: Breaks | None = None,
        *,
        embedded: bool = False,
    ) -> None:
        self.connection = connection
        self.url = url
        self.breaks = breaks or Breaks()  # while the server is away
        self.embedded = embedded  # ours, so that we may start it again

    @classmethod
    def connect(cls, url: str = "", *, patient: bool = False) -> Self:
        """Connect to `url`, else `TRBATCH_REDIS_URL`, `REDIS_URL`, the embedded server.

        Args:
            patient: wait minutes instead of seconds for a server that is away, as a worker does.

        Raises:
            Unreachable: nobody answers there, or does not let us in.
            UsageError: the URL is none, or the server is older than Redis 6.2.
        """
        url = url or os.environ.get("TRBATCH_REDIS_URL") or os.environ.get("REDIS_URL") or ""
        embedded = not url
        url = url or server.ensure()
        breaks = Breaks()
        connection = _connection(url, breaks, attempts=3, answer_s=ANSWER_S)
        with reaching(url):
            version = get_version(connection)
        if version < MINIMUM_SERVER:
            found = ".".join(map(str, version))
            raise UsageError(f"{mask_url(url)} is Redis {found}; 6.2 or newer is needed")
        if patient:
            connection.close()
            connection = _connection(url, breaks, attempts=200, answer_s=WORKER_ANSWER_S)
        return cls(connection, url, breaks, embedded=embedded)

    def close(self) -> None:
        """Give the connection back."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"JobQueue({mask_url(self.url)!r})"

    def queue(self, name: str) -> ChunkQueue:
        """The rq queue of this name."""
        return ChunkQueue(
            name, connection=self.connection, job_class=ChunkJob, serializer=JSONSerializer
        )

    def enqueue(self, job: Folder, chunks: Sequence[int], priority: str = "normal") -> int:
        """Queue these chunks of a job; those that wait or run already are left alone.

        Returns:
            How many chunks were added.
        """
        model = ModelKey(job.manifest.model, job.manifest.revision)
        queue = self.queue(model.queue_of(priority))
        added = 0
        with reaching(self.url):
            self.connection.hset(MODELS_KEY, queue.name, json.dumps([model.name, model.revision]))
            with self._turn(job.id):
                self._forget_older(job)
            for start in range(0, len(chunks), BATCH):
                with self._turn(job.id):
                    added += self._enqueue_batch(queue, job, chunks[start : start + BATCH])
        return added

    @contextlib.contextmanager
    def _turn(self, job_id: str) -> Iterator[None]:
        """Of those who enqueue chunks of a job, let one at a time look and add.

        Who is stopped in here for longer than the lock lives (Ctrl-Z, a laptop that sleeps) has
        lost it. That costs nothing: a chunk that two have added is leased once, and one that is
        done already ends at once.
        """
        lock = self.connection.lock(f"{PREFIX}enqueue:{job_id}", timeout=LOCK_S)
        lock.acquire()
        try:
            yield
        finally:
            try:
                lock.release()
            except LockError:
                logger.debug("job %s: enqueueing took longer than its lock lives", job_id)

    def _forget_older(self, job: Folder) -> None:
        """Count no chunk of an earlier generation any more that has come to its end."""
        ours = chunk_id(job, 0).rpartition("-")[0]  # of this generation
        older = [i for i in self.ids(job) if not i.startswith(f"{ours}-")]
        over = [i for i, status in self._statuses(older).items() if not _is_open(status)]
        if over:
            self.connection.srem(index_key(job), *over)

    def _enqueue_batch(self, queue: ChunkQueue, job: Folder, chunks: Sequence[int]) -> int:
        ids = {chunk: chunk_id(job, chunk) for chunk in chunks}
        statuses = self._statuses(list(ids.values()))
        fresh = {chunk: i for chunk, i in ids.items() if not _is_open(statuses[i])}
        if not fresh:
            return 0
        with self.connection.pipeline() as pipeline:
            # What an earlier round left behind would be merged into the new job's hash.
            pipeline.delete(*(ChunkJob.key_for(rq_id) for rq_id in fresh.values()))
            for name in ModelKey(job.manifest.model, job.manifest.revision).queue_names:
                pipeline.zrem(self.queue(name).failed_job_registry.key, *fresh.values())
                pipeline.zrem(self.queue(name).finished_job_registry.key, *fresh.values())
            pipeline.sadd(index_key(job), *fresh.values())
            pipeline.expire(index_key(job), FAILURE_TTL_S)
            queue.enqueue_many(
                [_job_data(job, chunk, rq_id) for chunk, rq_id in fresh.items()], pipeline=pipeline
            )
            pipeline.execute()
        return len(fresh)

    def counts(self, job: Place) -> Counts:
        """Chunks of a job by where they are. A job that was never enqueued has none anywhere."""
        with reaching(self.url):
            found = list(self._statuses(self.ids(job)).values())
        queued = sum(status in WAITING for status in found)
        failed = found.count(JobStatus.FAILED) + found.count(JobStatus.STOPPED)
        return Counts(
            queued, found.count(JobStatus.STARTED), failed, found.count(JobStatus.FINISHED)
        )

    def failures(self, job: Place) -> dict[int, str]:
        """Of each failed chunk of a job, the last line of what went wrong."""
        with reaching(self.url):
            failed = self.ids(job, JobStatus.FAILED)
            found = [failure_of(rq_id, self.connection) for rq_id in failed]
        return dict(sorted(one for one in found if one is not None))

    def ids(self, job: Place, status: JobStatus | None = None) -> list[str]:
        """The rq jobs of a job's chunks; only those of a status unless that is None."""
        ids = [text_of(rq_id) for rq_id in self.connection.smembers(index_key(job))]
        if status is None:
            return ids
        return [rq_id for rq_id, found in self._statuses(ids).items() if found == status]

    def fetch(self, ids: Sequence[str]) -> list[ChunkJob]:
        """These rq jobs, without those that are gone."""
        found = (entry_of(rq_id, self.connection) for rq_id in ids)
        return [job for job in found if job is not None]

    def models(self) -> dict[str, ModelKey]:
        """Every queue that was ever filled, by name, and its model."""
        with reaching(self.url):
            found: dict[bytes, bytes] = self.connection.hgetall(MODELS_KEY)  # type: ignore[assignment]
        known = {name: _model(name, model) for name, model in found.items()}
        return {name.decode(): model for name, model in known.items() if model is not None}

    def longest_waiting(self, held: ModelKey | None = None) -> ModelKey | None:
        """The model of the most urgent chunk that waits; None if nothing waits.

        Among the equally urgent the model that is `held` comes first, then the one whose next chunk
        was enqueued first.
        """
        models = self.models()
        with reaching(self.url), self.connection.pipeline(transaction=False) as pipeline:
            for name in models:
                pipeline.lindex(self.queue(name).key, 0)
            heads = [
                (name, text_of(rq_id))
                for name, rq_id in zip(models, answers_of(pipeline), strict=True)
                if rq_id is not None
            ]
            for _, rq_id in heads:
                pipeline.hget(ChunkJob.key_for(rq_id), "enqueued_at")
            since = [text_of(answer or b"") for answer in answers_of(pipeline)]
        found = [
            (PRIORITIES.index(priority_of(name)), models[name] != held, when, name)
            for when, (name, _) in zip(since, heads, strict=True)
        ]
        return models[min(found)[-1]] if found else None

    def waiting(self, model: ModelKey) -> int:
        """Chunks of this model that nobody has taken yet, of whatever priority."""
        return sum(self.waiting_by_priority(model).values())

    def waiting_by_priority(self, model: ModelKey) -> dict[str, int]:
        """Chunks of this model that nobody has taken yet, the most urgent first."""
        with reaching(self.url), self.connection.pipeline(transaction=False) as pipeline:
            for name in model.queue_names:
                pipeline.llen(self.queue(name).key)
            return dict(zip(PRIORITIES, pipeline.execute(), strict=True))

    def queues(self) -> list[QueueInfo]:
        """Every model's queue with what waits, runs and failed in it."""
        infos = []
        models = self.models()
        with reaching(self.url):
            for name, model in sorted(models.items()):
                queue = self.queue(name)
                with self.connection.pipeline() as pipeline:
                    pipeline.llen(queue.key)
                    pipeline.zcard(queue.started_job_registry.key)
                    pipeline.zcard(queue.failed_job_registry.key)
                    queued, started, failed = pipeline.execute()
                workers = len(get_keys(queue=queue))
                infos.append(
                    QueueInfo(name, model, priority_of(name), queued, started, failed, workers)
                )
        return infos

    def workers(self) -> list[WorkerInfo]:
        """The workers that live, by name."""
        with reaching(self.url):
            members = self.connection.smembers(REDIS_WORKER_KEYS)
            keys = sorted(text_of(key) for key in members)
            with self.connection.pipeline() as pipeline:
                for key in keys:
                    pipeline.hgetall(key)
                    pipeline.scard(f"{key}:executions")
                answers = answers_of(pipeline)
        found = zip(keys, answers[::2], answers[1::2], strict=True)
        return [_worker_info(key, data, chunks or 0) for key, data, chunks in found if data]

    def _statuses(self, ids: Sequence[str]) -> dict[str, JobStatus | None]:
        """Where each rq job is; None if there is none of this id."""
        found: dict[str, JobStatus | None] = {}
        for start in range(0, len(ids), 1000):
            some = ids[start : start + 1000]
            with self.connection.pipeline(transaction=False) as pipeline:
                for rq_id in some:
                    pipeline.hget(ChunkJob.key_for(rq_id), "status")
                for rq_id, status in zip(some, answers_of(pipeline), strict=True):
                    found[rq_id] = _STATUSES.get(status)
        return found


def _connection(url: str, breaks: Breaks, *, attempts: int, answer_s: float) -> redis.Redis:
    limits = {"socket_timeout": answer_s}
    if not url.startswith("unix:"):
        limits["socket_connect_timeout"] = answer_s
    return connect(url, retry=Patience(url, breaks, attempts), **limits)


def _job_data(job: Folder, chunk: int, rq_id: str) -> EnqueueData:
    return Queue.prepare_data(
        FUNCTION,
        args=[os.fspath(job.path), chunk, job.manifest.generation],
        timeout=-1,  # rq's timers cannot stop an engine; a lease that is not renewed runs out
        result_ttl=RESULT_TTL_S,
        failure_ttl=FAILURE_TTL_S,
        description=f"{job.id} chunk {chunk}",
        job_id=rq_id,
        # No interval: a crash's retry would wait for a scheduler, and there is none.
        retry=Retry(max=RETRIES, interval=0, enqueue_at_front=True),
    )


def _worker_info(key: str, data: dict[bytes, bytes], chunks: int) -> WorkerInfo:
    text = {text_of(name): text_of(value) for name, value in data.items()}
    return WorkerInfo(
        name=key.partition(":worker:")[2],
        state=text.get("state", "?"),
        model=text.get("trbatch_model", ""),
        host=text.get("hostname", ""),
        pid=number_of(text.get("pid")),
        born=text.get("birth", ""),
        last_heartbeat=text.get("last_heartbeat", ""),
        chunks=chunks,
        finished=number_of(text.get("successful_job_count")),
        failed=number_of(text.get("failed_job_count")),
    )


def _is_open(status: JobStatus | None) -> bool:
    """Whether a chunk still waits or runs."""
    return status in WAITING or status == JobStatus.STARTED


def _model(name: bytes, value: bytes) -> ModelKey | None:
    """A queue's model, unless what Redis says of it is not what was written."""
    try:
        model, revision = json.loads(value)
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(model, str) or not isinstance(revision, str):
        return None
    found = ModelKey(model, revision)
    return found if name in (one.encode() for one in found.queue_names) else None
