"""The worker: takes chunks from the queue, has the engine decode them, publishes finished rows.

One thread, this one, talks to Redis and to the job folders; another, `EngineThread`, decodes. A
chunk ends in the queue only after all its rows lie in segments, so whatever dies loses at most the
rows of the last seconds. Torch is imported where an engine is made and nowhere else.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Hashable
from functools import partial

from trbatch.chunk_job import ChunkQueue
from trbatch.chunk_work import ChunkWork, Folders
from trbatch.config import WorkerConfig
from trbatch.connection import reaching
from trbatch.engine.sequence import Completion
from trbatch.engine_thread import (
    Broken,
    Changes,
    Engine,
    EngineThread,
    Event,
    Finished,
    Loader,
    LoadFailed,
    Ready,
    Whole,
)
from trbatch.errors import JobFailed, ModelError, TrbatchError, WorkerError
from trbatch.job import JobFolder
from trbatch.lease import BadChunk, Lease, LeaseWorker
from trbatch.publishing import Publisher, Report
from trbatch.queue import JobQueue, ModelKey
from trbatch.sharing import Sharing
from trbatch.stopping import signals_to

logger = logging.getLogger("trbatch.worker")

IDLE_S = 0.2  # between looks at an empty queue
BUSY_S = 0.05  # the longest wait for the engine while it works
ENGINE_STOP_S = 60.0  # for the last step and the saving of the matrices
LEAVE_S = 0.5  # the same when somebody is tired of waiting
AHEAD = 1024  # requests in the engine, at least: a row may ask for a thousand samples
SAME_SIGNAL_S = 0.5  # a terminal and a parent may both pass on the same Ctrl-C


def run_worker(config: WorkerConfig, *, load: Loader | None = None) -> int:
    """Work until stopped by a signal or, with `config.burst`, until the queue is empty.

    Args:
        config: which model, which queue, how to decode.
        load: makes the engine of a model; the default loads it with torch.

    Returns:
        0; 4 if chunks were refused because their model could not be loaded; 128 plus the signal's
        number after a signal, when everything taken has been finished or handed back.

    Raises:
        ModelError: the configured model cannot be loaded.
        WorkerError: nor can a job's, but for this machine's or its options' fault; nothing failed.
        TrbatchError: the engine failed; its chunks are back in the queue.
        Unreachable: the queue or the storage was away for minutes.
    """
    with JobQueue.connect(config.redis_url, patient=True) as jobs, reaching(jobs.url):
        worker = BatchWorker(config, jobs, load or partial(load_engine, config))
        with signals_to(worker.request_stop):
            return worker.run()


def load_engine(config: WorkerConfig, model: ModelKey) -> Engine:
    """Load a model and put an engine round it. Imports torch."""
    from trbatch.engine.engine import Engine as TorchEngine
    from trbatch.engine.loading import loading
    from trbatch.models import load_model

    with loading(model.name):
        loaded = load_model(
            model.name,
            revision=model.revision,
            device=config.engine.device,
            dtype=config.engine.dtype,
            trust_remote_code=config.trust_remote_code,
        )
        return TorchEngine(loaded, config.engine)


class BatchWorker:
    """One worker around one engine.

    Args:
        config: see `WorkerConfig`.
        jobs: the queue, on a patient connection.
        load: makes the engine of a model, in the engine's thread.
    """

    def __init__(self, config: WorkerConfig, jobs: JobQueue, load: Loader) -> None:
        self.config = config
        self.jobs = jobs
        self.name = _worker_name(config)
        self.fixed = _fixed_model(config)
        self.model: ModelKey | None = None  # that the engine holds
        self.loading: ModelKey | None = None
        self.capacity = 0
        self.chunks: dict[str, ChunkWork] = {}
        self.refused = 0
        self.stops = 0  # how often we were asked to stop
        self.exit_code = 0
        self._folders = Folders(config.roots)
        self._engine = EngineThread(load)
        self._sharing = Sharing(self._engine, jobs)
        self._publisher = Publisher(self.name, config.publish_s, self._was_published)
        self._leases = LeaseWorker(jobs.connection, self.name, self._watched())
        self._report = Report()
        self._asked_at = 0.0
        self._looked_at = 0.0

    def run(self) -> int:
        """Work until there is a reason to stop. See `run_worker`."""
        self._leases.open()
        self._engine.start()
        try:
            while not self._may_stop():
                self._beat()
                self._choose_model()
                self._take_chunks()
                self._feed_engine()
                self._hear_engine()
                self._publisher.publish_if_due(hurry=not self._owed_rows())
                self._finish_chunks()
        finally:
            self._wind_up()
        return self.exit_code or (JobFailed.exit_code if self.refused else 0)

    def request_stop(self, number: int) -> None:
        """Stop: the first time finish what was taken, the second time hand it back.

        The third time leave at once; leases run out by themselves. `number` is the signal's.
        """
        now = time.monotonic()
        if now - self._asked_at < SAME_SIGNAL_S:
            return
        self._asked_at = now
        self.stops += 1
        self.exit_code = 128 + number
        if self.stops > 2:
            raise KeyboardInterrupt

    def _may_stop(self) -> bool:
        if self._leases.shutdown_asked and not self.stops:
            self.request_stop(signal.SIGINT)
        if self.stops > 1:
            return True
        if self.chunks:
            return False
        return self.stops > 0 or (self.config.burst and self._nothing_waits())

    def _nothing_waits(self) -> bool:
        if self.fixed is not None:
            return self.jobs.waiting(self.fixed) == 0
        return self.jobs.longest_waiting() is None

    def _beat(self) -> None:
        for lease in self._leases.beat():
            logger.warning("chunk %d of %s: its lease was lost", lease.chunk, lease.folder)
            self._abandon(lease)
        for lease in self._leases.stopped():
            logger.info("chunk %d of %s: stopped on request", lease.chunk, lease.folder)
            self._leases.stop_chunk(lease)
            self._abandon(lease)
        self._sharing.tick()
        self._report.tick(len(self.chunks), self._owed_rows())

    def _abandon(self, lease: Lease) -> None:
        """Let go of a chunk that is no longer ours; finished rows are published all the same."""
        work = self.chunks.pop(lease.id, None)
        if work is not None:
            self._engine.abort([(lease.id, place) for place in work.owed if place < work.given])

    def _choose_model(self) -> None:
        """See to it that the engine holds the model that the next chunk needs."""
        if self.stops or self.loading or self.chunks:
            return
        if self.fixed is not None:
            wanted: ModelKey | None = self.fixed
        elif self.model is not None and self.jobs.waiting(self.model):
            wanted = self.model
        elif not self._look_again():
            return
        else:
            if len(self._leases.queues) != len(queues := self._watched()):
                self._leases.watch(queues)
            wanted = self.jobs.longest_waiting()
        if wanted is not None and wanted != self.model:
            self._load(wanted)

    def _load(self, model: ModelKey) -> None:
        logger.info("loading %s", model)
        self.model, self.loading = None, model
        self._leases.say("loading", str(model))
        self._engine.load(model)

    def _watched(self) -> list[ChunkQueue]:
        names = [self.fixed.queue_name] if self.fixed is not None else list(self.jobs.models())
        return [self.jobs.queue(name) for name in names]

    def _take_chunks(self) -> None:
        if self.stops or self.model is None or not self._room():
            return
        if self._looked_at and not self._look_again():
            return
        queue = self.jobs.queue(self.model.queue_name)
        while self._room() and not self.stops:
            lease = self._leases.take(queue)
            if lease is None:
                self._looked_at = time.monotonic()
                return
            self._begin(lease)
        self._looked_at = 0.0

    def _look_again(self) -> bool:
        """Whether an empty queue is due for another look."""
        now = time.monotonic()
        if now - self._looked_at < IDLE_S:
            return False
        self._looked_at = now
        return True

    def _room(self) -> bool:
        """Whether to take another chunk: the engine should never see the end of what it has."""
        if self.config.chunks_in_flight:
            return len(self.chunks) < self.config.chunks_in_flight
        return self._owed_rows() < 2 * self.capacity

    def _owed_rows(self) -> int:
        return sum(len(work.owed) for work in self.chunks.values())

    def _begin(self, lease: Lease) -> None:
        """Take a chunk's missing rows on."""
        try:
            folder = self._folders.open(lease)
            work = ChunkWork.begin(lease, folder)
        except BadChunk as error:
            logger.error("chunk %d refused: %s", lease.chunk, error)
            self._leases.fail(lease, error, final=True)
            return
        except Exception as error:  # noqa: BLE001  whatever it is, it is this chunk's failure
            logger.error("chunk %d of %s cannot be read: %s", lease.chunk, lease.folder, error)
            self._leases.fail(lease, error)
            return
        self.chunks[lease.id] = work

    def _feed_engine(self) -> None:
        """Give the engine rows: more than it decodes together, not all samples of all at once."""
        room = max(AHEAD, 4 * self.capacity) - sum(w.in_engine for w in self.chunks.values())
        for work in self.chunks.values():
            requests, impossible = work.requests(max(room, 0))
            room -= len(requests)
            for completion in impossible:
                self._row_done(completion)
            if requests:
                self._engine.add(requests)
                self._share(work.folder)

    def _share(self, folder: JobFolder) -> None:
        model = self._publisher.facts.get("model_fingerprint")
        if model and not folder.spec.private_matrix:
            self._sharing.open(folder.task_key, model)

    def _hear_engine(self) -> None:
        busy = bool(self.chunks) or self.loading is not None
        for event in self._engine.next_events(BUSY_S if busy else IDLE_S):
            self._heed(event)

    def _heed(self, event: Event) -> None:
        match event:
            case Finished(completions):
                for completion in completions:
                    self._row_done(completion)
            case Changes() | Whole():
                self._sharing.heed(event)
            case Ready(model, capacity, seconds, facts):
                self._sharing.forget()
                self.model, self.loading, self.capacity = model, None, capacity
                self._looked_at = 0.0
                self._publisher.facts = facts
                self._leases.say("idle", str(model))
                logger.info("%s is ready after %.1f s, batch %d", model, seconds, capacity)
            case LoadFailed(model, error):
                self.loading = None
                self._refuse(model, error)
            case Broken(error):
                self._break(error)

    def _row_done(self, completion: Completion) -> None:
        assert isinstance(completion.key, tuple)
        lease_id, place = completion.key
        work = self.chunks.get(lease_id)
        if work is None or place not in work.owed:  # the chunk was given up meanwhile
            return
        result = work.result(completion, place, self.name)
        work.owed.discard(place)
        work.unpublished += 1
        work.failed_rows += completion.finish_reason == "error"
        self._publisher.add(work.lease.folder, work.folder, result, work)
        self._report.count(completion)

    def _was_published(self, owner: Hashable) -> None:
        assert isinstance(owner, ChunkWork)
        owner.unpublished -= 1

    def _finish_chunks(self) -> None:
        for work in [work for work in self.chunks.values() if work.done]:
            del self.chunks[work.lease.id]
            result = {"rows": len(work.rows), "failed": work.failed_rows}
            self._leases.finish(work.lease, result)
            logger.debug("chunk %d of %s is done", work.lease.chunk, work.folder.id)
            if all(other.folder is not work.folder for other in self.chunks.values()):
                self._sharing.finish(work.folder.task_key)
                self._folders.close_idle(work.lease.folder for work in self.chunks.values())

    def _refuse(self, model: ModelKey, error: Exception) -> None:
        """A model cannot be loaded: a job's own fails that model's chunks, all else ends us."""
        if not isinstance(error, TrbatchError):
            error = ModelError(f"loading {model} failed: {type(error).__name__}: {error}")
        its_fault = isinstance(error, ModelError) and not isinstance(error, WorkerError)
        if self.fixed is not None or not its_fault:
            raise error
        logger.error("%s cannot be loaded, its chunks fail: %s", model, error)
        while lease := self._leases.take(self.jobs.queue(model.queue_name)):
            self._leases.fail(lease, error, final=True)
            self.refused += 1

    def _break(self, error: BaseException) -> None:
        """The engine raised. Keep what is finished, put the rest back, end."""
        self._publisher.publish()
        self._finish_chunks()
        for lease_id in list(self.chunks):
            self._leases.fail(self.chunks.pop(lease_id).lease, error)
        raise TrbatchError(
            f"the engine failed: {type(error).__name__}: {error}",
            hint="its chunks went back to the queue; `trbatch status` shows them",
        ) from error

    def _wind_up(self) -> None:
        """Publish what is finished, hand back what is not, save, disappear."""
        try:
            self._hear_last()
            self._publisher.publish()
            if self.stops <= 2:
                self._finish_chunks()
                self._hand_back_all()
                self._sharing.close()
        finally:
            patient = self.stops <= 2  # else somebody is tired of waiting, perhaps for the queue
            if not self._engine.stop(ENGINE_STOP_S if patient else LEAVE_S):
                logger.warning("the engine did not stop in time; its matrices may not be saved")
            self._report.last(self.name)
            if patient:
                self._leases.close()

    def _hear_last(self) -> None:
        """What has happened meanwhile and is still of use; the rest would only raise again."""
        for event in self._engine.next_events(0.0):
            match event:
                case Finished():
                    self._heed(event)
                case Changes() | Whole() if self.stops <= 2:
                    self._heed(event)
                case Broken(error):
                    logger.warning("the engine failed at the end: %s", error)
                case _:
                    logger.debug("too late: %s", type(event).__name__)

    def _hand_back_all(self) -> None:
        for work in list(self.chunks.values()):
            self._leases.hand_back(work.lease)
            self._abandon(work.lease)


def _fixed_model(config: WorkerConfig) -> ModelKey | None:
    return ModelKey.of(config.model, config.revision) if config.model else None


def _worker_name(config: WorkerConfig) -> str:
    """Never used twice, not even by a restarted container: segments are named after it."""
    name = config.name or f"{socket.gethostname()}-{config.engine.device}-{os.getpid()}"
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return f"{safe}-{uuid.uuid4().hex[:6]}"
