"""Draft trees by calibrated chance: the whole search of a sequence in one program.

A node is one number: its chance in the highest bits (the bits of positive floats rise with them),
then where it stood among its level's candidates, counted from the end, then its token. So numbers
fall by chance and, of equal chances, in the candidates' order; no two are equal, and to be the
likeliest nodes is to be the highest numbers. All of a search fits into a program's registers. The
slow twins are `best_first.expand` with `take_likeliest` and `build`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine import best_first, candidates
from trbatch.engine.calibration import DEPTHS
from trbatch.engine.kernels import rows
from trbatch.engine.kernels.attention import WORD
from trbatch.engine.kernels.highest import highest, insert
from trbatch.engine.matrix import ORDERS, Matrix

_WORD = tl.constexpr(WORD)
_MAX_DEPTH = tl.constexpr(best_first.MAX_DEPTH)
_LEVELS = tl.constexpr(triton.next_power_of_2(best_first.MAX_DEPTH))
_ROUNDS = tl.constexpr((best_first.MAX_DEPTH - 1).bit_length())  # 2**rounds reach every ancestor
_WIDTH = tl.constexpr(candidates.WIDTH)  # candidates of a place
_CELLS, _DEPTHS = tl.constexpr(candidates.CELLS), tl.constexpr(DEPTHS)
_CONTEXT = tl.constexpr(ORDERS)
_TOKEN_BITS = tl.constexpr(22)
_TOKENS = tl.constexpr((1 << 22) - 1)
_LAST = tl.constexpr(1023)  # place of a level's last candidate, at most; x ^ _LAST: from the end
assert _LAST.value >= best_first.WIDEST * candidates.WIDTH - 1


@dataclass(frozen=True, slots=True)
class Trees:
    """Trees of B sequences, T nodes each; node 0 is the root, parents come first.

    A node that is not there has token -1, and sees itself and the root.
    """

    tokens: Tensor  # [B, T] int64
    parents: Tensor  # [B, T] int64, the root's is 0
    depths: Tensor  # [B, T] int64 edges from the root
    contexts: Tensor  # [B, T, 3] int64 last tokens along the path, newest first
    ancestors: Tensor  # [B, T, ceil(T / 64)] int64: bit j % 64 of word j // 64 for node j
    chances: Tensor  # [B, T] float32 that the whole path comes true; the root's is 1
    sizes: Tensor  # [B] int32 nodes that are there, the root included

    @classmethod
    def empty(cls, batch: int, size: int, device: torch.device) -> Trees:
        """Room for trees, to be filled again every step."""

        def room(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(batch, *shape, dtype=dtype, device=device)

        return cls(
            tokens=room(size), parents=room(size), depths=room(size),
            contexts=room(size, ORDERS), ancestors=room(size, -(-size // WORD)),
            chances=room(size, dtype=torch.float32), sizes=room(dtype=torch.int32),
        )  # fmt: skip


@triton.jit
def _pack(chance: tl.tensor, place: tl.tensor, token: tl.tensor) -> tl.tensor:
    """Nodes as numbers; 0 for one without a chance or a token."""
    bits = chance.to(tl.int32, bitcast=True).to(tl.int64) << 32
    packed = bits | ((place ^ _LAST).to(tl.int64) << _TOKEN_BITS) | token.to(tl.int64)
    return tl.where((chance > 0) & (token >= 0), packed, 0)


@triton.jit
def _chance(node: tl.tensor) -> tl.tensor:
    return (node >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _place(node: tl.tensor) -> tl.tensor:
    """Where it stood among its level's candidates; 0 for no node."""
    return tl.where(node > 0, ((node >> _TOKEN_BITS) & _LAST).to(tl.int32) ^ _LAST, 0)


@triton.jit
def _token(node: tl.tensor) -> tl.tensor:
    return (node & _TOKENS).to(tl.int32)


@triton.jit
def _read(
    tables: tl.tensor, nodes: tl.tensor, older: tl.tensor, oldest: tl.tensor,
    ORDERS: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr, VOCAB: tl.constexpr,
    COUNT: tl.constexpr, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What may come after W nodes, each with the tokens before it; see `rows.read`."""
    nodes = nodes[:, None]
    return rows.read(
        tables, _token(nodes), older[:, None], oldest[:, None], nodes > 0,
        ORDERS, OWN, PAIRS, VOCAB, COUNT, K,
    )  # fmt: skip


@triton.jit
def _children(
    might: tl.tensor, chances: tl.tensor, nodes: tl.tensor, expected: tl.tensor,
    matched: tl.tensor,
    W: tl.constexpr, ORDERS: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[W * 2K] the candidates of W nodes as nodes, and the spine's one (0: none).

    might: what `_read` gave; chances: of this task and depth by cell; nodes: [W] 0 where there is
    none; expected, matched: the spine's token and match here.
    """
    nodes = nodes[:, None]
    chance = _chance(nodes)
    first, origin, second, behind = rows.choose(might, ORDERS, PAIRS, K)
    # What the spine expects is the first candidate of the one node that it has led to.
    on_spine = (nodes > 0) & (_place(nodes) % _WIDTH == 0)
    follows = tl.where(on_spine, expected, -1)
    token, cell, other, other_cell, spine_cell = rows.candidates(
        first, origin, second, behind, follows, matched, K
    )
    each = tl.load(chances + cell, mask=token >= 0, other=0.0)
    other_each = tl.load(chances + other_cell, mask=other >= 0, other=0.0)
    spine_each = tl.load(chances + spine_cell, mask=follows >= 0, other=0.0)
    begin = tl.arange(0, W)[:, None] * _WIDTH
    place = begin + 1 + tl.arange(0, K)[None, :]
    found = tl.join(
        _pack(chance * each, place, token), _pack(chance * other_each, place + K, other)
    )
    spine = tl.max(_pack(chance * spine_each, begin, follows))
    return tl.reshape(found, [W * 2 * K]), spine


@triton.jit
def _search(
    tables: tl.tensor, chances: tl.tensor, root: tl.tensor, older: tl.tensor, oldest: tl.tensor,
    ahead: tl.tensor, matched: tl.tensor, going: tl.tensor, expectations: tl.tensor,
    wanted: tl.tensor, width: tl.tensor,
    W: tl.constexpr, ORDERS: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr,
    VOCAB: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[_LEVELS, W] the `width` likeliest nodes of each level, falling; 0 where there is none.

    root: [W] its token; older, oldest: [W] those before it.
    """
    lane, level = tl.arange(0, W), tl.arange(0, _LEVELS)[:, None]
    known = tl.zeros([_LEVELS, W], tl.int64)
    nodes = _pack(tl.where(lane == 0, 1.0, 0.0), tl.zeros([W], tl.int32), root)
    deepest = tl.minimum(wanted, _MAX_DEPTH)  # a tree of a few nodes is not deeper than these
    depth = 0
    while going:
        might = _read(tables, nodes, older, oldest, ORDERS, OWN, PAIRS, VOCAB, COUNT, K)
        expected = tl.load(ahead + depth, mask=depth < expectations, other=-1).to(tl.int32)
        going = expected < VOCAB
        # Always so, but it ends a block of instructions. Within one, the compiler would put every
        # load off to where its row is looked at, and wait for each in turn.
        if going:
            found, spine = _children(
                might, chances + tl.minimum(depth, _DEPTHS - 1) * _CELLS, nodes, expected,
                matched + depth, W, ORDERS, PAIRS, K,
            )  # fmt: skip
            best = tl.maximum(tl.max(found, 0), spine) >> 32
            # Deeper nodes are less likely: no more are needed if enough are as likely as these.
            rivals = tl.sum(((known >> 32) >= best).to(tl.int32))
            going = (best > 0) & (rivals < wanted)
            if going:
                kept = insert(highest(found, W * 2 * K, W), spine, W)
                kept = tl.where(lane < width, kept, 0)
                known = tl.where(level == depth, kept[None, :], known)
                parent = _place(kept) // _WIDTH
                oldest, older = tl.gather(older, parent, 0), tl.gather(_token(nodes), parent, 0)
                nodes = kept
                depth += 1
                going = depth < deepest
    return known


@triton.jit
def _take(nodes: tl.tensor, wanted: tl.tensor, C: tl.constexpr, MOST: tl.constexpr) -> tl.tensor:
    """[C] which of the nodes, level after level, are the `wanted` likeliest."""
    lane = tl.arange(0, C)
    # Within all nodes the first of equal ones goes first, whatever its place in its level.
    order = tl.where(nodes > 0, ((nodes >> 32) << 32) | (lane ^ (C - 1)).to(tl.int64), 0)
    taken = order > 0
    if MOST <= C:  # else all that can be found are wanted
        best = highest(order, C, MOST)
        last = tl.max(tl.where(tl.arange(0, MOST) == wanted - 1, best, 0), 0)
        taken = taken & (order >= last)
    return taken


@triton.jit
def _behind(column: tl.tensor, parent: tl.tensor, of_root: tl.tensor) -> tl.tensor:
    """[C] of each node what its parent has; parent: [C] index, negative for the root."""
    above = tl.gather(column, tl.maximum(parent, 0), 0)
    return tl.where(parent < 0, of_root, above)


@triton.jit
def _store_masks(
    ancestors: tl.tensor, taken: tl.tensor, place: tl.tensor, parent: tl.tensor,
    size: tl.tensor, total: tl.tensor,
    C: tl.constexpr, T: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """ancestors [total, WORDS] of one tree: what each node sees, the absent ones too.

    taken, place, parent: [C] of all nodes found; size: nodes that are there.
    """
    row = tl.arange(0, T)
    for word in tl.static_range(WORDS):
        itself = tl.full([C], 1, tl.int64) << (place % _WORD).to(tl.int64)
        bits = tl.where(place // _WORD == word, itself, 0)
        above = parent
        for _ in tl.static_range(_ROUNDS):  # each time twice as far up
            bits |= _behind(bits, above, 0)
            above = _behind(above, above, -1)
        root = 1 if word == 0 else 0
        tl.store(ancestors + place * WORDS + word, bits | root, mask=taken)
        itself = tl.full([T], 1, tl.int64) << (row % _WORD).to(tl.int64)
        bits = tl.where(row // _WORD == word, itself, 0) | root
        absent = (row == 0) | (row >= size)
        tl.store(ancestors + row * WORDS + word, bits, mask=absent & (row < total))


@triton.jit
def _store_column(
    column: tl.tensor, taken: tl.tensor, place: tl.tensor, values: tl.tensor,
    absent: tl.tensor, nothing: tl.tensor, of_root: tl.tensor,
    STEP: tl.constexpr, T: tl.constexpr,
) -> None:  # fmt: skip
    """One tree's column: the root's value, the taken nodes' and of the absent ones `nothing`."""
    row = tl.arange(0, T)
    tl.store(column + place * STEP, values, mask=taken)
    tl.store(column + row * STEP, tl.where(row == 0, of_root, nothing), mask=absent)


@triton.jit
def _build(
    known: tl.tensor, newest: tl.tensor, older: tl.tensor, oldest: tl.tensor,
    tokens: tl.tensor, parents: tl.tensor, depths: tl.tensor, contexts: tl.tensor,
    ancestors: tl.tensor, chances: tl.tensor, sizes: tl.tensor, total: tl.tensor,
    W: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """The tree of the total - 1 likeliest of the nodes found; the pointers are at its own part.

    known: [_LEVELS, W]; newest, older, oldest: the root's context.
    """
    C: tl.constexpr = _LEVELS * W
    nodes, lane, row = tl.reshape(known, [C]), tl.arange(0, C), tl.arange(0, T)
    taken = _take(nodes, total - 1, C, MOST)
    place = tl.cumsum(taken.to(tl.int32), 0)  # a taken node's index in its tree
    size = 1 + tl.sum(taken.to(tl.int32), 0)
    level = lane // W
    parent = tl.where(level == 0, -1, (level - 1) * W + _place(nodes) // _WIDTH)
    token = _token(nodes)
    before = _behind(token, parent, newest)
    absent = ((row == 0) | (row >= size)) & (row < total)
    _store_column(tokens, taken, place, token, absent, -1, newest, 1, T)
    _store_column(parents, taken, place, _behind(place, parent, 0), absent, 0, 0, 1, T)
    _store_column(depths, taken, place, level + 1, absent, 0, 0, 1, T)
    _store_column(contexts, taken, place, token, absent, -1, newest, _CONTEXT, T)
    _store_column(contexts + 1, taken, place, before, absent, -1, older, _CONTEXT, T)
    last = _behind(before, parent, older)
    _store_column(contexts + 2, taken, place, last, absent, -1, oldest, _CONTEXT, T)
    _store_column(chances, taken, place, _chance(nodes), absent, 0.0, 1.0, 1, T)
    _store_masks(ancestors, taken, place, parent, size, total, C, T, WORDS)
    tl.store(sizes, size)


@triton.jit(do_not_specialize=["expectations", "total", "width"])
def _draft(
    keys: tl.tensor, own_rows: tl.tensor, pair_keys: tl.tensor, pair_rows: tl.tensor,
    shared: tl.tensor, bigrams: tl.tensor,
    calibrated: tl.tensor,  # [tasks, _DEPTHS, _CELLS]
    last: tl.tensor,  # [B, 3]
    slots: tl.tensor, tasks: tl.tensor, active: tl.tensor, matched: tl.tensor,  # [B]
    ahead: tl.tensor,  # [B, expectations]
    tokens: tl.tensor, parents: tl.tensor, depths: tl.tensor, contexts: tl.tensor,
    ancestors: tl.tensor, chances: tl.tensor, sizes: tl.tensor,  # as in Trees
    expectations: tl.tensor, total: tl.tensor, width: tl.tensor,
    W: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr, WORDS: tl.constexpr,
    ORDERS: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr, VOCAB: tl.constexpr,
    COUNT: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    """The tree of one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    task = tl.load(tasks + sequence).to(tl.int64)
    tables = rows.of_sequence(
        keys, own_rows, pair_keys, pair_rows, shared, bigrams, tl.load(slots + sequence), task,
        ORDERS, OWN, PAIRS, VOCAB, COUNT,
    )  # fmt: skip
    newest = tl.load(last + sequence * _CONTEXT).to(tl.int32)
    older = tl.load(last + sequence * _CONTEXT + 1).to(tl.int32)
    oldest = tl.load(last + sequence * _CONTEXT + 2).to(tl.int32)
    nothing = tl.zeros([W], tl.int32)
    known = _search(
        tables, calibrated + task * (_DEPTHS * _CELLS), nothing + newest, nothing + older,
        nothing + oldest, ahead + sequence * expectations,
        tl.load(matched + sequence).to(tl.int32), tl.load(active + sequence) != 0, expectations,
        total - 1, width, W, ORDERS, OWN, PAIRS, VOCAB, COUNT, K,
    )  # fmt: skip
    at = sequence * total
    _build(
        known, newest, older, oldest, tokens + at, parents + at, depths + at,
        contexts + at * _CONTEXT, ancestors + at * WORDS, chances + at, sizes + sequence, total,
        W, T, MOST, WORDS,
    )  # fmt: skip


def draft(
    matrix: Matrix,
    calibrated: Tensor,
    last: Tensor,
    slots: Tensor,
    tasks: Tensor,
    active: Tensor,
    ahead: Tensor,
    matched: Tensor,
    out: Trees,
    *,
    width: int = best_first.WIDEST,
    warps: int = 0,
) -> None:
    """Fill `out` with the trees of B sequences, T - 1 nodes beside the root if there are as many.

    Nothing but tensors' contents may change between two replays of a captured launch. All tensors
    of indices and tokens hold whole numbers of any type.

    Args:
        calibrated: [tasks * PLACES] float32, `Calibration.chances`.
        last: [B, 3] last committed tokens, newest first, -1 before the start.
        slots, tasks: [B] whose rows; anything where a sequence is not active.
        active: [B] bool or integers; a sequence with 0 gets its root alone.
        ahead, matched: [B, D], [B] what the spines expect (`ahead.Ahead`), -1 for nothing.
        width: nodes kept a level while searching.
        warps: of one program; 0 for a number that suits the width.
    """
    batch, total = out.tokens.shape
    width = min(width, total - 1)
    assert 1 <= width <= best_first.WIDEST, "a tree has a root and more, a level at most 32 nodes"
    assert matrix.candidates <= candidates.RANKS and matrix.vocab_size <= _TOKENS.value
    assert calibrated.dtype == torch.float32 and last.shape == (batch, ORDERS)
    of_sequences = (last, slots, tasks, active, ahead, matched)
    assert all(len(t) == batch and t.is_contiguous() for t in of_sequences)
    lanes = max(2, triton.next_power_of_2(width))
    _draft[(batch,)](
        *rows.tables_of(matrix), calibrated, last, slots, tasks, active, matched, ahead,
        out.tokens, out.parents, out.depths, out.contexts, out.ancestors, out.chances, out.sizes,
        ahead.shape[1], total, width, W=lanes, T=triton.next_power_of_2(total),
        MOST=triton.next_power_of_2(total - 1), WORDS=out.ancestors.shape[2],
        **rows.sizes_of(matrix), num_warps=warps or max(1, lanes // 8),
    )  # fmt: skip
