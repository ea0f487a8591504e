"""Rotary positions of queries and keys with one launch.

A head's first R values turn in pairs: value i with value i + R / 2, or neighbours with each other.
The slow twin is any modeling file's `apply_rotary_pos_emb`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8  # of one token, in one program


@triton.jit
def _rotate_heads(
    source: tl.tensor, target: tl.tensor, cos: tl.tensor, sin: tl.tensor, block: tl.tensor,
    heads: tl.tensor, source_head: tl.tensor, target_head: tl.tensor,
    DIM: tl.constexpr, HALF: tl.constexpr, NEIGHBOURS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_H: tl.constexpr,
) -> None:  # fmt: skip
    """A few heads of one token, at which all pointers are; cos and sin [2 * HALF]."""
    head = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    turns = pair < HALF
    there = (head < heads) & turns
    if NEIGHBOURS:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, HALF + pair
    source += head.to(tl.int64) * source_head
    target += head * target_head
    low = tl.load(source + first, mask=there, other=0.0).to(tl.float32)
    high = tl.load(source + second, mask=there, other=0.0).to(tl.float32)
    low_cos = tl.load(cos + first, mask=turns, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + first, mask=turns, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + second, mask=turns, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + second, mask=turns, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + first, (low * low_cos - high * low_sin).to(kind), mask=there)
    tl.store(target + second, (high * high_cos + low * high_sin).to(kind), mask=there)
    if DIM > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        there = (head < heads) & (rest < DIM)
        tl.store(target + rest, tl.load(source + rest, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    query: tl.tensor, key: tl.tensor,  # [heads, N, DIM], [kv_heads, N, DIM] of any steps
    new_query: tl.tensor, new_key: tl.tensor,  # the same, contiguous
    cos: tl.tensor, sin: tl.tensor,  # [N, 2 * HALF]
    tokens: tl.tensor, query_head: tl.tensor, query_token: tl.tensor, key_head: tl.tensor,
    key_token: tl.tensor, cos_token: tl.tensor, sin_token: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    NEIGHBOURS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:  # fmt: skip
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * cos_token
    sin += token * sin_token
    step = tokens.to(tl.int64) * DIM
    blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H  # of the query's heads
    if block < blocks:
        _rotate_heads(
            query + token * query_token, new_query + token * DIM, cos, sin, block, HEADS,
            query_head, step, DIM, HALF, NEIGHBOURS, BLOCK_HALF, BLOCK_REST, BLOCK_H,
        )  # fmt: skip
    else:
        _rotate_heads(
            key + token * key_token, new_key + token * DIM, cos, sin, block - blocks, KV_HEADS,
            key_head, step, DIM, HALF, NEIGHBOURS, BLOCK_HALF, BLOCK_REST, BLOCK_H,
        )  # fmt: skip


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys with their positions in them, each value rounded once.

    Args:
        query: [1, heads, N, D] of any strides.
        key: [1, kv_heads, N, D].
        cos, sin: [1, N, R] of any floating type; R even and at most D, the rest stays as it is.
        neighbours: values 2i and 2i + 1 are a pair, else i and i + R / 2.

    Returns:
        Both in their own shapes and types, contiguous.
    """
    _, heads, tokens, dim = query.shape
    half = cos.shape[2] // 2
    assert key.shape[2:] == query.shape[2:] and 2 * half <= dim, "they turn by the same angles"
    query, key, cos, sin = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, cos, sin)
    )
    new_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    new_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    blocks = triton.cdiv(heads, _HEADS) + triton.cdiv(key.shape[1], _HEADS)
    _rotate[tokens, blocks](
        query, key, new_query, new_key, cos, sin, tokens, *query.stride()[1:3],
        *key.stride()[1:3], cos.stride(1), sin.stride(1), HEADS=heads, KV_HEADS=key.shape[1],
        DIM=dim, HALF=half, NEIGHBOURS=neighbours, BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(max(1, dim - 2 * half)), BLOCK_H=_HEADS,
    )  # fmt: skip
    return new_query, new_key
