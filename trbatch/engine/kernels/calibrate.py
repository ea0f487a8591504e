"""Counting which candidates came true along the accepted paths.

Whole numbers are added up by atomic operations, so their order does not matter. What a step or
several have counted is taken over by `Calibration.absorb`. The slow twin is
`coming_true.count_paths`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine import candidates
from trbatch.engine.calibration import DEPTHS, PLACES
from trbatch.engine.kernels import rows
from trbatch.engine.matrix import ORDERS, Matrix

_CELLS, _DEPTHS = tl.constexpr(candidates.CELLS), tl.constexpr(DEPTHS)
_PLACES = tl.constexpr(PLACES)
_CONTEXT = tl.constexpr(ORDERS)


@triton.jit
def _count(
    fresh: tl.tensor, cell: tl.tensor, token: tl.tensor, truth: tl.tensor, there: tl.tensor
) -> None:
    """Count candidates as seen and, where they are what came, as true; fresh: at their task's."""
    counted = there & (token >= 0)
    tl.atomic_add(fresh + cell, 1, mask=counted & (token == truth), sem="relaxed")
    tl.atomic_add(fresh + _PLACES + cell, 1, mask=counted, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "nodes_apart", "truths_apart", "ranks_apart", "most", "total", "expectations",
    ]
)  # fmt: skip
def _calibrate(
    keys: tl.tensor, own_rows: tl.tensor, pair_keys: tl.tensor, pair_rows: tl.tensor,
    shared: tl.tensor, bigrams: tl.tensor,
    fresh: tl.tensor,  # [tasks, 2, _PLACES]
    nodes: tl.tensor, truths: tl.tensor, ranks: tl.tensor,  # [B, most], rows this far apart:
    nodes_apart: tl.tensor, truths_apart: tl.tensor, ranks_apart: tl.tensor,
    contexts: tl.tensor, depths: tl.tensor,  # [B, total, 3], [B, total]
    slots: tl.tensor, tasks: tl.tensor, active: tl.tensor, matched: tl.tensor,  # [B]
    ahead: tl.tensor,  # [B, expectations]
    most: tl.tensor, total: tl.tensor, expectations: tl.tensor,
    P: tl.constexpr, ORDERS: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr,
    VOCAB: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    """The path of one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, P)[:, None]
    task = tl.load(tasks + sequence).to(tl.int64)
    tables = rows.of_sequence(
        keys, own_rows, pair_keys, pair_rows, shared, bigrams, tl.load(slots + sequence), task,
        ORDERS, OWN, PAIRS, VOCAB, COUNT,
    )  # fmt: skip
    node = tl.load(nodes + sequence * nodes_apart + step, mask=step < most, other=-1)
    truth = tl.load(truths + sequence * truths_apart + step, mask=step < most, other=-1)
    truth = truth.to(tl.int32)
    there = (node >= 0) & (tl.load(active + sequence) != 0)
    at = sequence * total + tl.where(there, node, 0).to(tl.int64)
    depth = tl.load(depths + at, mask=there, other=0).to(tl.int32)
    newest = tl.load(contexts + at * _CONTEXT, mask=there, other=0).to(tl.int32)
    older = tl.load(contexts + at * _CONTEXT + 1, mask=there, other=-1).to(tl.int32)
    oldest = tl.load(contexts + at * _CONTEXT + 2, mask=there, other=-1).to(tl.int32)
    might = rows.read(tables, newest, older, oldest, there, ORDERS, OWN, PAIRS, VOCAB, COUNT, K)
    first, origin, second, behind = rows.choose(might, ORDERS, PAIRS, K)
    rank = tl.arange(0, K)[None, :]
    hit = tl.min(tl.where((first == truth) & (truth >= 0), rank, K), 1, keep_dims=True)
    tl.store(ranks + sequence * ranks_apart + step, tl.where(hit < K, hit, -1), mask=there)
    known = (step < most) & (step < expectations)
    expected = tl.load(ahead + sequence * expectations + step, mask=known, other=-1).to(tl.int32)
    # The spine holds as long as every token that led here was the expected one.
    left_at = tl.min(tl.where(truth != expected, step, P))
    expected = tl.where(step <= left_at, expected, -1)
    long = tl.load(matched + sequence).to(tl.int32) + depth
    token, cell, other, other_cell, spine_cell = rows.candidates(
        first, origin, second, behind, expected, long, K
    )
    fresh += task * (2 * _PLACES)
    begin = tl.minimum(depth, _DEPTHS - 1) * _CELLS
    _count(fresh, begin + cell, token, truth, there)
    _count(fresh, begin + other_cell, other, truth, there)
    _count(fresh, begin + spine_cell, expected, truth, there)


def calibrate(
    matrix: Matrix,
    fresh: Tensor,
    nodes: Tensor,
    truths: Tensor,
    contexts: Tensor,
    depths: Tensor,
    slots: Tensor,
    tasks: Tensor,
    active: Tensor,
    ahead: Tensor,
    matched: Tensor,
    ranks: Tensor,
) -> None:
    """Add to `fresh` what the accepted paths of B sequences say, before rows change.

    All tensors of indices and tokens hold whole numbers of any type.

    Args:
        fresh: [tasks, 2, PLACES] int32, what came true and what was seen.
        nodes: [B, n] accepted nodes from the root on, -1 behind the end.
        truths: [B, n] the model's token after each of them, -1 behind the end.
        contexts, depths: [B, T, 3], [B, T] of the verified trees.
        slots, tasks: [B] whose rows; anything where a sequence is not active.
        active: [B] bool or integers; a sequence with 0 is not counted.
        ahead, matched: [B, D], [B] what the spines expected when the trees were drafted.
        ranks: [B, n] int32, filled where a node was accepted: the rank that its first row gave
            the token after it, -1 if that had it not.
    """
    (batch, most), (_, total) = nodes.shape, depths.shape
    assert fresh.shape[1:] == (2, PLACES) and fresh.dtype == torch.int32 and fresh.is_contiguous()
    assert truths.shape == ranks.shape == nodes.shape and contexts.shape == (batch, total, ORDERS)
    assert all(t.stride(1) == 1 or most == 1 for t in (nodes, truths, ranks)), "adjacent"
    of_sequences = (contexts, depths, slots, tasks, active, ahead, matched)
    assert all(len(t) == batch and t.is_contiguous() for t in of_sequences)
    _calibrate[(batch,)](
        *rows.tables_of(matrix), fresh, nodes, truths, ranks, nodes.stride(0), truths.stride(0),
        ranks.stride(0), contexts, depths, slots, tasks, active, matched, ahead, most, total,
        ahead.shape[1],
        P=triton.next_power_of_2(most), **rows.sizes_of(matrix), num_warps=1,
    )  # fmt: skip
