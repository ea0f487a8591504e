"""One decode step that never leaves the device: draft → forward → verify → commit → learn.

All that moves from step to step lies in `Slots`, so a step is started before the host has seen what
the one before gave (`lagged`). A step has a fixed shape: so many rows, padded up to a bucket, and
so many tokens a row; on a GPU each shape is captured once as a CUDA graph and replayed. What a step
is made of comes from an `Operations`: kernels (`step_kernels`), or their slow twins (`step_plain`).
"""

from __future__ import annotations

import importlib.util
from bisect import bisect_left
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine.calibration import PLACES, Calibration
from trbatch.engine.captured import Graphs, Replay
from trbatch.engine.device_state import MOST_TURNS, REPORT_NUMBERS, Accepted, Noise, Slots
from trbatch.engine.lagged import Outcome, Reading
from trbatch.engine.matrix import Matrix
from trbatch.engine.model import CausalModel, LoadedModel
from trbatch.engine.sampling import Kind
from trbatch.engine.sequence import Sequence
from trbatch.engine.transfer import Clock, OnItsWay, send, to_device
from trbatch.engine.tree import Tree

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # rows
MOST_STOPS = 8  # ids that end a text, on the device
_SAMPLES = 1024  # of a row that have turns of their own, whatever else runs
_ABSORB_EVERY = 4  # steps between two looks at what was counted of candidates


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
    # [slots of the cache, k] int32 what the model said after each token of a prompt; see `prefix`.
    kept: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step is told: [B] int64 each."""

    rows: Tensor  # slots, -1 for padding
    reads: Tensor  # whose task's rows draft


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a prefill is told: pieces of up to S prompts, N tokens in all, int32 each.

    Those behind `starts[-1]` are padding, and so is a piece without tokens.
    """

    tokens: Tensor  # [N]
    positions: Tensor  # [N]
    starts: Tensor  # [S + 1] piece s has tokens starts[s] to starts[s + 1]
    committed: Tensor  # [S] tokens of the prompt that are in the cache
    rows: Tensor  # [S] its slot
    ends: Tensor  # [S] its last token among the N


class Operations(Protocol):
    """The parts of a step, quick or slow."""

    captures: bool  # whether steps can be captured as graphs

    def step(self, state: State, batch: Batch, size: int, *, sampling: Kind) -> Accepted:
        """One step of `size` tokens a row, the root included.

        Args:
            sampling: what the rows' choices take at most.
        """
        ...

    def prefill(self, state: State, prompts: Prompts, *, learning: bool) -> Tensor:
        """Pieces of prompts into the cache, and into the rows if they are worth learning from.

        Returns:
            Raw logits [S, V] at each piece's last token.
        """
        ...

    def recall(self, state: State, prompts: Prompts) -> None:
        """Learn from pieces that were run for other prompts and are in the cache."""
        ...

    def first(self, state: State, rows: Tensor, logits: Tensor, *, sampling: Kind) -> Accepted:
        """The token after each prompt, from the logits [B, V] at its end."""
        ...


@dataclass(slots=True)
class Shape:
    """A step of one shape, and its inputs."""

    inputs: Tensor  # [2, B]
    replay: Replay[Accepted]

    def fill(self, rows: ListLike[int], reads: ListLike[int]) -> None:
        """Say whose step it is, padding behind. See `Batch`."""
        padding = self.inputs.shape[1] - len(rows)
        numbers = [[*rows, *[-1] * padding], [*reads, *[0] * padding]]
        send(numbers, self.inputs)


@dataclass(frozen=True, slots=True)
class _Handle:
    report: OnItsWay
    clock: Clock
    members: int
    drafted: int


class DeviceStep:
    """The stepper of one engine.

    Args:
        most: tokens a row, at most.
        longest: tokens of the longest sequence with its tree.
        kept: see `State`.
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
        kept: Tensor | None = None,
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
            spine=spine, kept=kept,
        )  # fmt: skip
        self.operations = operations
        self.device, self.most, self.capacity = device, most, capacity
        self.graphs = Graphs(device, wanted=capture and operations.captures)
        self._steps = 0
        self._shapes: dict[tuple[int, int, Kind], Shape] = {}
        self._turns: dict[int, int] = {}  # slot -> turn
        self._kinds = [Kind.GREEDY] * capacity  # of each slot
        self._reads: set[int] = set()  # tasks of which something may have been counted

    @property
    def kind(self) -> str:
        """What its steps are, among the ways in which steps can be made."""
        return f"{type(self.operations).__name__}{', captured' if self.graphs.wanted else ''}"

    def knows_all(self, sequence: Sequence) -> bool:
        """Whether all that decides a sequence's tokens is known on the device once it is there.

        Then steps can be started before its last token has been seen.
        """
        request, params = sequence.request, sequence.request.sampling
        tells = params.logprobs is not None or params.prompt_logprobs is not None
        hosts = bool(request.logits_processors) or tells
        return not hosts and len(sequence.stop.stop_ids) <= MOST_STOPS

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence that has a slot and pages."""
        request, stops = sequence.request, sorted(sequence.stop.stop_ids)
        self._kinds[sequence.slot] = Kind.of(request.sampling)
        self.state.slots.put(
            sequence.slot, sequence.tokens, left=sequence.max_tokens - sequence.generated,
            stops=stops[:MOST_STOPS], pages=[page for _, page in sequence.room.news()],
            task=sequence.task, turn=self._turn_of(sequence), noise=_noise_of(sequence),
        )  # fmt: skip

    def release(self, slot: int) -> None:
        """Nobody has this slot any more; all steps of who had it have been read."""
        self._turns.pop(slot, None)

    def set_pages(self, sequences: ListLike[Sequence]) -> None:
        """What is started from now on finds these sequences on the pages they have now."""
        table = self.state.slots.pages
        numbers = [
            (sequence.slot, place, page)
            for sequence in sequences
            if sequence.room.has_news
            for place, page in sequence.room.news()
        ]
        if numbers:
            slots, places, pages = to_device(numbers, self.device, torch.int64).unbind(1)
            table.index_put_((slots, places), pages.to(table.dtype))

    def is_ready(self, members: ListLike[Sequence], size: int) -> bool:
        """Whether a step of this shape was captured."""
        return not self.graphs.wanted or self._key(members, size) in self._shapes

    def prepare(self, members: ListLike[Sequence], size: int) -> None:
        """Capture a step of this shape."""
        self.shape(*self._key(members, size))
        self.wait()

    @torch.inference_mode()
    def launch(self, members: ListLike[Sequence], size: int) -> _Handle:
        """Start a step of `size` tokens a sequence."""
        shape = self.shape(*self._key(members, size))
        shape.fill([s.slot for s in members], [s.reads for s in members])
        clock = Clock(self.device)
        accepted = shape.replay.run()
        report = OnItsWay(accepted.report)
        clock.stop()
        if size > 1:
            self._count({sequence.reads for sequence in members})
        return _Handle(report, clock, len(members), size - 1)

    @torch.inference_mode()
    def first(self, members: ListLike[Sequence], logits: Tensor) -> _Handle:
        """Choose the token after each member's prompt.

        Args:
            logits: [B, V] at the prompts' ends.
        """
        rows = to_device([sequence.slot for sequence in members], self.device, torch.int64)
        clock, report = Clock(self.device), rows
        if members:
            report = self.operations.first(
                self.state, rows, logits, sampling=self._kind(members)
            ).report
        copy = OnItsWay(report)
        clock.stop()
        return _Handle(copy, clock, len(members), 0)

    def read(self, handle: _Handle) -> Reading:
        """Wait for a step and get what it gave each of its members."""
        rows = handle.report.wait()[: handle.members]
        outcomes = [_outcome(row, handle.drafted) for row in rows]
        return Reading(outcomes, handle.clock.seconds)

    def _turn_of(self, sequence: Sequence) -> int:
        """Who it is among others: by row of the input and sample, and no two of them equal.

        Jobs that share a task have rows of the same numbers. So each number has as many turns as
        there are slots; rows so far apart that numbers do not suffice for them begin anew at 0.
        """
        order, sample = sequence.turn
        self._turns.pop(sequence.slot, None)
        rows = MOST_TURNS // (_SAMPLES * self.capacity)
        begin = ((order % rows) * _SAMPLES + sample % _SAMPLES) * self.capacity
        taken = set(self._turns.values())
        turn = next(t for t in range(begin, begin + self.capacity) if t not in taken)
        self._turns[sequence.slot] = turn
        return turn

    def _key(self, members: ListLike[Sequence], size: int) -> tuple[int, int, Kind]:
        return bucket_of(len(members), self.capacity), size, self._kind(members)

    def _kind(self, members: ListLike[Sequence]) -> Kind:
        return max(self._kinds[sequence.slot] for sequence in members)

    def shape(self, bucket: int, size: int, sampling: Kind = Kind.GREEDY) -> Shape:
        """A step of this shape, captured if it was not yet."""
        key = bucket, size, sampling
        if key not in self._shapes:
            inputs = torch.zeros(2, bucket, dtype=torch.int64, device=self.device)
            inputs[0] = -1  # a step of padding rows alone changes nothing
            batch = Batch(inputs[0], inputs[1])
            work = partial(self.operations.step, self.state, batch, size, sampling=sampling)
            replay = self.graphs.record(work, what=f"a step of {bucket} x {size} tokens")
            self._shapes[key] = Shape(inputs, replay)
        return self._shapes[key]

    def wait(self) -> None:
        """Until the device is through with all that was started."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def absorb(self) -> None:
        """Take in what was counted of candidates, before anybody else looks at it."""
        if self._steps:
            self.state.calibration.absorb(self.state.fresh, self._reads, steps=self._steps)
            self._steps, self._reads = 0, set()

    def _count(self, tasks: set[int]) -> None:
        self._steps += 1
        self._reads |= tasks
        if self._steps >= _ABSORB_EVERY:
            self.absorb()


def _noise_of(sequence: Sequence) -> Noise | None:
    request, params = sequence.request, sequence.request.sampling
    if Kind.of(params) is Kind.GREEDY:
        return None
    return Noise(
        sequence.prompt_length, params.temperature, params.min_p, request.seed,
        request.sample_index, params.top_k, params.top_p,
    )  # fmt: skip


def _outcome(report: list[int], drafted: int) -> Outcome:
    """What one row of `Accepted.report` says."""
    count, ranks = report[0], (len(report) + REPORT_NUMBERS) // 2
    tokens = report[REPORT_NUMBERS : REPORT_NUMBERS + count]
    return Outcome(tokens, drafted, report[2], report[ranks : ranks + count])


def bucket_of(rows: int, capacity: int) -> int:
    """Rows that a step of `rows` sequences is padded to."""
    at = bisect_left(BUCKETS, rows)
    return min(BUCKETS[at] if at < len(BUCKETS) else rows, max(capacity, rows))


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
