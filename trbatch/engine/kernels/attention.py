"""Attention of a step's tokens over the paged cache, which also stores their keys and values.

One program takes a block of rows: the nodes of one sequence times the query heads of one K/V head
(they read the same keys). It goes over the sequence's committed tokens, page by page, and then over
the tokens in flight. Those are read from where the model has just put them and not from the cache,
so that no launch has to come between writing them and reading them. With little to do, several
programs share a block of rows, each with its part of the keys, and a second kernel joins what they
found. The slow twin is `reference.attend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine.kernels.launch import Launch, chip_of, choose_launch

WORD = 64  # tokens in one word of an ancestor mask
_WORD = tl.constexpr(WORD)
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the new tokens of B sequences lie and whom they see: the same for all layers."""

    starts: Tensor  # [B + 1] int32: sequence b has tokens starts[b] to starts[b + 1]
    committed: Tensor  # [B] int32 tokens that each has in the cache; its new ones follow them there
    pages: Tensor  # [B, P] int32 each sequence's pages
    positions: Tensor  # [N] int32 of the new tokens; a committed one's is its index
    # [N, W] int64: bit j % 64 of word j // 64 is set where a token sees new token j of its
    # sequence. None where each sees itself and those before it.
    ancestors: Tensor | None
    longest: int  # no sequence has more new tokens
    page_size: int

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.pages.shape[0]


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """tanh, also near 0 exact to float32: a series there, since exponentials would cancel."""
    shrunk = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
    far = (1.0 - shrunk) / (1.0 + shrunk)
    far = tl.where(x < 0, -far, far)
    y = x * x
    series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    return tl.where(y < 0.09, x * series, far)


@triton.jit
def _absorb(
    acc: tl.tensor, top: tl.tensor, total: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor,
    seen: tl.tensor, scale: tl.tensor,
    SOFTCAP: tl.constexpr, OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One more block of keys into the running softmax; scores are kept times log2(e).

    acc [M, D] the weighted sum of values, top [M] the highest score, total [M] the sum of weights;
    q [M, D], k and v [N, D], seen [M, N].
    """
    scores = tl.dot(q, tl.trans(k.to(OPERANDS)), input_precision=PRECISION)
    if SOFTCAP > 0:
        scores = _tanh(scores * (scale / SOFTCAP)) * (SOFTCAP * _LOG2_E)
    else:
        scores = scores * (scale * _LOG2_E)
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet: -inf less -inf would be NaN.
    level = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - level[:, None])
    shrink = tl.exp2(top - level)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(OPERANDS), v.to(OPERANDS), acc, input_precision=PRECISION)
    return acc, higher, total


@triton.jit
def _over_committed(
    acc: tl.tensor, top: tl.tensor, total: tl.tensor, q: tl.tensor, place: tl.tensor,
    scale: tl.tensor, keys: tl.tensor, values: tl.tensor, pages: tl.tensor, committed: tl.tensor,
    first: tl.tensor, stop: tl.tensor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Blocks `first` to `stop` of the committed tokens. A token's position is its index.

    place [M] the rows' positions; keys and values [slots, DIM] of one head; pages of one sequence.
    """
    d, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    index = first * BLOCK_N + lane
    page = tl.load(pages + index // PAGE, mask=index < committed, other=0)
    for block in range(first, stop):
        index = block * BLOCK_N + lane
        inside = index < committed
        slot = page * PAGE + index % PAGE
        # The next block's pages, a turn ahead: if a turn's keys waited for a load of the same turn,
        # Triton (3.6) would copy them only when the block before them is done.
        later = index + BLOCK_N
        page = tl.load(pages + later // PAGE, mask=later < committed, other=0)
        at = slot[:, None] * DIM + d[None, :]
        there = inside[:, None] & (d[None, :] < DIM)
        k = tl.load(keys + at, mask=there, other=0.0)
        v = tl.load(values + at, mask=there, other=0.0)
        seen = inside[None, :]
        if WINDOW > 0:
            seen = seen & (index[None, :] > place[:, None] - WINDOW)
        acc, top, total = _absorb(
            acc, top, total, q, k, v, seen, scale, SOFTCAP, OPERANDS, PRECISION
        )
    return acc, top, total


@triton.jit
def _over_flight(
    acc: tl.tensor, top: tl.tensor, total: tl.tensor, q: tl.tensor, place: tl.tensor,
    scale: tl.tensor, node: tl.tensor, keys: tl.tensor, values: tl.tensor, positions: tl.tensor,
    ancestors: tl.tensor, key_token: tl.tensor, value_token: tl.tensor, words: tl.tensor,
    length: tl.tensor, first: tl.tensor, stop: tl.tensor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Blocks `first` to `stop` of the tokens in flight; the pointers are at the sequence's first.

    node [M] which of these tokens each row belongs to.
    """
    d = tl.arange(0, BLOCK_D)
    for block in range(first, stop):
        index = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = index < length
        there = inside[:, None] & (d[None, :] < DIM)
        k = tl.load(keys + index[:, None] * key_token + d[None, :], mask=there, other=0.0)
        v = tl.load(values + index[:, None] * value_token + d[None, :], mask=there, other=0.0)
        if CAUSAL:
            seen = inside[None, :] & (index[None, :] <= node[:, None])
        else:
            # One word a row holds the bits of all of this block's tokens.
            word = tl.load(
                ancestors + node * words + block * BLOCK_N // _WORD, mask=node < length, other=0
            )
            bits = (word[:, None] >> (index % _WORD)[None, :].to(tl.int64)) & 1
            seen = inside[None, :] & (bits != 0)
        if WINDOW > 0:
            other = tl.load(positions + index, mask=inside, other=0)
            seen = seen & (other[None, :] > place[:, None] - WINDOW)
        acc, top, total = _absorb(
            acc, top, total, q, k, v, seen, scale, SOFTCAP, OPERANDS, PRECISION
        )
    return acc, top, total


@triton.jit
def _store_new(
    new: tl.tensor, stride: tl.tensor, stored: tl.tensor, pages: tl.tensor,
    committed: tl.tensor, node: tl.tensor, owned: tl.tensor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
) -> None:  # fmt: skip
    """Write the keys or values of the owned nodes to their slots behind the committed tokens."""
    d = tl.arange(0, BLOCK_D)
    index = committed + node
    slot = tl.load(pages + index // PAGE, mask=owned, other=0) * PAGE + index % PAGE
    there = owned[:, None] & (d[None, :] < DIM)
    fresh = tl.load(new + node[:, None] * stride + d[None, :], mask=there, other=0.0)
    tl.store(stored + slot[:, None] * DIM + d[None, :], fresh, mask=there)


@triton.jit
def _blocks(
    place: tl.tensor, node: tl.tensor, committed: tl.tensor, length: tl.tensor, split: tl.tensor,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Which blocks of keys a program reads: of committed tokens, then of tokens in flight.

    Of all that any of its rows may see, its share among the programs of these rows.
    """
    skipped = 0
    if WINDOW > 0:
        skipped = tl.maximum(tl.min(place) - WINDOW + 1, 0) // BLOCK_N
    behind = tl.maximum(tl.cdiv(committed, BLOCK_N) - skipped, 0)
    reach = length
    if CAUSAL:
        reach = tl.minimum(length, tl.max(node) + 1)
    blocks = behind + tl.cdiv(reach, BLOCK_N)
    share = tl.cdiv(blocks, tl.num_programs(2))
    begin = split * share
    end = tl.minimum(begin + share, blocks)
    return (
        skipped + begin, skipped + tl.minimum(end, behind),
        tl.maximum(begin - behind, 0), tl.maximum(end - behind, 0),
    )  # fmt: skip


# What differs from step to step must not make another kernel of it.
@triton.jit(do_not_specialize=["tokens", "most_pages", "words"])
def _attend(
    query: tl.tensor,  # [HEADS, N, DIM]
    new_keys: tl.tensor, new_values: tl.tensor,  # [kv_heads, N, DIM]
    keys: tl.tensor, values: tl.tensor,  # [kv_heads, slots, DIM]
    out: tl.tensor,  # [N, HEADS, DIM]; if SPLIT float32 [splits, N, HEADS, DIM]
    levels: tl.tensor,  # [splits, N, HEADS] log2 of the sum of weights, float32
    starts: tl.tensor, committed: tl.tensor, pages: tl.tensor, positions: tl.tensor,
    ancestors: tl.tensor, scale: tl.tensor, tokens: tl.tensor,
    most_pages: tl.tensor, words: tl.tensor, query_head: tl.tensor, query_token: tl.tensor,  # steps
    key_head: tl.tensor, key_token: tl.tensor, value_head: tl.tensor, value_token: tl.tensor,
    cache_head: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
    OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    kv_head = (tl.program_id(1) % (HEADS // GROUP)).to(tl.int64)
    sequence, split = tl.program_id(1) // (HEADS // GROUP), tl.program_id(2)
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    if tl.program_id(0) * BLOCK_M >= length * GROUP:
        return
    before = tl.load(committed + sequence)
    pages += sequence * most_pages
    new_keys += kv_head * key_head + start * key_token
    new_values += kv_head * value_head + start * value_token
    keys, values = keys + kv_head * cache_head, values + kv_head * cache_head
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    node, head = row // GROUP, kv_head * GROUP + row % GROUP
    live = node < length
    if split == 0:
        owned = live & (row % GROUP == 0)
        _store_new(new_keys, key_token, keys, pages, before, node, owned, DIM, BLOCK_D, PAGE)
        _store_new(new_values, value_token, values, pages, before, node, owned, DIM, BLOCK_D, PAGE)
    d = tl.arange(0, BLOCK_D)
    there = live[:, None] & (d[None, :] < DIM)
    at = head[:, None] * query_head + (start + node)[:, None] * query_token + d[None, :]
    q = tl.load(query + at, mask=there, other=0.0).to(OPERANDS)
    place = tl.load(positions + start + node, mask=live, other=2147483647)
    first, stop, first_new, stop_new = _blocks(
        place, node, before, length, split, BLOCK_N, WINDOW, CAUSAL
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc, top, total = _over_committed(
        acc, top, total, q, place, scale, keys, values, pages, before, first, stop,
        DIM, BLOCK_D, BLOCK_N, PAGE, WINDOW, SOFTCAP, OPERANDS, PRECISION,
    )  # fmt: skip
    acc, top, total = _over_flight(
        acc, top, total, q, place, scale, node, new_keys, new_values, positions + start,
        ancestors + start * words, key_token, value_token, words, length, first_new, stop_new,
        DIM, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, CAUSAL, OPERANDS, PRECISION,
    )  # fmt: skip
    found = tl.where(total == 0, 1.0, total)  # 0 where this program has no key for a row
    acc = acc / found[:, None]
    to = (split * tokens + start + node).to(tl.int64) * HEADS + head
    tl.store(out + to[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=there)
    if SPLIT:
        tl.store(levels + to, top + tl.log2(found), mask=live)


@triton.jit(do_not_specialize=["rows", "splits"])
def _join(
    parts: tl.tensor, levels: tl.tensor, out: tl.tensor, rows: tl.tensor, splits: tl.tensor,
    BLOCK_S: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """One row (a token and a head) of `out` from what each split found for it."""
    row = tl.program_id(0)
    split, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    level = tl.load(levels + split * rows + row, mask=split < splits, other=float("-inf"))
    some = level > float("-inf")
    weight = tl.where(some, tl.exp2(level - tl.max(level, 0)), 0.0)
    at = (split * rows + row).to(tl.int64)[:, None] * DIM + d[None, :]
    part = tl.load(parts + at, mask=some[:, None] & (d[None, :] < DIM), other=0.0)
    joined = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * DIM + d, joined.to(out.dtype.element_ty), mask=d < DIM)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Layout,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    launch: Launch | None = None,
) -> Tensor:
    """Store this step's keys and values and attend over the cache.

    Args:
        query: [heads, N, dim] of B sequences' tokens, one sequence after the other.
        key, value: [kv_heads, N, dim] of the same tokens.
        keys, values: [kv_heads, slots, dim], one layer's cache; the tokens' own slots are written.
        window: a token sees this many positions, its own included; 0 for all.
        softcap: c in c·tanh(score / c); 0 for none.
        launch: None for one that suits the sizes.

    Returns:
        [N, heads, dim]; rows that belong to no sequence are undefined.
    """
    heads, count, dim = query.shape
    kv_heads, rows = key.shape[0], at.longest * (heads // key.shape[0])
    query, key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
    assert keys.is_contiguous() and values.is_contiguous(), "a layer's cache is one piece"
    launch = launch or choose_launch(
        keys.dtype, chip_of(query.device), dim=dim, rows=rows, pairs=at.batch * kv_heads,
        keys=at.pages.shape[1] * at.page_size,
    )  # fmt: skip
    out = query.new_empty(count, heads, dim)
    parts, levels = out, out
    if launch.splits > 1:
        parts = query.new_empty(launch.splits, count, heads, dim, dtype=torch.float32)
        levels = query.new_empty(launch.splits, count, heads, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(dim))
    bits = at.positions if at.ancestors is None else at.ancestors
    _attend[triton.cdiv(rows, launch.block_m), at.batch * kv_heads, launch.splits](
        query, key, value, keys, values, parts, levels, at.starts, at.committed, at.pages,
        at.positions, bits, scale, count, at.pages.stride(0), bits.stride(0), *query.stride()[:2],
        *key.stride()[:2], *value.stride()[:2], keys.stride(0), HEADS=heads,
        GROUP=heads // kv_heads, DIM=dim, BLOCK_D=block_d, BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n, SPLIT=launch.splits > 1, PAGE=at.page_size, WINDOW=window,
        SOFTCAP=softcap, CAUSAL=at.ancestors is None, **_arithmetic(keys.dtype),
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if launch.splits > 1:
        _join[(count * heads,)](
            parts, levels, out, count * heads, launch.splits,
            BLOCK_S=triton.next_power_of_2(launch.splits), DIM=dim, BLOCK_D=block_d,
            # More warps than a row's numbers fill would share out its parts, and have to exchange.
            num_warps=max(1, block_d // 128),
        )  # fmt: skip
    return out


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """What products are taken of; sums are float32 always."""
    if dtype == torch.float32 or triton.knobs.runtime.interpret:
        # Triton's interpreter cannot multiply bfloat16.
        return {"OPERANDS": tl.float32, "PRECISION": "ieee"}
    return {"OPERANDS": tl.bfloat16 if dtype == torch.bfloat16 else tl.float16, "PRECISION": "tf32"}
