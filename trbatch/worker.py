"""The worker: takes chunks from the queue, has the engine decode them, publishes finished rows.

One thread, this one, talks to Redis and to the job folders; another, `EngineThread`, decodes. A
chunk ends in the queue only after all its rows lie in segments, so whatever dies loses at most the
rows of the last seconds. Torch is imported where an engine is made and nowhere else.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Hashable
from functools import partial

from trbatch import server
from trbatch.aftermath import settle_broken
from trbatch.backoff import Backoff
from trbatch.chunk_lease import BadChunk, Lease
from trbatch.chunk_work import ChunkWork, Folders
from trbatch.config import WorkerConfig
from trbatch.confinement import Confinement
from trbatch.connection import mask_url, reaching, undisturbed
from trbatch.engine.sequence import Completion
from trbatch.engine_events import (
    Broken,
    Changes,
    Event,
    Finished,
    LoadFailed,
    Ready,
    Whole,
)
from trbatch.engine_thread import EngineThread, Loader, load_engine
from trbatch.errors import JobFailed, TrbatchError, Unreachable
from trbatch.flight import FlightRecord
from trbatch.holds import Holds, asked_again, clear_if_held, requeue_if_wanted
from trbatch.job import JobFolder
from trbatch.lease import LeaseWorker
from trbatch.metrics import Metrics, Moment, metrics_on
from trbatch.model_choice import IDLE_S, ModelChoice, watched
from trbatch.naming import worker_name
from trbatch.publishing import Publisher
from trbatch.queue import JobQueue
from trbatch.queue_names import ModelKey
from trbatch.recovery import Witness
from trbatch.server_revival import Revival
from trbatch.sharing import Sharing
from trbatch.stopping import Stops, signals_to
from trbatch.telling import Telling
from trbatch.turns import quick_turns

logger = logging.getLogger("trbatch.worker")

BUSY_S = 0.05  # the longest wait for the engine while it works
ENGINE_STOP_S = 60.0  # for the last step and the saving of the matrices
LEAVE_S = 0.5  # the same when somebody is tired of waiting
AHEAD = 1024  # requests in the engine, at least: a row may ask for a thousand samples


def run_worker(
    config: WorkerConfig, *, load: Loader | None = None, flight: FlightRecord | None = None
) -> int:
    """Work until stopped by a signal, at an hour, or with `config.burst` by an empty queue.

    Args:
        config: which model, which queue, how to decode.
        load: makes the engine of a model; the default loads it with torch.
        flight: its supervisor's record of it, if it has a supervisor.

    Returns:
        0; 4 if chunks were refused because their model could not be loaded; 128 plus the signal's
        number after a signal, when everything taken has been finished or handed back.

    Raises:
        ModelError: the configured model cannot be loaded.
        WorkerError: nor can a job's, but for this machine's or its options' fault; nothing failed.
        TrbatchError: the engine failed; its chunks are back in the queue.
        Unreachable: the queue was away for minutes. A storage that is away is waited for.
    """
    with (
        metrics_on(config.metrics_port, config.metrics_host) as metrics,
        JobQueue.connect(config.redis_url, patient=True) as jobs,
        reaching(jobs.url),
        quick_turns(),
    ):
        worker = BatchWorker(config, jobs, load or partial(load_engine, config), flight, metrics)
        with signals_to(worker.stop.ask):
            return worker.run()


class BatchWorker:
    """One worker around one engine.

    Args:
        config: see `WorkerConfig`.
        jobs: the queue, on a patient connection.
        load: makes the engine of a model, in the engine's thread.
        flight: what is known of this worker should it die; None: nobody reads it.
        metrics: what to count; None counts nothing.
    """

    def __init__(
        self,
        config: WorkerConfig,
        jobs: JobQueue,
        load: Loader,
        flight: FlightRecord | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config = config
        self.jobs = jobs
        self.name = worker_name(config.name or f"{socket.gethostname()}-{config.engine.device}")
        self.chunks: dict[str, ChunkWork] = {}
        self.stop = Stops(config.grace_s, config.until)
        self._flight = flight or FlightRecord.create()
        own = jobs.url == server.own_url()
        self._folders = Folders(Confinement(config.roots, anywhere=own))
        self._reading = Backoff()  # job folders
        self._witness = Witness()
        self._engine = EngineThread(load, flight=self._flight)
        self._sharing = Sharing(self._engine, jobs)
        self._publisher = Publisher(self.name, config.publish_s, self._was_published)
        fixed = ModelKey.of(config.model, config.revision) if config.model else None
        self._leases = LeaseWorker(jobs.connection, self.name, watched(jobs, fixed), self._flight)
        self._models = ModelChoice(fixed, jobs, self._leases, self._engine.load, self._folders)
        self._tell = Telling(self.name, metrics or Metrics())
        self._holds = Holds()
        self._revival = Revival()  # of the embedded server
        self._cut_off = False  # stopped while the queue was away: it is not asked again

    def run(self) -> int:
        """Work until there is a reason to stop. See `run_worker`."""
        self.jobs.breaks.use(self._while_away)
        self._leases.open()
        self._engine.start()
        try:
            while not self._may_stop():
                with undisturbed():
                    self._beat()
                    if not (self.stop.count or self.chunks):
                        self._models.choose()
                    self._take_chunks()
                self._feed_engine()
                self._hear_engine()
                self._publisher.publish_if_due(hurry=self._waits_for_publication())
                with undisturbed():
                    self._finish_chunks()
        finally:
            try:
                self._wind_up()
            finally:
                self._leases.leave()
        return self.stop.exit_code or (JobFailed.exit_code if self._models.refused else 0)

    def _may_stop(self) -> bool:
        if self._leases.shutdown_asked and not self.stop.count:
            self.stop.ask(signal.SIGINT)
        self._tell.asked_to_stop(self.stop.look(), len(self.chunks), self.config.grace_s)
        if self.stop.count > 1:
            return True
        if self.chunks:
            return False
        return self.stop.count > 0 or (self.config.burst and self._nothing_waits())

    def _while_away(self) -> None:
        """The queue's server is away: publish what is finished, and leave if it is time to."""
        if self.jobs.embedded:
            self._revival.begin()
        events = self._engine.next_events(0.0)
        for event in events:
            if isinstance(event, Finished):
                self._heed(event)
            else:
                self._engine.events.put(event)  # for when it is back
        self._publisher.publish_if_due()
        if self.stop.look() > 1:
            self._cut_off = True
            raise Unreachable(
                f"asked to stop while the queue at {mask_url(self.jobs.url)} is away",
                hint="chunks in flight come back when their leases run out; finished rows are kept",
            )

    def _nothing_waits(self) -> bool:
        """Whether nothing is left that is nobody's; what the dead have left comes back yet."""
        return not self._models.waits() and self._witness.all_live(self._leases.queues)

    def _beat(self) -> None:
        for lease in self._leases.beat():
            self._tell.lease_lost(lease)
            self._abandon(lease)
        for lease in self._leases.stopped():
            logger.info("chunk %d of %s: stopped on request", lease.chunk, lease.folder)
            self._leases.stop_chunk(lease)
            self._abandon(lease)
        self._release_held()
        self._sharing.tick()
        waiting, failures = self._publisher.rows, self._publisher.failures
        now = Moment(len(self.chunks), self._owed_rows(), waiting, failures, self._engine.stats)
        self._tell.moment(now, self.jobs)

    def _release_held(self) -> None:
        """Let go of the chunks of jobs that are paused, cancelled or past their deadline."""
        held = self._holds.found(work.folder for work in self.chunks.values())
        if held:
            self._publisher.publish()  # first: who waits for their chunks to end may collect then
        for work in [work for work in self.chunks.values() if work.folder in held]:
            logger.info("chunk %d of %s: the job is held", work.lease.chunk, work.folder.id)
            self._leases.finish(work.lease, {"rows": len(work.rows) - len(work.owed)})
            self._abandon(work.lease)
            requeue_if_wanted(self.jobs, work.folder, work.lease.chunk)

    def _abandon(self, lease: Lease) -> None:
        """Let go of a chunk that is no longer ours; finished rows are published all the same."""
        work = self.chunks.pop(lease.id, None)
        if work is not None:
            self._engine.abort([(lease.id, place) for place in work.given])

    def _take_chunks(self) -> None:
        for lease in self._models.take(self._room):
            self._begin(lease)

    def _room(self) -> bool:
        """Whether to take another chunk: the engine should never see the end of what it has.

        While a storage is away or full nothing more is taken.
        """
        if self.stop.count or any(work.quarantined for work in self.chunks.values()):
            return False
        if self._publisher.failing or self._reading.resting:
            return False
        if self.config.chunks_in_flight:
            return len(self.chunks) < self.config.chunks_in_flight
        return self._owed_rows() < 2 * self._models.capacity

    def _owed_rows(self) -> int:
        return sum(len(work.owed) for work in self.chunks.values())

    def _waits_for_publication(self) -> bool:
        """Whether nothing goes on before the finished rows are published."""
        return not self._owed_rows() or any(work.held_up for work in self.chunks.values())

    def _begin(self, lease: Lease) -> None:
        """Take a chunk's missing rows on."""
        try:
            folder = self._folders.open(lease)
            work = ChunkWork.begin(lease, folder)
        except BadChunk as error:
            logger.error("chunk %d refused: %s", lease.chunk, error)
            self._leases.fail(lease, error, final=True)
            return
        except (Unreachable, MemoryError) as error:
            # No fault of the chunk: it waits, behind the others.
            pause = self._reading.failed()
            self._leases.hand_back(lease, front=False)
            logger.warning("no chunk is taken for %.1f s: %s", pause, error)
            return
        except Exception as error:  # noqa: BLE001  whatever it is, it is this chunk's failure
            logger.error("chunk %d of %s cannot be read: %s", lease.chunk, lease.folder, error)
            self._leases.fail(lease, error)
            return
        self._reading.worked()
        self._tell.chunk_taken(lease)
        self.chunks[lease.id] = work
        if work.held:
            clear_if_held(self.jobs, folder)

    def _feed_engine(self) -> None:
        """Give the engine rows: more than it decodes together, not all samples of all at once."""
        room = max(AHEAD, 4 * self._models.capacity) - sum(
            w.in_engine for w in self.chunks.values()
        )
        for work in self.chunks.values():
            if work.quarantined and len(self.chunks) > 1:  # first the others come to their end
                continue
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
        busy = bool(self.chunks) or self._models.loading is not None
        for event in self._engine.next_events(BUSY_S if busy else IDLE_S):
            self._heed(event)

    def _heed(self, event: Event) -> None:
        match event:
            case Finished(completions, steps):
                paths = [work.lease.folder for work in self.chunks.values()]
                self._publisher.count_steps(paths, steps)
                for completion in completions:
                    self._row_done(completion)
            case Changes() | Whole():
                self._sharing.heed(event)
            case Ready(model, capacity, seconds, facts):
                self._sharing.forget()
                self._models.loaded(model, capacity)
                self._publisher.facts = facts
                self._tell.model_ready(model, capacity, seconds, facts)
            case LoadFailed(model, error):
                self._models.refuse(model, error)
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
        work.given.discard(place)
        work.unpublished += 1
        work.failed_rows += completion.finish_reason == "error"
        self._publisher.add(work.lease.folder, work.folder, result, work)
        self._tell.row(completion)

    def _was_published(self, owner: Hashable) -> None:
        assert isinstance(owner, ChunkWork)
        owner.unpublished -= 1

    def _finish_chunks(self) -> None:
        for work in [work for work in self.chunks.values() if work.done]:
            del self.chunks[work.lease.id]
            result = {"rows": len(work.rows), "failed": work.failed_rows}
            # A chunk with suspects is given to nobody with them: they came to their end.
            if not work.quarantined and asked_again(work):
                self._leases.hand_back(work.lease, front=False)
            elif not self._leases.finish(work.lease, result):
                self._tell.lease_lost(work.lease)
            elif work.held or asked_again(work):
                requeue_if_wanted(self.jobs, work.folder, work.lease.chunk)
            else:
                self._tell.chunk_done(work.lease, result)
            if all(other.folder is not work.folder for other in self.chunks.values()):
                self._sharing.finish(work.folder.task_key)
                self._folders.close_idle(work.lease.folder for work in self.chunks.values())

    def _break(self, error: BaseException) -> None:
        """The engine raised. Keep what is finished, put the rest back, end."""
        self._publisher.publish()
        self._finish_chunks()
        machines = OSError | MemoryError | Unreachable
        if isinstance(error, machines) or isinstance(error.__cause__, machines):
            self._hand_back_all()  # no row's fault
        settle_broken(self.jobs, self._flight, error)
        for work in list(self.chunks.values()):
            self._leases.drop(work.lease)
            self._abandon(work.lease)
        raise TrbatchError(
            f"the engine failed: {type(error).__name__}: {error}",
            hint="its chunks went back to the queue; `trbatch status` shows them",
        ) from error

    def _wind_up(self) -> None:
        """Publish what is finished, hand back what is not, save, disappear."""
        try:
            self._hear_last()
            self._publisher.publish()
            if lost := self._publisher.rows:
                logger.warning("%d finished rows could not be published and are given up", lost)
            if self.stop.count <= 2 and not self._cut_off:
                self._finish_chunks()
                self._hand_back_all()
                self._sharing.close()
        finally:
            patient = self.stop.count <= 2  # else somebody is tired of waiting
            nothing_to_save = self._models.loading is not None
            wait_s = ENGINE_STOP_S if patient and not nothing_to_save else LEAVE_S
            if not self._engine.stop(wait_s) and not nothing_to_save:
                logger.warning("the engine did not stop in time; its matrices may not be saved")
            self._tell.last()
            if patient and not self._cut_off:
                self._leases.close()

    def _hear_last(self) -> None:
        """What has happened meanwhile and is still of use; the rest would only raise again."""
        for event in self._engine.next_events(0.0):
            match event:
                case Finished():
                    self._heed(event)
                case Changes() | Whole() if self.stop.count <= 2:
                    self._heed(event)
                case Broken(error):
                    logger.warning("the engine failed at the end: %s", error)
                case _:
                    logger.debug("too late: %s", type(event).__name__)

    def _hand_back_all(self) -> None:
        for work in list(self.chunks.values()):
            self._leases.hand_back(work.lease)
            self._abandon(work.lease)
