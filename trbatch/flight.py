"""The flight record: what a worker holds and how its engine fares, legible after its death.

A supervisor makes the record, a block of memory without a name in any filesystem, and its worker
writes to it: the pulse of the engine, the leases that it holds, the rows that the engine decodes.
When the worker is gone, however suddenly, the supervisor reads what it was doing. A full disk
cannot get in the way, and nothing is left behind.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

import orjson

from trbatch.errors import WorkerError

DECLARED_S = 600.0  # what a declared phase, e.g. loading, may take without a sign of life
SLOW_STEPS = 10.0  # a step may take so many times the slowest one so far

_FLIGHT = "TRBATCH_FLIGHT"  # in a worker's environment: its supervisor's pid and the record's fd
_PAGE = mmap.PAGESIZE
_SLOT = 1 << 20  # bytes a note, at most
_SIZE = _PAGE + 4 * _SLOT  # of which only what is written takes memory
_HEADER = struct.Struct("<QII")  # number, bytes, checksum
_DOUBLE = struct.Struct("<d")
_HOLDINGS, _RUNNING = range(2)
_IDLE, _STEPPING, _DECLARED = 0.0, 1.0, 2.0

Row = tuple[int, int]  # a sample of a row within its job: the row's place in the input, the sample
Running = tuple[str, int, int]  # the same, behind the lease that it belongs to


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the queue knows of a worker, or of one that died."""

    worker: str = ""  # its name; "": there is none, or it has left
    queues: tuple[str, ...] = ()  # that it takes from
    leases: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # entry, queue


class Pulse:
    """The engine's signs of life. Times are of the monotonic clock, which all processes share."""

    # Each a double of its own, written at once.
    _PHASE, _SINCE, _SLOWEST, _READY, _FINISHED, _ACCUSED = range(6)

    def __init__(self, memory: mmap.mmap, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._clock = clock
        self._excused_s = 0.0  # of the step that runs: what declared phases inside it took

    def idle(self) -> None:
        """The engine has nothing to do."""
        self._mark(_IDLE)

    def awake(self) -> None:
        """It has something to do again, be it to read a prompt: from now on it may hang."""
        self._mark(_STEPPING)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of the engine; one that never ends is a hung engine."""
        self._mark(_STEPPING)
        self._excused_s = 0.0
        begin = self._clock()
        yield
        if (seconds := self._clock() - begin - self._excused_s) > self._get(self._SLOWEST):
            self._set(self._SLOWEST, seconds)
        self._mark(_STEPPING)

    @contextmanager
    def declared(self) -> Iterator[None]:
        """Something that may take minutes: loading, compiling, capturing, saving."""
        before, begin = self._get(self._PHASE), self._clock()
        self._mark(_DECLARED)
        try:
            yield
        finally:
            self._excused_s += self._clock() - begin
            self._mark(before)

    def adopt(self) -> None:
        """This thread is the engine's: what it declares from now on is told here."""
        _PULSE.set(self)

    def ready(self) -> None:
        """An engine stands."""
        self._set(self._READY, 1.0)

    def finished(self, rows: int) -> None:
        """So many rows came to their end."""
        self._set(self._FINISHED, self._get(self._FINISHED) + rows)

    def accuse(self, rows: int) -> None:
        """The worker itself has put back what it held, with so many suspects."""
        self._set(self._ACCUSED, rows)

    @property
    def accused(self) -> int:
        """Of how many rows the worker itself has said that they are suspects."""
        return int(self._get(self._ACCUSED))

    @property
    def fruitful(self) -> bool:
        """Whether any row came to its end."""
        return self._get(self._FINISHED) > 0.0

    @property
    def was_ready(self) -> bool:
        """Whether an engine ever stood."""
        return self._get(self._READY) > 0.0

    @property
    def stepping(self) -> bool:
        """Whether the engine is in the middle of rows, and in no declared phase."""
        return self._get(self._PHASE) == _STEPPING

    @property
    def since(self) -> float:
        """When the last sign of life came."""
        return self._get(self._SINCE)

    def allowed(self, floor: float) -> float:
        """Seconds that may go by now until the next sign of life; for a step at least `floor`."""
        if self.stepping:
            return max(floor, SLOW_STEPS * self._get(self._SLOWEST))
        return DECLARED_S

    def beats(self, floor: float) -> bool:
        """Whether the engine lives, as far as can be told: a step may take `floor` seconds."""
        idle = self._get(self._PHASE) == _IDLE
        return idle or self._clock() - self.since <= self.allowed(floor)

    def _mark(self, phase: float) -> None:
        self._set(self._SINCE, self._clock())
        self._set(self._PHASE, phase)

    def _get(self, place: int) -> float:
        value: float = _DOUBLE.unpack_from(self._memory, place * _DOUBLE.size)[0]
        return value

    def _set(self, place: int, value: float) -> None:
        _DOUBLE.pack_into(self._memory, place * _DOUBLE.size, value)


_PULSE: ContextVar[Pulse | None] = ContextVar("pulse", default=None)


@contextmanager
def declared() -> Iterator[None]:
    """Something in an engine that may take minutes, so that nobody thinks that it hangs."""
    pulse = _PULSE.get()
    with pulse.declared() if pulse is not None else nullcontext():
        yield


class FlightRecord:
    """The record of one worker process.

    Two notes beside the pulse, each written by one thread of the worker. A note lies in one of two
    slots in turn, with a checksum: a death in the middle of writing leaves the one before.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self._memory = mmap.mmap(fd, _SIZE)  # to write to it needs no disk and knows no quota
        self.pulse = Pulse(self._memory)
        self._numbers = [0, 0]

    @classmethod
    def create(cls) -> Self:
        """An empty record."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("trbatch-flight")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    @classmethod
    def inherited(cls) -> Self | None:
        """The record that this process' supervisor gave it; None for a process without one.

        Raises:
            WorkerError: the supervisor is gone already.
        """
        text = os.environ.pop(_FLIGHT, "")  # no business of our own children
        if not text:
            return None
        pid, _, fd = text.partition(":")
        if int(pid) != os.getppid():
            raise WorkerError(f"the supervisor of this worker, process {pid}, is gone")
        return cls(int(fd))

    def environment(self) -> dict[str, str]:
        """What a child's environment needs, beside the open `fd`, to inherit this record."""
        return {_FLIGHT: f"{os.getpid()}:{self.fd}"}

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        self._close()

    def note_holdings(
        self, worker: str, queues: Sequence[str], leases: Mapping[str, Sequence[str]]
    ) -> None:
        """Note what the queue knows of the worker.

        Args:
            worker: its name; "": it has left.
            queues: the names of those it takes from.
            leases: that it holds: by execution, entry and queue.

        Of thousands, only as many as there is room for: the others run out by themselves.
        """
        held = [(name, list(lease)) for name, lease in leases.items()]

        def note(most: int) -> list[Any]:
            return [worker, queues[:most], dict(held[:most])]

        self._write(_HOLDINGS, note, max(len(held), len(queues)))

    def note_running(self, rows: Sequence[Running]) -> None:
        """Note what the engine may touch from now on."""
        self._write(_RUNNING, lambda most: rows[:most], len(rows))

    def holdings(self) -> Holdings:
        """What the queue knows of the worker."""
        worker, queues, leases = self._read(_HOLDINGS) or ["", [], {}]
        pairs = {execution: (entry, queue) for execution, (entry, queue) in leases.items()}
        return Holdings(worker, tuple(queues), pairs)

    def running(self) -> dict[str, list[Row]]:
        """Of each lease the rows that the engine may have touched last."""
        found: dict[str, list[Row]] = {}
        for lease, order, sample in self._read(_RUNNING) or []:
            found.setdefault(lease, []).append((order, sample))
        return found

    def _write(self, kind: int, first: Callable[[int], Any], count: int) -> None:
        """Write a note of the first so many things, of fewer if there is no room for them."""
        data = orjson.dumps(first(count))
        while len(data) + _HEADER.size > _SLOT:
            count //= 2
            data = orjson.dumps(first(count))
        number = self._numbers[kind] = self._numbers[kind] + 1
        note = _HEADER.pack(number, len(data), zlib.crc32(data)) + data
        place = _place(kind, number)
        self._memory[place : place + len(note)] = note

    def _read(self, kind: int) -> Any:
        latest, value = 0, None
        for slot in range(2):
            place = _place(kind, slot)
            number, size, checksum = _HEADER.unpack_from(self._memory, place)
            place += _HEADER.size
            data = self._memory[place : place + min(size, _SLOT)]
            if number > latest and zlib.crc32(data) == checksum:
                latest, value = number, orjson.loads(data)
        return value


def _place(kind: int, number: int) -> int:
    return _PAGE + (2 * kind + number % 2) * _SLOT
