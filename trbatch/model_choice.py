"""Which model a worker's engine holds, and which chunk comes next for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from trbatch.chunk_job import ChunkQueue
from trbatch.chunk_lease import BadChunk, Lease
from trbatch.chunk_work import Folders
from trbatch.errors import ModelError, TrbatchError, WorkerError
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue
from trbatch.queue_names import ModelKey

logger = logging.getLogger("trbatch.worker")

IDLE_S = 0.2  # between looks at an empty queue
TAKE_S = 0.5  # of taking chunks at a time: beats, finished rows and the engine wait meanwhile


def watched(jobs: JobQueue, fixed: ModelKey | None) -> list[ChunkQueue]:
    """The queues of a worker: of its one model, or of every model that ever had any."""
    models = [fixed] if fixed is not None else dict.fromkeys(jobs.models().values())
    return [jobs.queue(name) for model in models for name in model.queue_names]


class ModelChoice:
    """The model of one worker: fixed, or that of the chunks that have waited longest.

    Args:
        fixed: the only model that it may hold; None: whatever the queue asks for.
        load: has the engine's thread load a model.
        folders: whom Redis may have read, and what its jobs have.

    Attributes:
        model: that the engine holds; None before the first and while another is loaded.
        loading: that is on its way.
        capacity: sequences that the engine decodes together.
        refused: chunks that failed because their model cannot be loaded.
    """

    def __init__(
        self,
        fixed: ModelKey | None,
        jobs: JobQueue,
        leases: LeaseWorker,
        load: Callable[[ModelKey], None],
        folders: Folders,
    ) -> None:
        self.model: ModelKey | None = None
        self.loading: ModelKey | None = None
        self.capacity = 0
        self.refused = 0
        self._fixed, self._jobs, self._leases = fixed, jobs, leases
        self._load_engine, self._folders = load, folders
        self._looked_at = 0.0

    def waits(self) -> bool:
        """Whether chunks wait that this worker could take."""
        if self._fixed is not None:
            return self._jobs.waiting(self._fixed) > 0
        return self._jobs.longest_waiting() is not None

    def choose(self) -> None:
        """See to it that the engine holds the model that the next chunk needs.

        Only for a worker that holds no chunks. Raises like `refuse`.
        """
        if self.loading:
            return
        if self._fixed is not None:
            wanted: ModelKey | None = self._fixed
        elif not (self.model and self._jobs.waiting(self.model)) and not self._look_again():
            return
        else:
            if len(self._leases.queues) != len(queues := watched(self._jobs, None)):
                self._leases.watch(queues)
            wanted = self._jobs.longest_waiting(self.model)
        if wanted is not None and wanted != self.model:
            self._load(wanted)

    def _load(self, model: ModelKey) -> None:
        if self._fixed is None:  # then its name is Redis's
            try:
                self._folders.confinement.check_model(model.name)
            except BadChunk as error:
                self.refuse(model, ModelError(error.message))
                return
        logger.info("loading %s", model)
        self.model, self.loading = None, model
        self._leases.say("loading", str(model))
        self._load_engine(model)

    def loaded(self, model: ModelKey, capacity: int) -> None:
        """An engine of this model stands."""
        self.model, self.loading, self.capacity = model, None, capacity
        self._looked_at = 0.0
        self._leases.say("idle", str(model))

    def take(self, wanted: Callable[[], bool]) -> Iterator[Lease]:
        """Take chunks of the model that the engine holds, the most urgent first.

        It ends when there is no room, when none is left, or when another model's chunks are more
        urgent; the queue is then left alone for a moment. It ends after `TAKE_S` as well: chunks
        that owe no row fill no room, and there may be thousands of them.

        Args:
            wanted: whether there is room for another.
        """
        if self.model is None or not wanted():
            return
        if self._looked_at and not self._look_again():
            return
        if self._fixed is None and self._jobs.longest_waiting(self.model) != self.model:
            self._looked_at = time.monotonic()
            return
        queues = self._queues(self.model)
        until = time.monotonic() + TAKE_S
        while wanted() and time.monotonic() < until:
            lease = self._leases.take_first(queues)
            if lease is None:
                self._looked_at = time.monotonic()
                return
            yield lease
        self._looked_at = 0.0

    def _look_again(self) -> bool:
        """Whether an empty queue is due for another look."""
        now = time.monotonic()
        if now - self._looked_at < IDLE_S:
            return False
        self._looked_at = now
        return True

    def _queues(self, model: ModelKey) -> list[ChunkQueue]:
        return [self._jobs.queue(name) for name in model.queue_names]

    def refuse(self, model: ModelKey, error: Exception) -> None:
        """A model cannot be loaded: a job's own fails that model's chunks, all else ends us.

        Raises:
            ModelError: it is the fixed one.
            WorkerError: it is the fault of this machine or of its options.
        """
        self.loading = None
        if not isinstance(error, TrbatchError):
            ours = isinstance(error, OSError | MemoryError | ImportError)
            kind = WorkerError if ours else ModelError
            error = kind(f"loading {model} failed: {type(error).__name__}: {error}")
        its_fault = isinstance(error, ModelError) and not isinstance(error, WorkerError)
        if self._fixed is not None or not its_fault:
            raise error
        logger.error("%s cannot be loaded, its chunks fail: %s", model, error)
        while lease := self._leases.take_first(self._queues(model)):
            if self._folders.has_results(lease):
                self._leases.hand_back(lease)
                raise WorkerError(f"{model} could be loaded before, and now not: {error}")
            self._leases.fail(lease, error, final=True)
            self.refused += 1
