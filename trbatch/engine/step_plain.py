"""The slow twin of `step_kernels`: the same step in plain torch, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trbatch.config import SamplingParams
from trbatch.engine import best_first, drafting, reference
from trbatch.engine.admission import unpack
from trbatch.engine.ahead import Ahead
from trbatch.engine.attention import Span
from trbatch.engine.best_first import MAX_DEPTH, WIDEST
from trbatch.engine.coming_true import count_paths
from trbatch.engine.device_state import Accepted
from trbatch.engine.device_step import Batch, Prompts, State
from trbatch.engine.drafting import Draft
from trbatch.engine.kv_cache import Room
from trbatch.engine.likeliest import argmax, blocks_of, topk
from trbatch.engine.matrix import EMPTY
from trbatch.engine.noise import place_key
from trbatch.engine.sampling import Choice, Kind, choose
from trbatch.engine.verify import NOT_CHOSEN, Verdict

_Piece = tuple[int, int, int, int]  # slot, tokens before it, begin and end among those of all


@dataclass(frozen=True, slots=True)
class _Running:
    """Those rows of a batch that run. `at`: [R] which these are; `slots`, `reads`: [R]."""

    at: Tensor
    slots: Tensor
    reads: Tensor
    last: Tensor  # [R, 3]


class PlainOperations:
    """See `device_step.Operations`."""

    captures = False

    def admit(self, state: State, packed: Tensor, count: int) -> None:
        """See `device_step.Operations.admit`."""
        for one in unpack(packed, count):
            state.slots.put(
                one.slot, one.tokens, left=one.left, stops=one.stops, pages=one.pages,
                task=one.task, turn=one.turn, noise=one.noise,
            )  # fmt: skip
            state.matrix.clear_slot(one.slot)

    def step(self, state: State, batch: Batch, size: int, *, sampling: Kind) -> Accepted:
        """One step. A plain one neither counts nor learns, like the kernels'."""
        running = _running(state, batch)
        if not len(running.at):
            deepest = min(MAX_DEPTH, size - 1)
            return Accepted.nothing(len(batch.rows), size, deepest, batch.rows.device)
        drafted, ahead = self._draft(state, running, size)
        logits = self._forward(state, running, drafted)
        blocks = blocks_of(logits)
        width = drafted.tokens.shape[1]
        flat = argmax(blocks)
        if sampling:
            flat = _sampled(state, running, drafted, logits)
        chosen = drafting.padded(flat, drafted.sizes, width, NOT_CHOSEN)
        accepted = self._commit(state, batch.rows, running, drafted, chosen, size)
        if size > 1:
            verdict = Verdict(
                accepted.nodes[running.at].long(), accepted.tokens[running.at].long(),
                accepted.on_path[running.at, :width],
            )  # fmt: skip
            ranks = count_paths(
                state.matrix, state.calibration, drafted, verdict, running.slots, running.reads,
                ahead,
            )  # fmt: skip
            for row, found in zip(running.at.tolist(), ranks, strict=True):
                accepted.ranks[row, : len(found)] = torch.tensor(found)
            known = topk(blocks, state.matrix.candidates)
            candidates = drafting.padded(known, drafted.sizes, width, EMPTY)
            turns = state.slots.turns[running.slots].argsort().argsort()
            tasks = state.slots.tasks[running.slots].long()
            drafting.learn(
                state.matrix, drafted, candidates, verdict.on_path, running.slots, tasks, turns
            )
        return accepted

    def prefill(self, state: State, prompts: Prompts, *, learning: bool) -> Tensor:
        """See `device_step.Operations.prefill`."""
        where, pieces = [], _pieces(prompts)
        for slot, committed, start, end in pieces:
            count = end - start
            where.append(
                Span(
                    room=_room(state, slot), committed=committed, length=count,
                    positions=prompts.positions[start:end].long(),
                    inner=torch.ones(count, count, dtype=torch.bool).tril(), in_order=True,
                )
            )  # fmt: skip
        logits = state.model.forward(prompts.tokens[: pieces[-1][3]].long(), where)
        if learning:
            candidates = topk(blocks_of(logits), state.matrix.candidates)
            if state.kept is not None:
                state.kept[_places(state, pieces)] = candidates.to(torch.int32)
            _learn_prompts(state, pieces, candidates)
        return logits[[end - 1 for *_, end in pieces]]

    def recall(self, state: State, prompts: Prompts) -> None:
        """See `device_step.Operations.recall`."""
        assert state.kept is not None, "nothing is kept, so nothing is shared"
        pieces = _pieces(prompts)
        _learn_prompts(state, pieces, state.kept[_places(state, pieces)].long())

    def first(self, state: State, rows: Tensor, logits: Tensor, *, sampling: Kind) -> Accepted:
        """See `device_step.Operations.first`."""
        running = _running(state, Batch(rows, torch.zeros_like(rows)))
        drafted = drafting.roots(running.last)
        logits = logits.float()[running.at]
        chosen = argmax(blocks_of(logits))
        if sampling:
            chosen = _sampled(state, running, drafted, logits)
        return self._commit(state, rows, running, drafted, chosen[:, None], 1)

    def _draft(self, state: State, running: _Running, size: int) -> tuple[Draft, Ahead | None]:
        drafted = drafting.roots(running.last)
        if size == 1:
            return drafted, None
        ahead = None
        if state.spine:
            ahead = Ahead(*reference.look_ahead(state.slots, running.slots, MAX_DEPTH + 1))
        found = best_first.expand(
            state.matrix, state.calibration, running.slots, running.reads, running.last, ahead,
            width=min(size - 1, WIDEST), enough=size - 1,
        )  # fmt: skip
        if found is not None:
            taken = best_first.take_likeliest(found, size - 1, each=True)
            drafted = best_first.build(found, taken, running.last)
        return drafted, ahead

    def _forward(self, state: State, running: _Running, drafted: Draft) -> Tensor:
        spans = []
        positions = state.model.loaded.max_positions
        for index, slot in enumerate(running.slots.tolist()):
            size, committed = drafted.sizes[index], int(state.slots.lengths[slot]) - 1
            spans.append(
                Span(
                    room=_room(state, slot), committed=committed, length=size,
                    positions=(drafted.depths[index, :size] + committed).clamp(max=positions - 1),
                    inner=drafted.ancestors[index, :size, :size] if size > 1 else None,
                )
            )  # fmt: skip
        nodes = [drafted.tokens[i, :size] for i, size in enumerate(drafted.sizes)]
        return state.model.forward(torch.cat(nodes).clamp(min=0), spans)

    def _commit(
        self,
        state: State,
        rows: Tensor,
        running: _Running,
        drafted: Draft,
        chosen: Tensor,
        size: int,
    ) -> Accepted:
        shape, width = (len(rows), size), drafted.tokens.shape[1]
        tokens, parents, picks = (rows.new_full(shape, fill) for fill in (-1, 0, NOT_CHOSEN))
        tokens[running.at, :width] = drafted.tokens
        parents[running.at, :width] = drafted.parents
        picks[running.at, :width] = chosen
        cache = state.model.cache
        assert cache is not None
        accepted = reference.accept(
            state.slots, rows, tokens, parents, picks,
            deepest=min(MAX_DEPTH, size - 1), page_size=cache.page_size,
        )  # fmt: skip
        moves = accepted.sources >= 0
        if moves.any():
            cache.move(accepted.sources[moves].long(), accepted.targets[moves].long())
        return accepted


def _running(state: State, batch: Batch) -> _Running:
    slots = state.slots
    runs = (batch.rows >= 0) & slots.active[batch.rows.clamp(min=0)]
    at = runs.nonzero().flatten()
    mine = batch.rows[at]
    return _Running(at, mine, batch.reads[at], slots.last[mine].long())


def _sampled(state: State, running: _Running, drafted: Draft, logits: Tensor) -> Tensor:
    """[N] the model's own next token at each node, by each row's settings and noise."""
    slots, choices = state.slots, []
    for row, slot in enumerate(running.slots.tolist()):
        params = SamplingParams(
            temperature=float(slots.temperatures[slot]), min_p=float(slots.min_ps[slot]),
            top_k=int(slots.top_ks[slot]), top_p=float(slots.top_ps[slot]),
        )  # fmt: skip
        begin = int(slots.lengths[slot]) - int(slots.begins[slot])
        seed, sample = int(slots.seeds[slot]), int(slots.samples[slot])
        for depth in drafted.depths[row, : drafted.sizes[row]].tolist():
            choices.append(Choice(params, place_key(seed, sample, begin + depth)))
    return choose(logits, choices)


def _pieces(prompts: Prompts) -> list[_Piece]:
    pairs = enumerate(pairwise(prompts.starts.tolist()))
    return [
        (int(prompts.rows[at]), int(prompts.committed[at]), start, end)
        for at, (start, end) in pairs
        if start < end
    ]


def _places(state: State, pieces: list[_Piece]) -> Tensor:
    """[N] the slots of the cache in which the tokens of pieces lie."""
    return torch.cat([
        _room(state, slot).slots[committed : committed + end - start]
        for slot, committed, start, end in pieces
    ])  # fmt: skip


def _learn_prompts(state: State, pieces: list[_Piece], candidates: Tensor) -> None:
    """Recycle candidates [N, k]. The later row of the input wins, whatever the slots."""
    for slot, committed, start, end in sorted(
        pieces, key=lambda piece: int(state.slots.turns[piece[0]])
    ):
        reach = min(int(state.slots.lengths[slot]), committed + end - start + 1)
        drafting.learn_prompt(
            state.matrix, state.slots.texts[slot, :reach].long(), committed,
            candidates[start:end], slot, int(state.slots.tasks[slot]),
        )  # fmt: skip


def _room(state: State, slot: int) -> Room:
    """The pages of a slot as the host's paths know them."""
    cache = state.model.cache
    assert cache is not None
    return cache.room_of([page for page in state.slots.pages[slot].tolist() if page >= 0])
