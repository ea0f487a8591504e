"""One decode step that never leaves the device: draft → forward → verify → commit → learn.

All that moves from step to step lies in `Slots`, so a step is started before the host has seen what
the one before gave (`lagged`). A step has a fixed shape: so many rows, padded up to a bucket, and
so many tokens a row; on a GPU each shape is captured once as a CUDA graph and replayed. What a step
is made of comes from an `Operations`: kernels (`step_kernels`), or their slow twins (`step_plain`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine.admission import Newcomer, pack
from trbatch.engine.calibration import PLACES, Calibration
from trbatch.engine.captured import Graphs
from trbatch.engine.device_state import MOST_TURNS, REPORT_NUMBERS, Accepted, Noise, Slots
from trbatch.engine.kv_cache import Room
from trbatch.engine.lagged import Outcome, Reading
from trbatch.engine.matrix import Matrix
from trbatch.engine.model import CausalModel, LoadedModel
from trbatch.engine.sampling import Kind
from trbatch.engine.sequence import Sequence
from trbatch.engine.step_shapes import Key, Shape, StepShapes, bucket_of
from trbatch.engine.transfer import Clock, OnItsWay, to_device
from trbatch.engine.tree import Tree

MOST_STOPS = 8  # ids that end a text, on the device
_SAMPLES = 1024  # of a row that have turns of their own, whatever else runs
_ABSORB_EVERY = 4  # steps between two looks at what was counted of candidates
_UNWRITTEN = "who was admitted is not on the device yet"


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

    def admit(self, state: State, packed: Tensor, count: int) -> None:
        """Give slots to sequences, and forget the own rows of who had them. See `admission`.

        Args:
            packed: [N] int32 all that is to be known of them.
            count: how many they are.
        """
        ...

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


@dataclass(frozen=True, slots=True)
class _Handle:
    report: OnItsWay
    clock: Clock
    members: int
    drafted: int
    lent: bool = False


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
        self.shapes = StepShapes(
            self._make_shape, lending=self.graphs.wanted, least=2 if most > 1 else 1
        )
        self._turns: dict[int, int] = {}  # slot -> turn
        self._taken: set[int] = set()  # all of these
        # Who was admitted and is not on the device yet, by slot: nothing may be started until
        # `write_admitted`.
        self._noted: dict[int, Sequence] = {}
        self._moved: dict[int, Room] = {}  # whose pages may be others than the device knows
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
        """Note a sequence that has a slot and pages; `write_admitted` takes it in.

        All steps of who had the slot have been read, so the device is through with them, too.
        """
        assert sequence.slot not in self._noted, f"slot {sequence.slot} is given away twice"
        self._noted[sequence.slot] = sequence
        self._kinds[sequence.slot] = Kind.of(sequence.request.sampling)

    @torch.inference_mode()
    def write_admitted(self) -> None:
        """Write all that were noted into their slots, on the pages that they have by now.

        If memory does not suffice they are still noted.
        """
        if self._noted:
            self.write([self._newcomer(sequence) for sequence in self._noted.values()])
            for slot, sequence in self._noted.items():
                sequence.room.note(self._moved, slot)
            self._noted.clear()

    def write(self, newcomers: ListLike[Newcomer]) -> None:
        """Give slots to sequences: they run from the step on that is started next. Never waits."""
        packed = to_device(pack(newcomers, self.state.slots), self.device, torch.int32)
        self.operations.admit(self.state, packed, len(newcomers))

    def _newcomer(self, sequence: Sequence) -> Newcomer:
        return Newcomer(
            sequence.slot, sequence.tokens, left=sequence.max_tokens - sequence.generated,
            stops=sorted(sequence.stop.stop_ids)[:MOST_STOPS], pages=sequence.room.pages,
            task=sequence.task, turn=self._turn_of(sequence), noise=_noise_of(sequence),
        )  # fmt: skip

    def release(self, slot: int) -> None:
        """Nobody has this slot any more; all steps of who had it have been read."""
        self._forget_turn(slot)
        self._noted.pop(slot, None)
        self._moved.pop(slot, None)

    def set_pages(self) -> None:
        """What is started from now on finds all sequences on the pages that they have now."""
        assert not self._noted, _UNWRITTEN
        table, where, what = self.state.slots.pages, list[int](), list[int]()
        for slot, room in self._moved.items():
            for place, page in room.news():
                where.append(slot * table.shape[1] + place)
                what.append(page)
        self._moved.clear()
        if where:
            places, pages = to_device([where, what], self.device, torch.int64)
            table.view(-1).index_copy_(0, places, pages.to(table.dtype))

    def is_ready(self, members: ListLike[Sequence], size: int) -> bool:
        """Whether a step of this shape was captured."""
        if not self.graphs.wanted:
            return True
        return self.shapes.key_for(self._key(members, size)) in self.shapes.made

    def prepare(self, members: ListLike[Sequence], size: int) -> None:
        """Capture a step of this shape."""
        self.shapes.get(self.shapes.key_for(self._key(members, size)))
        self.wait()

    @torch.inference_mode()
    def launch(self, members: ListLike[Sequence], size: int) -> _Handle:
        """Start a step of `size` tokens a sequence."""
        assert not self._noted, _UNWRITTEN
        shape, lent = self.shapes.take(self._key(members, size))
        shape.fill([s.slot for s in members], [s.reads for s in members])
        clock = Clock(self.device)
        accepted = shape.replay.run()
        report = OnItsWay(accepted.report)
        clock.stop()
        if size > 1:
            self._count({sequence.reads for sequence in members})
        return _Handle(report, clock, len(members), size - 1, lent)

    @torch.inference_mode()
    def first(self, members: ListLike[Sequence], logits: Tensor) -> _Handle:
        """Choose the token after each member's prompt.

        Args:
            logits: [B, V] at the prompts' ends.
        """
        assert not self._noted, _UNWRITTEN
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
        # What `Accepted.report` says, row by row. There may be hundreds in each step.
        drafted, tokens_at = handle.drafted, REPORT_NUMBERS
        ranks_at = (len(rows[0]) + REPORT_NUMBERS) // 2 if rows else 0
        outcomes = [
            Outcome(
                row[tokens_at : tokens_at + row[0]], drafted, row[2],
                row[ranks_at : ranks_at + row[0]],
            )
            for row in rows
        ]  # fmt: skip
        return Reading(outcomes, handle.clock.seconds, handle.lent)

    def _turn_of(self, sequence: Sequence) -> int:
        """Who it is among others: by row of the input and sample, and no two of them equal.

        Jobs that share a task have rows of the same numbers. So each number has as many turns as
        there are slots; rows so far apart that numbers do not suffice for them begin anew at 0.
        """
        order, sample = sequence.turn
        self._forget_turn(sequence.slot)
        rows = MOST_TURNS // (_SAMPLES * self.capacity)
        begin = ((order % rows) * _SAMPLES + sample % _SAMPLES) * self.capacity
        turn = next(t for t in range(begin, begin + self.capacity) if t not in self._taken)
        self._turns[sequence.slot] = turn
        self._taken.add(turn)
        return turn

    def _forget_turn(self, slot: int) -> None:
        if slot in self._turns:
            self._taken.remove(self._turns.pop(slot))

    def _key(self, members: ListLike[Sequence], size: int) -> Key:
        return Key(bucket_of(len(members), self.capacity), size, self._kind(members))

    def _kind(self, members: ListLike[Sequence]) -> Kind:
        return max(self._kinds[sequence.slot] for sequence in members)

    def _make_shape(self, key: Key) -> Shape:
        inputs = torch.zeros(2, key.rows, dtype=torch.int64, device=self.device)
        inputs[0] = -1  # a step of padding rows alone changes nothing
        batch = Batch(inputs[0], inputs[1])
        work = partial(self.operations.step, self.state, batch, key.size, sampling=key.kind)
        replay = self.graphs.record(work, what=f"a step of {key.rows} x {key.size} tokens")
        return Shape(inputs, replay)

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


def _noise_of(sequence: Sequence) -> Noise:
    request, params = sequence.request, sequence.request.sampling
    if Kind.of(params) is Kind.GREEDY:
        return Noise()
    return Noise(
        sequence.prompt_length, params.temperature, params.min_p, request.seed,
        request.sample_index, params.top_k, params.top_p,
    )  # fmt: skip


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
