"""A step of kernels: every part of it one or two launches, nothing that waits for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from trbatch.engine.ahead import put_first
from trbatch.engine.best_first import MAX_DEPTH
from trbatch.engine.device_state import Accepted
from trbatch.engine.device_step import Batch, Prompts, State
from trbatch.engine.gpu_attention import PagedPlan
from trbatch.engine.kernels import likeliest
from trbatch.engine.kernels.accept import accept
from trbatch.engine.kernels.admit import admit
from trbatch.engine.kernels.attention import Layout
from trbatch.engine.kernels.cache import move_paths
from trbatch.engine.kernels.calibrate import calibrate
from trbatch.engine.kernels.draft import Trees, draft
from trbatch.engine.kernels.learn import learn
from trbatch.engine.kernels.sample import sample
from trbatch.engine.kernels.spine import look_ahead
from trbatch.engine.matrix import ORDERS
from trbatch.engine.sampling import Kind


class KernelOperations:
    """Steps by Triton's kernels and the network as it is. See `device_step.Operations`."""

    captures = True

    def admit(self, state: State, packed: Tensor, count: int) -> None:
        """See `device_step.Operations.admit`."""
        admit(state.slots, state.matrix, packed, count)

    def step(self, state: State, batch: Batch, size: int, *, sampling: Kind) -> Accepted:
        """One step: a plain one has no kernels for drafts at all."""
        if size == 1:
            return self._plain(state, batch, sampling=sampling)
        slots, matrix, rows = state.slots, state.matrix, batch.rows
        at = rows.clamp(min=0)
        active = (rows >= 0) & slots.active[at]
        ahead, matched = self._ahead(state, rows)
        trees = Trees.empty(len(rows), size, rows.device)
        draft(
            matrix, state.calibration.chances, slots.last[at], rows, batch.reads, active,
            ahead, matched, trees,
        )  # fmt: skip
        logits = _forward(state, rows, trees.tokens, trees.depths, trees.ancestors)
        candidates = likeliest.topk(logits, matrix.candidates)
        chosen = candidates[:, 0].contiguous()
        if sampling:
            chosen = sample(
                slots, rows, logits, chosen, trees.depths.flatten(),
                filtering=sampling is Kind.FILTERED,
            )  # fmt: skip
        chosen = chosen.view(len(rows), size)
        accepted = _commit(state, rows, trees.tokens, trees.parents, chosen)
        calibrate(
            matrix, state.fresh, accepted.nodes, accepted.tokens, trees.contexts, trees.depths,
            rows, batch.reads, active, ahead, matched, accepted.ranks,
        )  # fmt: skip
        learn(
            matrix, slots, rows, trees.tokens, trees.parents, trees.contexts, candidates,
            accepted.on_path,
        )  # fmt: skip
        return accepted

    def prefill(self, state: State, prompts: Prompts, *, learning: bool) -> Tensor:
        """See `device_step.Operations.prefill`."""
        model, ends = state.model, prompts.ends.long()
        assert model.cache is not None
        layout = Layout(
            starts=prompts.starts, committed=prompts.committed,
            pages=state.slots.pages[prompts.rows.long()].clamp(min=0),
            positions=prompts.positions, ancestors=None, longest=len(prompts.tokens),
            page_size=model.cache.page_size,
        )  # fmt: skip
        ids, positions = prompts.tokens.long(), prompts.positions.long()
        keep = None if learning else ends
        logits = model.run(ids, positions, PagedPlan(model.cache, layout), keep)
        if not learning:
            return logits
        candidates = likeliest.topk(logits, state.matrix.candidates)
        if state.kept is not None:
            state.kept.index_copy_(0, _places(state, prompts), candidates.to(torch.int32))
        _learn_prompts(state, prompts, candidates)
        return logits[ends]

    def recall(self, state: State, prompts: Prompts) -> None:
        """See `device_step.Operations.recall`."""
        assert state.kept is not None, "nothing is kept, so nothing is shared"
        _learn_prompts(state, prompts, state.kept[_places(state, prompts)].to(torch.int64))

    def first(self, state: State, rows: Tensor, logits: Tensor, *, sampling: Kind) -> Accepted:
        """See `device_step.Operations.first`."""
        return _commit_roots(state, rows, logits, sampling=sampling)

    def _plain(self, state: State, batch: Batch, *, sampling: Kind) -> Accepted:
        rows = batch.rows
        tokens = state.slots.last[rows.clamp(min=0), :1]
        logits = _forward(state, rows, tokens, torch.zeros_like(tokens), None)
        return _commit_roots(state, rows, logits, sampling=sampling)

    def _ahead(self, state: State, rows: Tensor) -> tuple[Tensor, Tensor]:
        if state.spine:
            return look_ahead(state.slots, rows, MAX_DEPTH + 1)
        nothing = torch.full((len(rows), MAX_DEPTH + 1), -1, device=rows.device)
        return nothing, torch.zeros_like(rows)


def _whose(prompts: Prompts) -> Tensor:
    """[N] the slot of the sequence that each token belongs to; of padding, any."""
    node = torch.arange(len(prompts.tokens), dtype=torch.int32, device=prompts.tokens.device)
    piece = torch.searchsorted(prompts.starts[1:], node, right=True)
    return prompts.rows.long()[piece.clamp(max=len(prompts.rows) - 1)]


def _places(state: State, prompts: Prompts) -> Tensor:
    """[N] the slots of the cache in which tokens of prompts lie; padding lies nowhere."""
    assert state.model.cache is not None
    size, at = state.model.cache.page_size, prompts.positions.long()
    node = torch.arange(len(at), device=at.device)
    page = state.slots.pages[_whose(prompts), at // size].long()
    page = torch.where(node < prompts.starts[-1], page, state.nowhere[0])
    return page * size + at % size


def _learn_prompts(state: State, prompts: Prompts, candidates: Tensor) -> None:
    """Recycle candidates [N, k] of pieces of prompts.

    A piece is a tree without branches, and all of it was accepted. Where the prompt itself says
    what followed, that token goes first.
    """
    slots, starts, count = state.slots, prompts.starts, len(prompts.tokens)
    rows, node = prompts.rows.long(), torch.arange(count, device=candidates.device)
    whose = _whose(prompts)
    after = prompts.positions.long() + 1
    known = (after < slots.lengths[whose]) & (node < starts[-1])
    following = slots.texts[whose, after.clamp(max=slots.texts.shape[1] - 1)].long()
    candidates = torch.where(known[:, None], put_first(following, candidates), candidates)
    # Laid out as trees, one for each piece.
    inside = node < (starts[1:] - starts[:-1])[:, None]  # [S, N]
    place = prompts.committed[:, None].long() + node
    texts = slots.texts[rows]
    contexts = []
    for back in range(ORDERS):
        at = (place - back).clamp(0, texts.shape[1] - 1)
        contexts.append(torch.where(inside & (place >= back), texts.gather(1, at), -1))
    flat = (starts[:-1, None] + node).clamp(max=count - 1)
    learn(
        state.matrix, slots, torch.where(inside[:, 0], rows, -1), contexts[0],
        (node - 1).clamp(min=0).expand(len(rows), -1), torch.stack(contexts, dim=2),
        candidates[flat], inside.contiguous(),
    )  # fmt: skip


def _forward(
    state: State, rows: Tensor, tokens: Tensor, depths: Tensor, ancestors: Tensor | None
) -> Tensor:
    """Raw logits [B * T, V] of the nodes [B, T] behind each row's committed tokens."""
    batch, size = tokens.shape
    slots, model = state.slots, state.model
    assert model.cache is not None
    at, padding = rows.clamp(min=0), rows < 0
    committed = torch.where(padding, 0, slots.lengths[at] - 1)
    # A page that a row has not is never asked for.
    pages = slots.pages[at].clamp(min=0)
    width = len(state.nowhere)
    pages[:, :width] = torch.where(padding[:, None], state.nowhere, pages[:, :width])
    positions = (committed[:, None] + depths).clamp(max=model.loaded.max_positions - 1).flatten()
    layout = Layout(
        starts=torch.arange(0, batch * size + 1, size, dtype=torch.int32, device=rows.device),
        committed=committed.to(torch.int32),
        pages=pages,
        positions=positions.to(torch.int32),
        ancestors=None if ancestors is None else ancestors.flatten(0, 1),
        longest=size,
        page_size=model.cache.page_size,
    )
    ids = tokens.flatten().clamp(min=0).to(torch.int64)
    return model.run(ids, positions.to(torch.int64), PagedPlan(model.cache, layout))


def _commit(
    state: State, rows: Tensor, tokens: Tensor, parents: Tensor, chosen: Tensor
) -> Accepted:
    cache = state.model.cache
    assert cache is not None
    accepted = accept(
        state.slots, rows, tokens, parents, chosen,
        deepest=min(MAX_DEPTH, tokens.shape[1] - 1), page_size=cache.page_size,
    )  # fmt: skip
    if tokens.shape[1] > 2:  # the only node behind a root is where it belongs
        for stack in cache.stacks:
            move_paths(stack, accepted.sources, accepted.targets)
    return accepted


def _commit_roots(state: State, rows: Tensor, logits: Tensor, *, sampling: Kind) -> Accepted:
    """Steps without drafts: each row takes the token after its root, from logits [B, V]."""
    chosen = likeliest.argmax(logits)
    if sampling:
        chosen = sample(
            state.slots, rows, logits, chosen, torch.zeros_like(chosen),
            filtering=sampling is Kind.FILTERED,
        )  # fmt: skip
    roots = state.slots.last[rows.clamp(min=0), :1].contiguous()
    return _commit(state, rows, roots, torch.zeros_like(roots), chosen[:, None])
