"""The slow twin of `step_kernels`: the same step in plain torch, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trbatch.engine import best_first, drafting, reference
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
from trbatch.engine.verify import NOT_CHOSEN, Verdict


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

    def step(self, state: State, batch: Batch, size: int) -> Accepted:
        """One step. A plain one neither counts nor learns, like the kernels'."""
        running = _running(state, batch)
        if not len(running.at):
            deepest = min(MAX_DEPTH, size - 1)
            return Accepted.nothing(len(batch.rows), size, deepest, batch.rows.device)
        drafted, ahead = self._draft(state, running, size)
        logits = self._forward(state, running, drafted)
        blocks = blocks_of(logits)
        width = drafted.tokens.shape[1]
        chosen = drafting.padded(argmax(blocks), drafted.sizes, width, NOT_CHOSEN)
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
            flat = topk(blocks, state.matrix.candidates)
            candidates = drafting.padded(flat, drafted.sizes, width, EMPTY)
            turns = state.slots.turns[running.slots].argsort().argsort()
            tasks = state.slots.tasks[running.slots].long()
            drafting.learn(
                state.matrix, drafted, candidates, verdict.on_path, running.slots, tasks, turns
            )
        return accepted

    def prefill(self, state: State, prompts: Prompts, *, learning: bool) -> Tensor:
        """See `device_step.Operations.prefill`."""
        where, pieces = [], []
        starts = prompts.starts.tolist()
        for at, (start, end) in enumerate(pairwise(starts)):
            if count := end - start:
                slot, committed = int(prompts.rows[at]), int(prompts.committed[at])
                where.append(
                    Span(
                        room=_room(state, slot), committed=committed, length=count,
                        positions=prompts.positions[start:end].long(),
                        inner=torch.ones(count, count, dtype=torch.bool).tril(), in_order=True,
                    )
                )  # fmt: skip
                pieces.append((slot, committed, start, end))
        logits = state.model.forward(prompts.tokens[: starts[-1]].long(), where)
        if learning:
            candidates = topk(blocks_of(logits), state.matrix.candidates)
            # The later row of the input wins, whatever the slots.
            for slot, committed, start, end in sorted(
                pieces, key=lambda piece: int(state.slots.turns[piece[0]])
            ):
                reach = min(int(state.slots.lengths[slot]), committed + end - start + 1)
                drafting.learn_prompt(
                    state.matrix, state.slots.texts[slot, :reach].long(), committed,
                    candidates[start:end], slot, int(state.slots.tasks[slot]),
                )  # fmt: skip
        return logits[[end - 1 for *_, end in pieces]]

    def first(self, state: State, rows: Tensor, logits: Tensor) -> Accepted:
        """See `device_step.Operations.first`."""
        running = _running(state, Batch(rows, torch.zeros_like(rows)))
        drafted = drafting.roots(running.last)
        chosen = argmax(blocks_of(logits.float()))[running.at, None]
        return self._commit(state, rows, running, drafted, chosen, 1)

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


def _room(state: State, slot: int) -> Room:
    """The pages of a slot as the host's paths know them."""
    cache = state.model.cache
    assert cache is not None
    pages = [page for page in state.slots.pages[slot].tolist() if page >= 0]
    starts = torch.tensor(pages, device=state.nowhere.device) * cache.page_size
    places = torch.arange(cache.page_size, device=state.nowhere.device)
    return Room(tuple(pages), (starts[:, None] + places).flatten(), None)
