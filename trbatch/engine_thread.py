"""One thread that does nothing but decode, so that the worker's own thread can talk to the queue.

Orders go in, events come out, both through queues. The engine is touched by this thread alone.
Knows nothing of chunks, leases and files.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol

from trbatch.config import WorkerConfig
from trbatch.engine.sequence import Completion, Request, TaskKey
from trbatch.engine_events import Broken, Changes, Event, Finished, LoadFailed, Ready, Whole
from trbatch.errors import TrbatchError
from trbatch.flight import FlightRecord, Running
from trbatch.queue_names import ModelKey
from trbatch.stopping import ENGINE_THREAD
from trbatch.trace import Steps

logger = logging.getLogger("trbatch.worker")

SAVE_S = 60.0  # between savings of the matrices
STATS_S = 1.0  # between looks at the engine's figures
ADD_S = 0.002  # between two steps, for requests that the engine does not need yet
MOST_TOGETHER = 16  # requests handed to the engine at once; if it dies over one, all are suspects
MOST_LENGTH = 1 << 14  # of their prompts


class Copies(Protocol):
    """The engine's copies of shared matrices. See `trbatch.engine.replica.Copies`."""

    def position(self, key: TaskKey, /) -> str: ...

    def take(self, key: TaskKey, /) -> bytes: ...

    def put_back(self, key: TaskKey, data: bytes, /) -> None: ...

    def whole(self, key: TaskKey, /) -> bytes: ...

    def began_cold(self, key: TaskKey, /) -> bool: ...

    def outdate(self, key: TaskKey, /) -> None: ...

    def merge(
        self, key: TaskKey, whole: bytes | None, deltas: Iterable[bytes], position: str, /
    ) -> None: ...


class Engine(Protocol):
    """What the worker needs of an engine. See `trbatch.engine.engine.Engine`.

    Requests are begun in the order in which they were added: that tells which of them it may be
    touching at any time, and so whom to suspect if it takes the process down.
    """

    @property
    def capacity(self) -> int:
        """Sequences decoded together."""
        ...

    @property
    def unfinished(self) -> int:
        """Requests added and not yet returned."""
        ...

    @property
    def copies(self) -> Copies | None:
        """The matrices as others may share them; None if there are none."""
        ...

    def open_task(self, key: TaskKey, /) -> object:
        """Load the task's matrix unless that was done, or until there is room for it."""
        ...

    def add_all(self, requests: Sequence[Request], /) -> None:
        """Take requests in; none of them, if it raises."""
        ...

    def step(self) -> list[Completion]:
        """One forward, and what it finished."""
        ...

    def abort(self, keys: Iterable[Hashable]) -> None:
        """Drop requests; they are never returned."""
        ...

    def save_tasks(self) -> None:
        """Write the matrices that changed."""
        ...

    @property
    def steps(self) -> Steps:
        """How many steps it has made, by their kind."""
        ...

    def stats(self) -> dict[str, Any]:
        """Figures since the start; what is a text is a fact for the dataset's metadata."""
        ...


Loader = Callable[[ModelKey], Engine]


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


class EngineThread:
    """The thread, its orders and its events.

    Args:
        load: makes an engine; called in the thread, may take minutes.
        save_s: seconds between savings of the matrices while there is work.
        flight: where the engine's pulse and the rows in its hands are noted.
    """

    def __init__(
        self, load: Loader, *, save_s: float = SAVE_S, flight: FlightRecord | None = None
    ) -> None:
        # No SimpleQueue: its `get` waits for ever when a signal's handler outlasts the time limit.
        self.events: queue.Queue[Event] = queue.Queue()
        self.stats: dict[str, Any] = {}  # the engine's figures, a second old at most
        self._load_engine = load
        self._save_s = save_s
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._flight = flight or FlightRecord.create()
        self._incoming: deque[Request] = deque()  # not added yet
        self._held: dict[Hashable, Running] = {}  # added and not answered, in this order
        self._noted = True  # whether the record says of these what it should
        self._told: Steps = {}  # that the engine has made
        self._together = 1  # requests, as many as the engine takes in within `ADD_S`
        self._stopping = False
        self._saved_at = time.monotonic()
        self._looked_at = 0.0
        self._thread = threading.Thread(target=self._run, name=ENGINE_THREAD, daemon=True)

    def start(self) -> None:
        """Start the thread; it waits for its first order."""
        self._thread.start()

    def load(self, model: ModelKey) -> None:
        """Put this model's engine in the place of the one before. Answered by an event."""
        self._orders.put(partial(self._load, model))

    def add(self, requests: Sequence[Request]) -> None:
        """Decode these requests."""
        self._orders.put(partial(self._add, requests))

    def abort(self, keys: Iterable[Hashable]) -> None:
        """Drop requests. Some may still be answered by an event that is on its way."""
        self._orders.put(partial(self._abort, list(keys)))

    def save(self) -> None:
        """Write the matrices that changed."""
        self._orders.put(self._save)

    def send_changes(self, task: TaskKey) -> None:
        """Answer with `Changes`."""
        self._orders.put(partial(self._send_changes, task))

    def send_whole(self, task: TaskKey, *, with_changes: bool = False) -> None:
        """Answer with `Whole`.

        Args:
            with_changes: what was not sent yet counts as sent, and comes along.
        """
        self._orders.put(partial(self._send_whole, task, with_changes=with_changes))

    def outdate(self, task: TaskKey) -> None:
        """What is known of this task was replaced: its file is the truth when it is next used."""
        self._orders.put(partial(self._with_copies, lambda copies: copies.outdate(task)))

    def put_back(self, task: TaskKey, data: bytes) -> None:
        """These changes could not be sent on: they will be part of the next ones."""
        self._orders.put(partial(self._with_copies, lambda copies: copies.put_back(task, data)))

    def merge(
        self, task: TaskKey, whole: bytes | None, deltas: Sequence[bytes], position: str
    ) -> None:
        """Apply what other workers have sent."""
        self._orders.put(
            partial(self._with_copies, lambda copies: copies.merge(task, whole, deltas, position))
        )

    @property
    def alive(self) -> bool:
        """Whether it still carries out orders."""
        return self._thread.is_alive()

    def stop(self, timeout: float) -> bool:
        """Save the matrices and end; unfinished requests are forgotten.

        Returns:
            Whether the thread ended within `timeout` seconds.
        """
        self._orders.put(self._stop)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def next_events(self, timeout: float) -> list[Event]:
        """Everything that has happened; waits up to `timeout` seconds for the first."""
        events: list[Event] = []
        try:
            events.append(self.events.get(timeout=timeout))
            while True:
                events.append(self.events.get_nowait())
        except queue.Empty:
            return events

    def _run(self) -> None:
        self._flight.pulse.adopt()
        try:
            while not self._stopping:
                self._obey()
                self._step()
            self._save()
        except BaseException as error:  # noqa: BLE001  the worker's thread must hear of it
            self.events.put(Broken(error))

    def _obey(self) -> None:
        """Carry out every order; without work, wait for one."""
        if not self._busy():
            self._note_running()
            self._flight.pulse.idle()
            order = self._orders.get()
            self._flight.pulse.awake()
            order()
        while not self._stopping and not self._orders.empty():
            self._orders.get()()
        self._add_some()

    def _step(self) -> None:
        if self._stopping or self._engine is None or not self._busy():
            return
        self._note_running()
        with self._flight.pulse.step():
            completions = self._engine.step()
        if completions:
            self._flight.pulse.finished(len(completions))
            self._let_go(completion.key for completion in completions)
            self.events.put(Finished(completions, self._new_steps()))
        if not self._busy() or time.monotonic() - self._looked_at > STATS_S:
            self.stats, self._looked_at = self._engine.stats(), time.monotonic()
        if time.monotonic() - self._saved_at > self._save_s:
            self._save()

    def _new_steps(self) -> Steps:
        """The engine's steps by their kind since the last call."""
        assert self._engine is not None, "only an engine finishes requests"
        told, self._told = self._told, dict(self._engine.steps)
        return {kind: new for kind, made in self._told.items() if (new := made - told.get(kind, 0))}

    def _busy(self) -> bool:
        return self._engine is not None and bool(self._incoming or self._engine.unfinished)

    def _load(self, model: ModelKey) -> None:
        self._save()
        self._engine = None
        self._incoming.clear()
        self._held.clear()
        self._noted = False
        self._told = {}
        self._together = 1
        gc.collect()  # the old weights must be gone before the new ones come
        begin = time.monotonic()
        try:
            with self._flight.pulse.declared():
                self._engine = self._load_engine(model)
        except Exception as error:  # noqa: BLE001  it is the worker's to judge
            self.events.put(LoadFailed(model, error))
            return
        self._flight.pulse.ready()
        self._saved_at = time.monotonic()
        facts = {name: v for name, v in self._engine.stats().items() if isinstance(v, str)}
        self.events.put(Ready(model, self._engine.capacity, self._saved_at - begin, facts))

    def _add(self, requests: Sequence[Request]) -> None:
        assert self._engine is not None, "requests are only added after a Ready"
        for task in {request.task for request in requests}:
            self._engine.open_task(task)
        self._incoming.extend(requests)

    def _add_some(self) -> None:
        """Hand requests to the engine: those that it needs, and of the others a few at a time.

        Encoding hundreds of prompts at once would leave the device without work.
        """
        engine, end = self._engine, time.monotonic() + ADD_S
        if engine is None or not self._incoming or self._stopping:
            return
        while self._incoming and (
            engine.unfinished < 2 * engine.capacity or time.monotonic() < end
        ):
            begin, requests = time.monotonic(), self._next_few()
            self._add_to(engine, requests)
            if (passed := time.monotonic() - begin) > ADD_S:
                self._together = max(1, len(requests) // 2)
            elif passed < ADD_S / 2:
                self._together = max(self._together, min(2 * len(requests), MOST_TOGETHER))

    def _next_few(self) -> list[Request]:
        """As many of those that wait as the engine should take in at once."""
        requests = [self._incoming.popleft()]
        length = requests[0].length
        while self._incoming and len(requests) < self._together:
            length += self._incoming[0].length
            if length > MOST_LENGTH:
                break
            requests.append(self._incoming.popleft())
        return requests

    def _add_to(self, engine: Engine, requests: Sequence[Request]) -> None:
        running = {request.key: _running(request) for request in requests}
        self._flight.note_running(list(running.values()))  # a tokenizer may fail as an engine does
        self._noted = False
        self._flight.pulse.awake()
        try:
            engine.add_all(requests)
        except BaseException as error:
            if len(requests) == 1:
                raise
            logger.warning("taking in %d rows one by one: %s", len(requests), type(error).__name__)
            # One after the other: it is raised again, and then it is known whose fault it is. What
            # a tokenizer raises when its library fails is no `Exception`.
            for request in requests:
                self._add_to(engine, [request])
            return
        self._held |= running

    def _abort(self, keys: list[Hashable]) -> None:
        if self._engine is not None:
            unwanted = set(keys)
            self._incoming = deque(r for r in self._incoming if r.key not in unwanted)
            self._engine.abort(keys)
            self._let_go(keys)

    def _let_go(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self._held.pop(key, None)
        self._noted = False

    def _note_running(self) -> None:
        """Note the rows that the next step may touch: the first so many of those added."""
        if self._noted or self._engine is None:
            return
        self._flight.note_running(list(islice(self._held.values(), self._engine.capacity)))
        self._noted = True

    def _with_copies(self, do: Callable[[Copies], None]) -> None:
        if self._engine is not None and self._engine.copies is not None:
            do(self._engine.copies)

    def _send_changes(self, task: TaskKey) -> None:
        def send(copies: Copies) -> None:
            self.events.put(Changes(task, copies.take(task), copies.position(task)))

        self._with_copies(send)

    def _send_whole(self, task: TaskKey, *, with_changes: bool) -> None:
        def send(copies: Copies) -> None:
            changes = copies.take(task) if with_changes else b""
            whole, position = copies.whole(task), copies.position(task)
            self.events.put(Whole(task, whole, position, changes, copies.began_cold(task)))

        self._with_copies(send)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self._engine is None:
            return
        self._note_running()  # a store may take long, and who has ended is not to blame
        try:
            with self._flight.pulse.declared():
                self._engine.save_tasks()
        except (OSError, TrbatchError) as error:  # a cold start next time, no reason to stop now
            logger.warning("the matrices could not be saved: %s", error)

    def _stop(self) -> None:
        self._stopping = True


def _running(request: Request) -> Running:
    """A request as the flight record has it. Its key is a tuple whose first part is the lease."""
    assert isinstance(request.key, tuple)
    return str(request.key[0]), request.order, request.sample_index
