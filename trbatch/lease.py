"""rq's worker without its loop: take chunks, keep their leases alive, say how they ended.

A lease is an entry in rq's registry of started jobs that runs out unless it is renewed. A chunk
whose lease ran out goes back to the queue by the hand of any worker of that queue. Everything here
runs in one thread; what comes in from rq's command channel is put aside for it.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Iterable, Sequence
from typing import Any

import redis
from rq import worker_registration
from rq.command import parse_payload
from rq.exceptions import DeserializationError, InvalidJobOperation
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.serializers import JSONSerializer
from rq.worker import SimpleWorker
from rq.worker.base import WorkerStatus

from trbatch import recovery
from trbatch.chunk_job import LOCK_S, ChunkJob, ChunkQueue
from trbatch.chunk_lease import BadChunk, Lease, payload_of
from trbatch.flight import FlightRecord
from trbatch.queue import WORKER_ANSWER_S
from trbatch.queue_names import CLAIM
from trbatch.suspects import Suspects

logger = logging.getLogger("trbatch.worker")

BEAT_S = 3.0  # between renewals
LEASE_S = 15  # a dead worker's chunks come back after this; no step may hold the GIL as long
WORKER_TTL_S = 60


class LeaseWorker(SimpleWorker):
    """What a worker says to Redis. The caller's loop decides when.

    Args:
        connection: patient with a server that is away.
        name: of the worker, never used before.
        queues: whose abandoned chunks to bring back.
        flight: where the leases are noted for whoever finds this worker dead, and where the
            engine's pulse is: leases are renewed only while it beats.
    """

    job_class = ChunkJob
    queue_class = ChunkQueue

    def __init__(
        self,
        connection: redis.Redis,
        name: str,
        queues: Sequence[ChunkQueue],
        flight: FlightRecord | None = None,
    ) -> None:
        super().__init__(
            list(queues),
            name=name,
            connection=connection,
            serializer=JSONSerializer,
            maintenance_interval=int(BEAT_S),
            worker_ttl=WORKER_TTL_S,
            log_job_description=False,
        )
        self.log.setLevel(logging.WARNING)  # a line per job and clean-up is rq's habit, not ours
        self.leases: dict[str, Lease] = {}
        self.shutdown_asked = False
        self._flight = flight or FlightRecord.create()
        self._commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._last_beat = time.monotonic()
        self._no_reaping_until = 0.0
        self._hung = False
        self._left = False

    @property
    def connection_timeout(self) -> int:
        """Seconds that a command may take: rq raises a connection's limit to these."""
        return int(WORKER_ANSWER_S)

    def open(self) -> None:
        """Appear among the workers and listen for commands."""
        self.register_birth()  # type: ignore[no-untyped-call]
        self._note()
        self.subscribe()
        self.set_state(WorkerStatus.STARTED)

    def close(self) -> None:
        """Disappear from the workers. Leases still held run out by themselves."""
        try:
            self.teardown()  # type: ignore[no-untyped-call]
        finally:
            self.leave()

    def leave(self) -> None:
        """Say nothing to the queue any more: the leases and the worker's entry run out."""
        self._left = True
        if not self.leases:
            self._flight.note_holdings("", [], {})
        if self.pubsub_thread:
            self.pubsub_thread.stop()

    def subscribe(self) -> None:
        """Listen for commands in a thread of rq's that can be ended within half a second."""
        self.pubsub = self.connection.pubsub()  # type: ignore[no-untyped-call]
        self.pubsub.subscribe(**{self.pubsub_channel_name: self.handle_payload})
        self.pubsub_thread = self.pubsub.run_in_thread(  # type: ignore[assignment]
            sleep_time=0.5, daemon=True, exception_handler=self._pubsub_exception_handler
        )

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """Go on after what breaks the listening thread, unless this worker leaves."""
        if not self._left:
            super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)

    def say(self, state: str, model: str) -> None:
        """Tell what this worker does, for `trbatch status`."""
        self.set_state(state)
        self.connection.hset(self.key, "trbatch_model", model)

    def watch(self, queues: Sequence[ChunkQueue]) -> None:
        """Listen on these queues from now on: their abandoned chunks are brought back."""
        gone = [found for found in self.queues if found not in queues]
        self.queues = list(queues)
        self._note()
        with self.connection.pipeline() as pipeline:
            for found in gone:
                pipeline.srem(worker_registration.WORKERS_BY_QUEUE_KEY % found.name, self.key)
            pipeline.hset(self.key, "queues", ",".join(self.queue_names()))
            worker_registration.register(self, pipeline)
            pipeline.execute()

    def take_first(self, queues: Iterable[ChunkQueue]) -> Lease | None:
        """The next chunk of the first of these queues that has one."""
        return next((lease for queue in queues if (lease := self.take(queue))), None)

    def take(self, queue: ChunkQueue) -> Lease | None:
        """The next chunk of this queue, leased; None if there is none.

        Entries that are no chunks of ours end as failed on the way.
        """
        while True:
            try:
                # One queue a call, and no waiting: an LMOVE, so a crash here loses nothing.
                found = ChunkQueue.dequeue_any(
                    [queue],
                    None,
                    connection=self.connection,
                    job_class=ChunkJob,
                    serializer=JSONSerializer,
                )
            except UnicodeDecodeError as error:
                # It stays where popped ids wait, and is removed there by the next clean-up.
                logger.error("queue %s: an id is no text and was removed: %s", queue.name, error)
                continue
            if found is None:
                return None
            if lease := self._claim(found[0], queue):
                return lease

    def _claim(self, job: Job, queue: ChunkQueue) -> Lease | None:
        """Lease a popped job unless somebody else has it: an id can be in the queue twice."""
        claim = CLAIM + job.id
        if not self.connection.set(claim, self.name, nx=True, ex=LOCK_S):
            return None  # its owner may be dead, so the id stays where a clean-up finds it
        try:
            if self._status(job) != JobStatus.QUEUED:
                recovery.pass_over(queue, job.id)
                return None
            return self._lease(job, queue)
        finally:
            self.connection.delete(claim)

    def _lease(self, job: Job, queue: ChunkQueue) -> Lease | None:
        job.redis_server_version = self.get_redis_server_version()  # type: ignore[no-untyped-call]
        execution = self.prepare_execution(job)
        try:
            self.prepare_job_execution(job, remove_from_intermediate_queue=True)
            folder, chunk, generation = payload_of(job)
        except (DeserializationError, BadChunk) as error:
            logger.error("queue %s: %s", queue.name, error or "an entry that cannot be read")
            self._fail(job, queue, execution, error, final=True)
            return None
        lost, suspects = recovery.history(self.connection, job.id)
        attempt = recovery.attempt_of(job.retries_left or 0, lost)
        lease = Lease(job, queue, execution, folder, chunk, generation, attempt, suspects)
        self.leases[lease.id] = lease
        self._note()
        return lease

    def holds(self, lease: Lease) -> bool:
        """Whether the lease is still ours: not run out and taken back, not cancelled."""
        key = lease.job.started_job_registry.key
        return self.connection.zscore(key, lease.execution.composite_key) is not None

    def finish(self, lease: Lease, result: dict[str, int]) -> bool:
        """Mark the chunk as done. False if the lease was lost before."""
        if not self.holds(lease):
            self.drop(lease)
            return False
        self._finalize_success(lease.job, lease.queue, lease.execution, result)
        self._forget(lease)
        return True

    def fail(self, lease: Lease, error: BaseException, *, final: bool = False) -> bool:
        """Mark the chunk as failed: queued again while it has retries, unless `final`."""
        if not self.holds(lease):
            self.drop(lease)
            return False
        self._fail(lease.job, lease.queue, lease.execution, error, final=final)
        self._forget(lease)
        return True

    def hand_back(
        self,
        lease: Lease,
        *,
        lost: bool = False,
        suspects: Suspects | None = None,
        front: bool = True,
    ) -> bool:
        """Put the chunk back into its queue; this costs it no retry.

        Args:
            lost: whether its rows were begun in vain: it counts as an attempt.
            suspects: who of its rows may kill workers; None: what is known stays.
            front: of the queue, else behind all others.
        """
        back = recovery.give_back(
            lease.queue, lease.job.id, lease.id, lost=lost, suspects=suspects, front=front
        )
        self.executions.pop(lease.id, None)
        self._forget(lease)
        return back

    def drop(self, lease: Lease) -> None:
        """Forget a lease that is somebody else's now."""
        with self.connection.pipeline() as pipeline:
            self.cleanup_execution(lease.job, pipeline=pipeline, execution=lease.execution)
            pipeline.execute()
        self._forget(lease)

    def beat(self) -> list[Lease]:
        """Renew every lease, bring back what dead workers left. Call it every `BEAT_S` or sooner.

        The leases of an engine that hangs are not renewed.

        Returns:
            The leases that were lost since the last call; they are dropped already.
        """
        now = time.monotonic()
        if now - self._last_beat < BEAT_S:
            return []
        if now - self._last_beat > LEASE_S:
            # After an outage every lease looks run out; the owners get time to renew theirs.
            self._no_reaping_until = now + LEASE_S
        self._last_beat = now
        alive = self._engine_lives()
        lost = [lease for lease in self.leases.values() if not self._renew(lease, alive)]
        for lease in lost:
            self.drop(lease)
        self._announce()
        if now >= self._no_reaping_until:
            self.clean_registries()
        return lost

    def stopped(self) -> list[Lease]:
        """The leases whose chunk somebody asked to stop since the last call."""
        asked: list[Lease] = []
        while not self._commands.empty():
            command = self._commands.get()
            names = (command.get("job_id"), command.get("execution_id"))
            asked += [
                lease
                for lease in self.leases.values()
                if (names[1] or lease.id) == lease.id and names[0] == lease.job.id
            ]
        return asked

    def stop_chunk(self, lease: Lease) -> None:
        """Mark a chunk as stopped on request; it is not queued again."""
        self._stopped_job_id = lease.job.id
        self.fail(lease, BadChunk("stopped on request"))
        self._stopped_job_id = None

    def handle_payload(self, message: dict[Any, Any]) -> None:
        """Take a command from rq's channel; called in rq's own thread, so only put aside."""
        try:
            command = parse_payload(message)
        except (ValueError, TypeError, RecursionError):
            command = None
        if not isinstance(command, dict):
            logger.error("a command that is none was ignored")
            return
        if command.get("command") == "shutdown":
            self.shutdown_asked = True
        elif command.get("command") in ("stop-job", "stop-execution"):
            self._commands.put(command)

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """Write no traceback per chunk: the caller of `fail` has said what is wrong."""

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Seconds until a lease runs out."""
        return LEASE_S

    def clean_registries(self) -> None:
        """Bring back what dead workers left, let rq forget what is old. One worker at a time."""
        for found in self.queues:
            assert isinstance(found, ChunkQueue)
            try:
                if found.acquire_maintenance_lock():
                    self._clean(found)
            except (redis.ConnectionError, redis.TimeoutError):
                raise
            except Exception as error:  # noqa: BLE001  whatever strange entries make rq raise
                name, kind = found.name, type(error).__name__
                logger.error("queue %s could not be cleaned: %s: %s", name, kind, error)

    def _clean(self, found: ChunkQueue) -> None:
        try:
            if back := recovery.recover(found):
                logger.info("%d chunks of workers that are gone are back in the queue", back)
            for registry in (FinishedJobRegistry, FailedJobRegistry):
                registry(queue=found, job_class=ChunkJob).cleanup()
            worker_registration.clean_worker_registry(found)
        finally:
            found.release_maintenance_lock()  # type: ignore[no-untyped-call]

    def _engine_lives(self) -> bool:
        """Whether the engine gave a sign of life in time; says so when that changes."""
        hung = not self._flight.pulse.beats(LEASE_S)
        if hung and not self._hung and self.leases:
            logger.warning(
                "the engine gives no sign of life; its %d chunks go to others in %d s",
                len(self.leases), LEASE_S,
            )  # fmt: skip
        self._hung = hung
        return not hung

    def _renew(self, lease: Lease, alive: bool) -> bool:
        if not self.holds(lease):
            return False
        if alive:
            self.maintain_heartbeats(lease.job, lease.execution)
        return True

    def _announce(self) -> None:
        """Appear again if Redis, or another worker's clean-up, has forgotten this worker."""
        self.heartbeat(WORKER_TTL_S)
        with self.connection.pipeline() as pipeline:
            pipeline.hset(self.key, mapping={**self.serialize(), "state": self.get_state()})
            worker_registration.register(self, pipeline)
            pipeline.execute()

    def _fail(
        self,
        job: Job,
        queue: ChunkQueue,
        execution: Execution,
        error: BaseException,
        *,
        final: bool,
    ) -> None:
        if final:
            job.retries_left = 0
        self._finalize_failure(job, queue, execution, (type(error), error, error.__traceback__))

    def _note(self) -> None:
        leases = {one.id: (one.job.id, one.queue.name) for one in self.leases.values()}
        self._flight.note_holdings(self.name, self.queue_names(), leases)

    def _forget(self, lease: Lease) -> None:
        self.leases.pop(lease.id, None)
        self._note()
        if not self.leases:
            self.set_state(WorkerStatus.IDLE)

    @staticmethod
    def _status(job: Job) -> JobStatus | None:
        try:
            return job.get_status(refresh=True)
        except InvalidJobOperation:  # deleted between the pop and now
            return None
