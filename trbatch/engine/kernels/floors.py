"""The least likely token that top-k and top-p leave, found without sorting.

Logits are compared by the bits of their numbers, taken so that greater numbers have greater keys.
The least kept key is found four bits at a time: every pass adds up what lies above fifteen keys,
for each part of the vocabulary, and a second kernel chooses between them. First the number of
tokens decides (top-k), then, of those, their weight (top-p). Tokens of equal logits stay or go
together. The slow twin is `sampling.kept`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine.device_state import Slots

_PART = 2048  # tokens of the vocabulary in one program
_DIGIT = tl.constexpr(4)  # bits of a key that one pass finds
_WAYS = tl.constexpr(16)
_TOP_K, _TOP_P = 0, 1  # what decides


@triton.jit
def key_of(logit: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """int64 below 2 ** BITS; of equal logits the same, of a greater one a greater.

    BITS: 32, or 16 where all logits were bfloat16, whose lower bits are zeros.
    """
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 is 0
    unsigned = bits.to(tl.int64) & 0xFFFFFFFF
    key = tl.where(bits < 0, 0xFFFFFFFF - unsigned, unsigned + 0x80000000)
    return key >> (32 - BITS)


@triton.jit
def _limit(
    rows: tl.tensor, temperatures: tl.tensor, top_ks: tl.tensor, top_ps: tl.tensor,
    node: tl.tensor, size: tl.tensor, KIND: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Of a node's row: its temperature, and top-k or top-p; 0 where nothing is left out."""
    slot = tl.load(rows + node // size).to(tl.int64)
    temperature = tl.load(temperatures + slot, mask=slot >= 0, other=0.0)
    if KIND == 0:
        limit = tl.load(top_ks + slot, mask=slot >= 0, other=0).to(tl.float64)
    else:
        limit = tl.load(top_ps + slot, mask=slot >= 0, other=1.0).to(tl.float64)
        limit = tl.where(limit < 1.0, limit, 0.0)
    return temperature, tl.where(temperature > 0, limit, 0.0)


@triton.jit(do_not_specialize=["size", "shift"])
def _measure(
    logits: tl.tensor, likeliest: tl.tensor, rows: tl.tensor, temperatures: tl.tensor,
    top_ks: tl.tensor, top_ps: tl.tensor, floors: tl.tensor, found: tl.tensor, sums: tl.tensor,
    stride: tl.tensor, size: tl.tensor, vocab: tl.tensor, parts: tl.tensor, shift: tl.tensor,
    BITS: tl.constexpr, KIND: tl.constexpr, PART: tl.constexpr,
) -> None:  # fmt: skip
    """sums [N, parts, 16] float64: what lies above each of 15 keys, and all there is."""
    node, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, limit = _limit(rows, temperatures, top_ks, top_ps, node, size, KIND)
    if limit > 0:
        token = part * PART + tl.arange(0, PART)
        there = token < vocab
        logit = tl.load(logits + node * stride + token, mask=there, other=float("-inf"))
        logit = logit.to(tl.float32)
        key = key_of(logit, BITS)
        if KIND == 0:
            value = there.to(tl.float64)
        else:
            highest = tl.load(logits + node * stride + tl.load(likeliest + node)).to(tl.float32)
            value = tl.exp(logit / temperature - highest / temperature).to(tl.float64)
            value = tl.where(there & (key >= tl.load(floors + node)), value, 0.0)
        base, step = tl.load(found + node), tl.full((), 1, tl.int64) << shift
        out = sums + (node * parts + part) * _WAYS
        for way in tl.static_range(_WAYS - 1):
            above = key > base + (way + 1) * step - 1
            tl.store(out + way, tl.sum(tl.where(above, value, 0.0), 0))
        tl.store(out + _WAYS - 1, tl.sum(value, 0))


@triton.jit(do_not_specialize=["size", "shift"])
def _choose(
    rows: tl.tensor, temperatures: tl.tensor, top_ks: tl.tensor, top_ps: tl.tensor,
    found: tl.tensor, sums: tl.tensor, size: tl.tensor, parts: tl.tensor, shift: tl.tensor,
    KIND: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """found [N]: four more bits of the least key above which less than the limit lies."""
    node = tl.program_id(0).to(tl.int64)
    _, limit = _limit(rows, temperatures, top_ks, top_ps, node, size, KIND)
    if limit > 0:
        part, way = tl.arange(0, PARTS), tl.arange(0, _WAYS)
        at = (node * parts + part)[:, None] * _WAYS + way[None, :]
        above = tl.sum(tl.load(sums + at, mask=(part < parts)[:, None], other=0.0), 0)
        last = way == _WAYS - 1
        if KIND == 1:
            limit = limit * tl.sum(tl.where(last, above, 0.0), 0)
        digit = tl.sum(((above >= limit) & ~last).to(tl.int64), 0)
        tl.store(found + node, tl.load(found + node) + (digit << shift))


def floors(slots: Slots, rows: Tensor, logits: Tensor, likeliest: Tensor) -> Tensor:
    """Of each node the least key (`key_of`) that its row's top-k and top-p leave.

    Args:
        rows: [B] the slot of each row, -1 for padding.
        logits: [N, V] raw, of B times T nodes, each row adjacent.
        likeliest: [N] int64 the likeliest token of each.

    Returns:
        [N] int64; 0 where nothing is left out.
    """
    count, vocab = logits.shape
    parts, size, bits = triton.cdiv(vocab, _PART), count // len(rows), bits_of(logits)
    of_k, of_p = torch.zeros(2, count, dtype=torch.int64, device=logits.device)
    sums = torch.empty(count, parts, _WAYS.value, dtype=torch.float64, device=logits.device)
    whose = (rows, slots.temperatures, slots.top_ks, slots.top_ps)
    for kind, found in ((_TOP_K, of_k), (_TOP_P, of_p)):
        for shift in range(bits - _DIGIT.value, -1, -_DIGIT.value):
            _measure[count, parts](
                logits, likeliest, *whose, of_k, found, sums, logits.stride(0), size, vocab,
                parts, shift, BITS=bits, KIND=kind, PART=_PART, num_warps=4,
            )  # fmt: skip
            _choose[(count,)](
                *whose, found, sums, size, parts, shift, KIND=kind,
                PARTS=triton.next_power_of_2(parts), num_warps=4,
            )  # fmt: skip
    return torch.maximum(of_k, of_p)


def bits_of(logits: Tensor) -> int:
    """How many bits tell logits of this type apart."""
    return 16 if logits.dtype == torch.bfloat16 else 32
