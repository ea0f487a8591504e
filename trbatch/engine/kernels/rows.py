"""What may come at the places of one sequence: jit functions that `draft` and `calibrate` share.

All rows that a place might have are read at once, whether their keys agree or not: one look into
memory instead of six. Reading them and choosing among them are two functions, so that a caller can
put a branch in between: within one block of instructions the compiler puts every load off to where
it is used, and waits for each. The slow twins are `Matrix.find` and `candidates.of_rows`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine import candidates as cells
from trbatch.engine import matrix as origins
from trbatch.engine.kernels.keys import longer_key, place_of
from trbatch.engine.matrix import Matrix
from trbatch.engine.spine import LONG

_MODEL, _TASK = tl.constexpr(origins.MODEL), tl.constexpr(origins.TASK)
_TASK_PAIR, _OWN = tl.constexpr(origins.TASK_PAIR), tl.constexpr(origins.OWN)
_NOWHERE = tl.constexpr(origins.NOWHERE)
_NO_KEY = tl.constexpr(origins.NO_KEY)
_LONG = tl.constexpr(LONG)
_RANKS, _STEPS = tl.constexpr(cells.RANKS), tl.constexpr(cells.STEPS)
_PAIR_CELLS, _ROW_CELLS = tl.constexpr(cells.PAIR_CELLS), tl.constexpr(cells.ROW_CELLS)
_SPINE_CELLS = tl.constexpr(cells.SPINE_CELLS)
# Four bits for each rank in the second row, and behind them those of a token that it lacks.
_BEHIND = tl.constexpr(
    sum(step << 4 * rank for rank, step in enumerate((*cells.BEHIND, cells.ABSENT)))
)


def tables_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """The tables as kernels take them: own keys and rows, pairs', the task's, the model's."""
    return (
        matrix.keys, matrix.rows, matrix.pair_keys, matrix.pair_rows, matrix.shared, matrix.bigrams
    )  # fmt: skip


def sizes_of(matrix: Matrix) -> dict[str, int]:
    """What kernels are compiled for: the tables' sizes, which never change."""
    return {
        "ORDERS": matrix.orders,
        "OWN": matrix.keys.shape[2],
        "PAIRS": matrix.pair_keys.shape[1],
        "VOCAB": matrix.vocab_size,
        "COUNT": matrix.candidates,
        "K": triton.next_power_of_2(matrix.candidates),
    }


@triton.jit
def of_sequence(
    keys: tl.tensor, rows: tl.tensor, pair_keys: tl.tensor, pair_rows: tl.tensor,
    shared: tl.tensor, bigrams: tl.tensor, slot: tl.tensor, task: tl.tensor,
    ORDERS: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr, VOCAB: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The six tables from where this slot's and this task's parts begin."""
    own, pair = slot.to(tl.int64) * (ORDERS * OWN), task.to(tl.int64) * PAIRS
    dense = task.to(tl.int64) * VOCAB
    return (
        keys + own, rows + own * COUNT, pair_keys + pair, pair_rows + pair * COUNT,
        shared + dense * COUNT, bigrams,
    )  # fmt: skip


@triton.jit
def _row(
    rows: tl.tensor, place: tl.tensor, alive: tl.tensor, COUNT: tl.constexpr, K: tl.constexpr
) -> tl.tensor:
    """[N, K] the rows at `place` [N, 1], filled up with -1."""
    rank = tl.arange(0, K)[None, :]
    at = place.to(tl.int64) * COUNT + rank
    return tl.load(rows + at, mask=alive & (rank < COUNT), other=-1)


@triton.jit
def _hashed(
    keys: tl.tensor, rows: tl.tensor, key: tl.tensor, alive: tl.tensor,
    SIZE: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[N, K] what lies where these keys belong, and [N, 1] whether it is theirs."""
    place = place_of(key, SIZE)
    stored = tl.load(keys + place, mask=alive, other=_NO_KEY)
    return _row(rows, place, alive, COUNT, K), stored == key


@triton.jit
def _likeliest(row: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """[N, 1] the first candidates of rows [N, K]."""
    return tl.max(tl.where(tl.arange(0, K)[None, :] == 0, row, -1), 1, keep_dims=True)


@triton.jit
def _trust_more(
    found: tl.tensor, row: tl.tensor, there: tl.tensor, ORIGIN: tl.constexpr
) -> tl.tensor:
    """Put a more trusted row, where it is there, before the two found so far.

    found: the first row [N, K] and its origin [N, 1], the second and its own, and whether the
    first is one that counts.
    """
    first, origin, second, behind, known = found
    moves = there & known & (tl.max((row != first).to(tl.int32), 1, keep_dims=True) > 0)
    second = tl.where(moves, first, second)
    behind = tl.where(moves, origin, behind)
    first = tl.where(there, row, first)
    return first, tl.where(there, ORIGIN, origin), second, behind, known | there


@triton.jit
def read(
    tables: tl.tensor, newest: tl.tensor, older: tl.tensor, oldest: tl.tensor, alive: tl.tensor,
    ORDERS: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr, VOCAB: tl.constexpr,
    COUNT: tl.constexpr, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The six rows [N, K] that N places might have, and [N, 1] whether the hashed four are theirs.

    tables: as `of_sequence` gives them; newest, older, oldest: [N, 1] the places' last tokens;
    alive: [N, 1], the others get no rows. (Columns, because what belongs to a place is then where
    its row is.)
    """
    keys, rows, pair_keys, pair_rows, shared, bigrams = tables
    key = tl.where(alive, newest, 0).to(tl.int64)
    pair = longer_key(key, older, VOCAB)
    of_task = _row(shared, key, alive, COUNT, K)
    of_model = _row(bigrams, key, alive, COUNT, K)
    nothing = key < 0  # stands in for tables that are not there
    own_1, own_2, own_3, of_pair = of_model, of_model, of_model, of_model
    there_1, there_2, there_3, pair_there = nothing, nothing, nothing, nothing
    if ORDERS >= 1:
        own_1, there_1 = _hashed(keys, rows, key, alive, OWN, COUNT, K)
    if ORDERS >= 2:
        own_2, there_2 = _hashed(keys + OWN, rows + OWN * COUNT, pair, alive, OWN, COUNT, K)
    if ORDERS >= 3:
        own_3, there_3 = _hashed(
            keys + 2 * OWN, rows + 2 * OWN * COUNT, longer_key(pair, oldest, VOCAB), alive,
            OWN, COUNT, K,
        )  # fmt: skip
    if PAIRS > 0:
        of_pair, pair_there = _hashed(pair_keys, pair_rows, pair, alive, PAIRS, COUNT, K)
    return (
        of_model, of_task, of_pair, own_1, own_2, own_3, pair_there, there_1, there_2, there_3
    )  # fmt: skip


@triton.jit
def choose(
    might: tl.tensor, ORDERS: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr
) -> tl.tensor:
    """Of what `read` gives the two rows [N, K] of each place, each with its origin [N, 1]."""
    of_model, of_task, of_pair, own_1, own_2, own_3, pair_there, there_1, there_2, there_3 = might
    origin = tl.full(there_1.shape, _MODEL, tl.int32)
    behind = tl.full(there_1.shape, _NOWHERE, tl.int32)
    nothing = tl.full(of_model.shape, -1, tl.int32)
    # Rows of a single token are there if they have a first candidate.
    known = _likeliest(of_model, K) >= 0
    nearer = pair_there | there_1 | there_2 | there_3
    found = (of_model, origin, nothing, behind, known)
    counts = (_likeliest(of_task, K) >= 0) & ~(nearer & known)
    found = _trust_more(found, of_task, counts, _TASK)
    if PAIRS > 0:
        found = _trust_more(found, of_pair, pair_there, _TASK_PAIR)
    if ORDERS >= 1:
        found = _trust_more(found, own_1, there_1, _OWN)
    if ORDERS >= 2:
        found = _trust_more(found, own_2, there_2, _OWN + 1)
    if ORDERS >= 3:
        found = _trust_more(found, own_3, there_3, _OWN + 2)
    return found[0], found[1], found[2], found[3]


@triton.jit
def candidates(
    first: tl.tensor, origin: tl.tensor, second: tl.tensor, behind: tl.tensor,
    expected: tl.tensor, matched: tl.tensor, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What `choose` gives -> the first row's tokens and cells [N, K], what the second adds, alike,
    and the cell [N, 1] of the spine's token.

    expected, matched: [N, 1] the spine's token, -1 for none, and the length of the match before it.
    A token that is not there, or was named before, is -1.
    """
    rank = tl.arange(0, K)[None, :]
    same = (first[:, :, None] == second[:, None, :]) & (first >= 0)[:, :, None]
    place = tl.min(tl.where(same, rank[None, :, :], _RANKS), 2)  # in the second row
    step = (tl.full(place.shape, _BEHIND, tl.int64) >> (place * 4).to(tl.int64)) & 15
    base = (origin * (_NOWHERE + 1) + behind) * _PAIR_CELLS
    cell = base + rank * _STEPS + step.to(tl.int32)
    other_cell = base + (rank + _RANKS * _STEPS)
    other = tl.where(tl.max(same.to(tl.int32), 1) > 0, -1, second)
    # Not by `_likeliest`: where a matrix has few orders, Triton 3.6 fails to compile that.
    agrees = tl.max(((rank == 0) & (first == expected)).to(tl.int32), 1, keep_dims=True)
    kind = (matched >= _LONG).to(tl.int32) * 2 + (1 - agrees)
    spine = kind * _SPINE_CELLS + _ROW_CELLS
    there = expected >= 0
    cell = tl.where(there, spine + (rank + 1), cell)
    other_cell = tl.where(there, spine + (rank + 1 + _RANKS), other_cell)
    token = tl.where(there & (first == expected), -1, first)
    other = tl.where(there & (other == expected), -1, other)
    return token, cell, other, other_cell, spine
