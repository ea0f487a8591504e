"""One decode step that never leaves the device: draft → forward → verify → commit → learn.

All that moves from step to step lies in `Slots`, so a step is started before the host has seen what
the one before gave (`lagged`). A step has a fixed shape: so many rows, padded up to a bucket, and
so many tokens a row; on a GPU each shape is captured once as a CUDA graph and replayed. What a step
is made of comes from an `Operations`: kernels (`step_kernels`), or their slow twins (`step_plain`).
"""

from __future__ import annotations

import importlib.util
import logging
import time
from bisect import bisect_left
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine.calibration import PLACES, Calibration
from trbatch.engine.device_state import REPORT_NUMBERS, Accepted, Slots
from trbatch.engine.lagged import Outcome
from trbatch.engine.matrix import Matrix
from trbatch.engine.model import CausalModel, LoadedModel
from trbatch.engine.prefill import Lesson
from trbatch.engine.sequence import Sequence
from trbatch.engine.transfer import OnItsWay, to_device
from trbatch.engine.tree import Tree

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # rows
MOST_STOPS = 8  # ids that end a text, on the device
_SAMPLES = 1024  # of a row, at most
_EQUALS = 16  # sequences of the same row and sample that may run together
_ABSORB_EVERY = 4  # steps between two looks at what was counted of candidates
_WARM_UPS = 2  # runs before a capture: kernels are compiled and libraries make their plans


@dataclass(frozen=True, slots=True)
class State:
    """What steps work on."""

    model: CausalModel
    matrix: Matrix
    calibration: Calibration
    slots: Slots
    # [P] int32 pages where padding rows write and nothing is ever read.
    nowhere: Tensor
    # [tasks, 2, PLACES] int32 candidates that came true and that were seen, since the last look.
    fresh: Tensor
    spine: bool  # whether repeated passages are followed


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step is told: [B] int64 each."""

    rows: Tensor  # slots, -1 for padding
    reads: Tensor  # whose task's rows draft


class Operations(Protocol):
    """The parts of a step, quick or slow."""

    captures: bool  # whether steps can be captured as graphs

    def step(self, state: State, batch: Batch, size: int) -> Accepted:
        """One step of `size` tokens a row, the root included."""
        ...

    def first(self, state: State, rows: Tensor, logits: Tensor) -> Accepted:
        """The token after each prompt, from the logits [B, V] at its end."""
        ...

    def candidates(self, state: State, logits: Tensor) -> Tensor:
        """[N, k] the likeliest tokens of logits [N, V]."""
        ...

    def learn_prompt(self, state: State, lesson: Lesson) -> None:
        """Recycle part of a prompt."""
        ...


@dataclass(slots=True)
class _Shape:
    """A step of one shape: its inputs, and its graph with what that gives if it was captured."""

    inputs: Tensor  # [2, B]
    batch: Batch
    graph: Any = None
    accepted: Accepted | None = None


@dataclass(frozen=True, slots=True)
class _Handle:
    report: OnItsWay
    members: int
    drafted: int


class DeviceStep:
    """The stepper of one engine.

    Args:
        most: tokens a row, at most.
        longest: tokens of the longest sequence with its tree.
        capture: replay graphs, where the operations allow it.
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
        spine: bool = True,
        capture: bool = True,
    ) -> None:
        cache, device = model.cache, model.loaded.device
        assert cache is not None, "allocate the cache first"
        nowhere = cache.pool.take(cache.pages_for(most))
        self.state = State(
            model, matrix, calibration,
            Slots.empty(
                capacity, stops=MOST_STOPS, pages=cache.pages_for(longest), longest=longest,
                device=device,
            ),
            nowhere=torch.tensor(nowhere, dtype=torch.int32, device=device),
            fresh=torch.zeros(
                matrix.shared.shape[0], 2, PLACES, dtype=torch.int32, device=device
            ),
            spine=spine,
        )  # fmt: skip
        self.operations = operations
        self.device, self.most, self.capacity = device, most, capacity
        self._captures = capture and operations.captures
        self._steps = 0
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._pool: Any = None  # memory that all graphs share
        self._turns: dict[int, int] = {}  # slot -> turn
        self._reads: set[int] = set()  # tasks of which something may have been counted

    @property
    def kind(self) -> str:
        """What its steps are, among the ways in which steps can be made."""
        return f"{type(self.operations).__name__}{', captured' if self._captures else ''}"

    def admit(self, sequence: Sequence) -> bool:
        """Take a sequence that has a slot and pages.

        Returns:
            Whether all that decides its tokens is known on the device, so that steps can be
            started before its last token has been seen.
        """
        request, stops = sequence.request, sorted(sequence.stop.stop_ids)
        self.state.slots.put(
            sequence.slot, sequence.tokens, left=sequence.max_tokens - sequence.generated,
            stops=stops[:MOST_STOPS], pages=[page for _, page in sequence.room.news()],
            task=sequence.task, turn=self._turn_of(sequence),
        )  # fmt: skip
        greedy = request.sampling.greedy and not request.logits_processors
        return greedy and len(stops) <= MOST_STOPS

    def release(self, slot: int) -> None:
        """Nobody has this slot any more; all steps of who had it have been read."""
        self._turns.pop(slot, None)

    def set_pages(self, sequences: ListLike[Sequence]) -> None:
        """Steps that are started from now on find these sequences on the pages they have now."""
        table = self.state.slots.pages
        numbers = [
            (sequence.slot, place, page)
            for sequence in sequences
            for place, page in sequence.room.news()
        ]
        if numbers:
            slots, places, pages = to_device(numbers, self.device, torch.int64).unbind(1)
            table.index_put_((slots, places), pages.to(table.dtype))

    def launch(self, members: ListLike[Sequence], size: int) -> _Handle:
        """Start a step of `size` tokens a sequence."""
        bucket = bucket_of(len(members), self.capacity)
        shape = self._shape(bucket, size)
        padding = bucket - len(members)
        self._fill(
            shape, [s.slot for s in members] + [-1] * padding,
            [s.reads for s in members] + [0] * padding,
        )  # fmt: skip
        accepted = self._run(shape, size)
        if size > 1:
            self._count({sequence.reads for sequence in members})
        return _Handle(OnItsWay(accepted.report), len(members), size - 1)

    @torch.inference_mode()
    def first(self, members: ListLike[Sequence], logits: Tensor) -> _Handle:
        """Choose the token after each member's prompt.

        Args:
            logits: [B, V] at the prompts' ends.
        """
        rows = to_device([sequence.slot for sequence in members], self.device, torch.int64)
        if not members:
            return _Handle(OnItsWay(rows), 0, 0)
        accepted = self.operations.first(self.state, rows, logits)
        return _Handle(OnItsWay(accepted.report), len(members), 0)

    def read(self, handle: _Handle) -> list[Outcome]:
        """Wait for a step and get what it gave each of its members."""
        rows = handle.report.wait()[: handle.members]
        return [
            Outcome(row[REPORT_NUMBERS : REPORT_NUMBERS + row[0]], handle.drafted, row[2])
            for row in rows
        ]

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
            inputs = torch.zeros(2, bucket, dtype=torch.int64, device=self.device)
            inputs[0] = -1
            self._shapes[key] = shape = _Shape(inputs, Batch(inputs[0], inputs[1]))
            if self._captures:
                self._capture(shape, size)
        return self._shapes[key]

    @torch.inference_mode()
    def _capture(self, shape: _Shape, size: int) -> None:
        """Record a step of padding rows alone: it changes nothing, and compiles what is new."""
        start = time.perf_counter()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self.operations.step(self.state, shape.batch, size)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                shape.accepted = self.operations.step(self.state, shape.batch, size)
        except RuntimeError as error:
            # Such as a mixture of experts that looks on the host which expert gets which token.
            said = str(error).strip().split("\n", 1)[0]
            logger.warning("steps of this model cannot be captured, they are launched: %s", said)
            self._captures = False
            return
        shape.graph = graph
        rows, seconds = shape.inputs.shape[1], time.perf_counter() - start
        logger.debug("captured a step of %d x %d tokens in %.2f s", rows, size, seconds)

    @torch.inference_mode()
    def _run(self, shape: _Shape, size: int) -> Accepted:
        if shape.graph is None:
            return self.operations.step(self.state, shape.batch, size)
        shape.graph.replay()
        assert shape.accepted is not None
        return shape.accepted

    def _fill(self, shape: _Shape, rows: list[int], reads: list[int]) -> None:
        shape.inputs.copy_(to_device([rows, reads], self.device, torch.int64))

    def _count(self, tasks: set[int]) -> None:
        self._steps += 1
        self._reads |= tasks
        if self._steps % _ABSORB_EVERY == 0:
            self.state.calibration.absorb(self.state.fresh, self._reads, steps=_ABSORB_EVERY)
            self._reads = set()


class StepTimer:
    """Times steps as they will run: captured, on texts of a given length that say anything.

    Call it before anything is admitted. Rows of the matrix `task` are overwritten.

    Args:
        task: whose matrix drafts and learns.
        longest: see `sizing`.
    """

    def __init__(self, stepper: DeviceStep, *, task: int, longest: int) -> None:
        self._stepper, self._task, self.longest = stepper, task, longest

    @torch.inference_mode()
    def __call__(self, batch: int, size: int, context: int) -> float:
        """Seconds of one step of (batch, T) with `context` committed tokens a sequence."""
        stepper = self._stepper
        bucket = bucket_of(batch, stepper.capacity)
        shape = stepper._shape(bucket, size)
        rooms = self._take_slots(min(bucket, stepper.capacity), size, context)
        stepper._fill(
            shape, [*range(len(rooms)), *[-1] * (bucket - len(rooms))], [self._task] * bucket
        )
        _wait(stepper.device)
        start = time.perf_counter()
        report = OnItsWay(stepper._run(shape, size).report)
        report.wait()
        seconds = time.perf_counter() - start
        self._give_back(rooms)
        return seconds

    def _take_slots(self, count: int, size: int, context: int) -> list[Any]:
        cache, slots = self._stepper.state.model.cache, self._stepper.state.slots
        assert cache is not None
        # Random words, of which each text repeats its own: drafts have something to find.
        vocab = self._stepper.state.matrix.vocab_size
        words = torch.randint(vocab, (32,), generator=torch.Generator().manual_seed(0)).tolist()
        rooms = []
        for slot in range(count):
            text = [words[(slot + i * i) % len(words)] for i in range(context + 1)]
            room = cache.take_room(context + 1 + size)
            slots.put(slot, text, left=1 << 20, stops=[], pages=room.pages, task=self._task,
                      turn=slot)  # fmt: skip
            rooms.append(room)
        return rooms

    def _give_back(self, rooms: list[Any]) -> None:
        state = self._stepper.state
        assert state.model.cache is not None
        for slot, room in enumerate(rooms):
            state.slots.active[slot] = False
            state.matrix.clear_slot(slot)
            state.model.cache.give_back(room)
        state.matrix.clear_task(self._task)
        state.fresh.zero_()


def bucket_of(rows: int, capacity: int) -> int:
    """Rows that a step of `rows` sequences is padded to."""
    at = bisect_left(BUCKETS, rows)
    return min(BUCKETS[at] if at < len(BUCKETS) else rows, max(capacity, rows))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations_for(
    loaded: LoadedModel, config: EngineConfig, template: Tree | None
) -> Operations | None:
    """What steps are made of where nobody says it; None where they are the host's."""
    if loaded.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    if config.tree != "best_first" or template is not None:
        return None
    from trbatch.engine.step_kernels import KernelOperations

    return KernelOperations()
