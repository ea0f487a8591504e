"""Recycling every node's candidates into the rows of its sequence and of its task.

Two launches. In the first each node raises the claim on every place that it wants to write to its
own priority; in the second the node whose priority stands there writes, and takes the claim away
again. So the winner does not depend on the order in which programs run. One program takes one
sequence and one table: its own of 1, 2 and 3 tokens, the task's of 1 token, the task's of 2. The
slow twin is `drafting.learn`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine.device_state import MOST_TURNS, Slots
from trbatch.engine.kernels.keys import longer_key, place_of
from trbatch.engine.matrix import ORDERS as MOST_ORDERS
from trbatch.engine.matrix import TASK_ORDERS, Matrix

# A priority in a task's tables: whether the node was accepted, whose turn it is, which node it is.
MOST_NODES = 1 << 16
_TURN = tl.constexpr(MOST_NODES.bit_length() - 1)  # lowest bits of these
_PATH = tl.constexpr((MOST_NODES * MOST_TURNS).bit_length() - 1)
_CONTEXT = tl.constexpr(MOST_ORDERS)
_NODES_A_WARP = 32
# One compilation for all trees of a block: sizes change from step to step.
_SIZES = ["parents_apart", "size"]


@triton.jit
def _whole(
    token: tl.tensor,
    parents: tl.tensor,
    size: tl.tensor,
    BLOCK_T: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_T] whether a node and all its ancestors have a token.

    token: [BLOCK_T], -1 where there is none; parents: [size] of one row.
    """
    node = tl.arange(0, BLOCK_T)
    # A missing node is its own parent, so that nobody behind it gets to the root.
    up = tl.load(parents + node, mask=(token >= 0) & (node < size), other=0).to(tl.int32)
    up = tl.where(token >= 0, up, node)
    for _ in tl.static_range(ROUNDS):
        up = tl.gather(up, up, 0)
    root_is_there = tl.max(tl.where(node == 0, token, -1), 0) >= 0
    return (up == 0) & root_is_there


@triton.jit
def _wishes(
    tokens: tl.tensor, parents: tl.tensor, contexts: tl.tensor, on_path: tl.tensor,
    slot: tl.tensor, task: tl.tensor, turn: tl.tensor, size: tl.tensor, vocab: tl.tensor,
    own_count: tl.tensor, pair_count: tl.tensor,
    ORDERS: tl.constexpr, BLOCK_T: tl.constexpr, ROUNDS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What each node of one row wants in this program's table: place, key, priority, [BLOCK_T].

    The place is one in the flattened tables; the priority is -1 where it wants none.

    tokens, parents, on_path: [size] of the row; contexts: [size, 3].
    """
    table = tl.program_id(1)
    node = tl.arange(0, BLOCK_T)
    inside = node < size
    token = tl.load(tokens + node, mask=inside, other=-1).to(tl.int32)
    path = tl.load(on_path + node, mask=inside, other=0).to(tl.int64)
    # Its context of as many tokens as key this table.
    order = tl.where(table < ORDERS, table, table - ORDERS)
    key = tl.load(contexts + node * _CONTEXT, mask=inside, other=-1).to(tl.int64)
    for nth in tl.static_range(1, _CONTEXT):
        older = tl.load(contexts + node * _CONTEXT + nth, mask=inside & (nth <= order), other=-1)
        key = tl.where(nth <= order, longer_key(key, older, vocab), key)
    wanted = inside & (key >= 0) & _whole(token, parents, size, BLOCK_T, ROUNDS)
    if table < ORDERS:
        place = (slot * ORDERS + table) * own_count + place_of(key, own_count)
        priority = node + size * path
    else:
        if table == ORDERS:
            place = task * vocab + key
        else:
            place = task * pair_count + place_of(key, pair_count)
        priority = (path << _PATH) | (turn << _TURN) | node
    return place, key, tl.where(wanted, priority, -1)


@triton.jit
def _row_of(
    rows: tl.tensor, tasks: tl.tensor, turns: tl.tensor, on_path: tl.tensor, size: tl.tensor
) -> tl.tensor:
    """Of this program's row of the batch: whether it ran, its slot, task and turn."""
    row = tl.program_id(0)
    slot = tl.load(rows + row).to(tl.int64)
    ran = (tl.load(on_path + row * size) != 0) & (slot >= 0)
    task = tl.load(tasks + slot, mask=ran, other=0).to(tl.int64)
    turn = tl.load(turns + slot, mask=ran, other=0).to(tl.int64)
    return ran, slot, task, turn


@triton.jit(do_not_specialize=_SIZES)
def _claim(
    tokens: tl.tensor, parents: tl.tensor, contexts: tl.tensor, on_path: tl.tensor,
    rows: tl.tensor, tasks: tl.tensor, turns: tl.tensor,
    own_claims: tl.tensor, shared_claims: tl.tensor, pair_claims: tl.tensor,
    parents_apart: tl.tensor, size: tl.tensor, vocab: tl.tensor, own_count: tl.tensor,
    pair_count: tl.tensor, ORDERS: tl.constexpr, BLOCK_T: tl.constexpr, ROUNDS: tl.constexpr,
) -> None:  # fmt: skip
    """Raise the claims of one table to the priorities of one row's nodes."""
    ran, slot, task, turn = _row_of(rows, tasks, turns, on_path, size)
    if not ran:
        return
    row, table = tl.program_id(0), tl.program_id(1)
    place, _, priority = _wishes(
        tokens + row * size, parents + row * parents_apart, contexts + row * size * _CONTEXT,
        on_path + row * size, slot, task, turn, size, vocab, own_count, pair_count,
        ORDERS, BLOCK_T, ROUNDS,
    )  # fmt: skip
    claims = own_claims
    if table == ORDERS:
        claims = shared_claims
    if table > ORDERS:
        claims = pair_claims
    tl.atomic_max(claims + place, priority, mask=priority >= 0, sem="relaxed")


@triton.jit(do_not_specialize=_SIZES)
def _write(
    tokens: tl.tensor, parents: tl.tensor, contexts: tl.tensor, on_path: tl.tensor,
    candidates: tl.tensor, rows: tl.tensor, tasks: tl.tensor, turns: tl.tensor,
    own_claims: tl.tensor, shared_claims: tl.tensor, pair_claims: tl.tensor,
    own_keys: tl.tensor, pair_keys: tl.tensor,
    own_rows: tl.tensor, shared_rows: tl.tensor, pair_rows: tl.tensor,
    changed: tl.tensor, pair_changed: tl.tensor,
    parents_apart: tl.tensor, size: tl.tensor, vocab: tl.tensor, own_count: tl.tensor,
    pair_count: tl.tensor, k: tl.tensor,
    ORDERS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ROUNDS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the candidates of those of one row's nodes whose claims stand in one table."""
    ran, slot, task, turn = _row_of(rows, tasks, turns, on_path, size)
    if not ran:
        return
    row, table = tl.program_id(0), tl.program_id(1)
    place, key, priority = _wishes(
        tokens + row * size, parents + row * parents_apart, contexts + row * size * _CONTEXT,
        on_path + row * size, slot, task, turn, size, vocab, own_count, pair_count,
        ORDERS, BLOCK_T, ROUNDS,
    )  # fmt: skip
    claims, keys, kept, flags = own_claims, own_keys, own_rows, changed
    if table == ORDERS:
        claims, kept = shared_claims, shared_rows
    if table > ORDERS:
        claims, keys, kept, flags = pair_claims, pair_keys, pair_rows, pair_changed
    node, rank = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    cells = (node < size)[:, None] & (rank < k)[None, :]
    new = tl.load(candidates + (row * size + node)[:, None] * k + rank[None, :], mask=cells)
    wanted = priority >= 0
    won = wanted & (tl.load(claims + place, mask=wanted, other=-1) == priority)
    cells = won[:, None] & (rank < k)[None, :]
    tl.store(kept + place[:, None] * k + rank[None, :], new.to(tl.int32), mask=cells)
    if table != ORDERS:
        tl.store(keys + place, key, mask=won)
    if table >= ORDERS:
        tl.store(flags + place, won, mask=won)
    # Only the winner takes it away: to the others it stays a claim of somebody else.
    tl.store(claims + place, -1, mask=won)


def learn(
    matrix: Matrix,
    slots: Slots,
    rows: Tensor,
    tokens: Tensor,
    parents: Tensor,
    contexts: Tensor,
    candidates: Tensor,
    on_path: Tensor,
) -> None:
    """Recycle every node's candidates; rows whose root is not on their path did not run.

    Args:
        matrix: changed.
        slots: whose task and turn.
        rows: [B] the slot of each row, -1 for padding; no slot twice.
        tokens: [B, T] drafted, the root first and parents before children, -1 where there is none.
        parents: [B, T] of each node; the rows may be one and the same, expanded.
        contexts: [B, T, 3] each node's last tokens along its own path, newest first.
        candidates: [B, T, k] likeliest next tokens at each node, likeliest first.
        on_path: [B, T] bool nodes whose tokens were accepted, the root included.
    """
    batch, size = tokens.shape
    assert size <= MOST_NODES, f"a tree of {size} nodes; at most {MOST_NODES} have a priority"
    assert size == 1 or parents.stride(1) == 1, "a row's parents must be adjacent"
    together = (tokens, contexts, candidates, on_path)
    assert all(tensor.is_contiguous() for tensor in together), "a row's nodes must be adjacent"
    own_count, pair_count, k = matrix.keys.shape[2], matrix.pair_keys.shape[1], matrix.candidates
    nodes = (tokens, parents, contexts, on_path)
    whose = (rows, slots.tasks, slots.turns)
    claims = (matrix.claims, matrix.shared_claims, matrix.pair_claims)
    sizes = (parents.stride(0), size, matrix.vocab_size, own_count, pair_count)
    block = triton.next_power_of_2(size)
    options = {
        "ORDERS": matrix.orders, "BLOCK_T": block, "ROUNDS": block.bit_length() - 1,
        "num_warps": min(8, max(1, block // _NODES_A_WARP)),
    }  # fmt: skip
    grid = (batch, matrix.orders + (TASK_ORDERS if pair_count else 1))
    _claim[grid](*nodes, *whose, *claims, *sizes, **options)
    _write[grid](
        *nodes, candidates, *whose, *claims, matrix.keys, matrix.pair_keys,
        matrix.rows, matrix.shared, matrix.pair_rows, matrix.changed, matrix.pair_changed,
        *sizes, k, BLOCK_K=triton.next_power_of_2(k), **options,
    )  # fmt: skip
