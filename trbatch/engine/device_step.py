"""One decode step that never leaves the device: draft → forward → verify → commit → learn.

All that moves from step to step lies in `Slots`, so a step is started before the host has seen what
the one before gave (`lagged`). A step has a fixed shape: so many rows, padded up to a bucket, and
so many tokens a row; on a GPU each shape is captured once as a CUDA graph and replayed. What a step
is made of comes from an `Operations`: kernels, or their slow twins.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trbatch.engine.best_first import MAX_DEPTH
from trbatch.engine.calibration import PLACES, Calibration
from trbatch.engine.device_state import REPORT_NUMBERS, Accepted, Slots
from trbatch.engine.lagged import Outcome
from trbatch.engine.matrix import Matrix
from trbatch.engine.model import CausalModel
from trbatch.engine.sequence import Sequence

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512)  # rows of a step
MOST_STOPS = 8  # ids that end a text, on the device
_SAMPLES = 1024  # of a row, at most
_EQUALS = 16  # sequences of the same row and sample that may run together
_ABSORB_EVERY = 4  # steps between two looks at what was counted of candidates
_RING = 4  # steps whose copies may be under way


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step is told: [B] each, one tensor [2, B] underneath for one copy."""

    rows: Tensor  # int64 slots, -1 for padding
    reads: Tensor  # int64 whose task's rows draft


class Operations(Protocol):
    """The parts of a step that have a quick form and a slow one."""

    def step(self, owner: DeviceStep, batch: Batch, size: int) -> Accepted:
        """All of one step on the device's state."""
        ...

    def captures(self) -> bool:
        """Whether a step can be captured as a graph."""
        ...


@dataclass(slots=True)
class _Shape:
    """A step of one shape: its inputs, what it gives, and its graph if it was captured."""

    batch: Batch
    graph: Any = None
    accepted: Accepted | None = None


@dataclass(frozen=True, slots=True)
class _Handle:
    report: Tensor  # [B, 3 + D + 1] on its way to the host's memory
    event: Any
    members: int
    size: int


class DeviceStep:
    """The stepper of one engine.

    Args:
        most: tokens a row, at most.
        longest: tokens of the longest sequence with its tree.
    """

    def __init__(
        self,
        model: CausalModel,
        matrix: Matrix,
        calibration: Calibration,
        operations: Operations,
        *,
        capacity: int,
        most: int,
        longest: int,
    ) -> None:
        assert model.cache is not None, "allocate the cache first"
        self.model, self.matrix, self.calibration = model, matrix, calibration
        self.cache = model.cache
        self.device = model.loaded.device
        pages = self.cache.pages_for(longest)
        self.slots = Slots.empty(capacity, stops=MOST_STOPS, pages=pages, device=self.device)
        # What padding rows write goes where nothing is ever read.
        self.nowhere = self.cache.pool.take(-(-most // self.cache.page_size))
        self.fresh = torch.zeros(
            matrix.shared.shape[0], 2, PLACES, dtype=torch.int32, device=self.device
        )
        self._operations = operations
        self._capacity, self._steps = capacity, 0
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._pool: Any = None  # memory that all graphs share
        self._turns: dict[int, int] = {}  # slot -> turn
        self._inputs: list[Tensor] = []
        self._reads: set[int] = set()  # tasks of which something may have been counted

    def can_take(self, sequence: Sequence) -> bool:
        """Whether all that decides its next token is known on the device."""
        request = sequence.request
        plain = request.sampling.greedy and not request.logits_processors
        return plain and len(sequence.stop.stop_ids) <= MOST_STOPS

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence whose prompt is in the cache and whose first token is known."""
        self.slots.put(
            sequence.slot,
            sequence.tokens,
            left=sequence.max_tokens - sequence.generated,
            stops=sorted(sequence.stop.stop_ids),
            pages=sequence.room.pages,
            task=sequence.task,
            turn=self._turn_of(sequence),
        )

    def launch(self, members: ListLike[Sequence], size: int) -> _Handle:
        """Start a step of `size` tokens a sequence."""
        bucket = bucket_of(len(members), self._capacity)
        shape = self._shape(bucket, size)
        padding = [-1] * (bucket - len(members))
        self._fill(shape.batch, [s.slot for s in members] + padding,
                   [s.reads for s in members] + [0] * len(padding))  # fmt: skip
        accepted = self._run(shape, size)
        if size > 1:
            self._count({s.reads for s in members})
        report = torch.empty(accepted.report.shape, dtype=torch.int32, pin_memory=self._on_gpu)
        report.copy_(accepted.report, non_blocking=True)
        event = torch.cuda.Event() if self._on_gpu else None
        if event is not None:
            event.record()
        return _Handle(report, event, len(members), size)

    def read(self, handle: _Handle) -> list[Outcome]:
        """Wait for a step and get what it gave each of its members."""
        if handle.event is not None:
            handle.event.synchronize()
        rows = handle.report[: handle.members].tolist()
        return [
            Outcome(row[REPORT_NUMBERS : REPORT_NUMBERS + row[0]], handle.size - 1, row[2])
            for row in rows
        ]

    def seconds(self, batch: int, size: int, _: int = 0) -> float:
        """How long a step of this shape takes, without anybody in it: padding costs the same."""
        bucket = bucket_of(batch, self._capacity)
        shape = self._shape(bucket, size)
        self._fill(shape.batch, [-1] * bucket, [0] * bucket)
        self._wait()
        start = time.perf_counter()
        self._run(shape, size)
        self._wait()
        return time.perf_counter() - start

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _turn_of(self, sequence: Sequence) -> int:
        """Who it is among others: by row of the input and sample, and no two of them equal."""
        order, sample = sequence.turn
        self._turns.pop(sequence.slot, None)
        begin = (order * _SAMPLES + sample % _SAMPLES) * _EQUALS
        taken = set(self._turns.values())
        turn = next((t for t in range(begin, begin + _EQUALS) if t not in taken), None)
        assert turn is not None, "too many sequences of one row run together"
        self._turns[sequence.slot] = turn
        return turn

    def _shape(self, bucket: int, size: int) -> _Shape:
        key = bucket, size
        if key not in self._shapes:
            both = torch.zeros(2, bucket, dtype=torch.int64, device=self.device)
            both[0] = -1
            shape = _Shape(Batch(both[0], both[1]))
            if self._operations.captures():
                self._capture(shape, size)
            self._shapes[key] = shape
        return self._shapes[key]

    @torch.inference_mode()
    def _capture(self, shape: _Shape, size: int) -> None:
        """Record a step of padding rows alone: it changes nothing, and compiles what is new."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._operations.step(self, shape.batch, size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            shape.accepted = self._operations.step(self, shape.batch, size)
        shape.graph = graph

    @torch.inference_mode()
    def _run(self, shape: _Shape, size: int) -> Accepted:
        if shape.graph is None:
            return self._operations.step(self, shape.batch, size)
        shape.graph.replay()
        assert shape.accepted is not None
        return shape.accepted

    def _fill(self, batch: Batch, rows: list[int], reads: list[int]) -> None:
        """Bring a step's inputs to the device, from memory that no copy under way still reads."""
        numbers = torch.tensor([rows, reads], pin_memory=self._on_gpu)
        self._inputs = [*self._inputs[1 - _RING :], numbers]
        for target, source in ((batch.rows, numbers[0]), (batch.reads, numbers[1])):
            target.copy_(source, non_blocking=True)

    def _count(self, tasks: set[int]) -> None:
        self._steps += 1
        self._reads |= tasks
        if self._steps % _ABSORB_EVERY == 0:
            self.calibration.absorb(self.fresh, self._reads, steps=_ABSORB_EVERY)
            self._reads = set()

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


def bucket_of(rows: int, capacity: int) -> int:
    """Rows that a step of `rows` sequences is padded to."""
    at = bisect_left(BUCKETS, rows)
    return min(BUCKETS[at] if at < len(BUCKETS) else rows, max(capacity, rows))


DEEPEST = MAX_DEPTH  # drafted tokens that a step can accept
