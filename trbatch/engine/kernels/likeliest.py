"""The likeliest tokens of logits [N, V], which are read once.

A first kernel keeps the maximum of each block of the vocabulary: all the work of a pass is the
reading. The k likeliest tokens lie in the k blocks of the highest maxima, so a second kernel, one
program a row, looks only at these again. A logit and its token are packed into one number there:
no two are equal, and their order is falling by logit and, of equal logits, the lowest token first.
The slow twins are in `trbatch.engine.likeliest`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(128)  # tokens
LOWEST = tl.constexpr(-(1 << 63))  # below all that are packed
_LAST = tl.constexpr((1 << 31) - 1)  # x ^ _LAST counts from the end


class Launch(NamedTuple):
    """How both kernels are cut."""

    blocks: int = 32  # of the vocabulary, in one program of the first
    warps: int = 4
    warps_to_choose: int = 8


@triton.jit
def packed(logit: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Numbers that rise with the logit and, of equal logits, fall with the index."""
    logit = tl.where(logit == 0, 0.0, logit.to(tl.float32))  # -0 is equal to 0
    bits = logit.to(tl.int32, bitcast=True)
    # Of negative floats the bits rise as the float falls.
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (index ^ _LAST).to(tl.int64)


@triton.jit
def index_of(packed: tl.tensor) -> tl.tensor:
    """The index in a packed number; of `LOWEST` the last there can be."""
    return (packed & _LAST) ^ _LAST


@triton.jit
def _highest(numbers: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """[K] the indices of the highest numbers, falling; of a missing one the last index."""
    rank = tl.arange(0, K)
    best = tl.full([K], LOWEST, dtype=tl.int64)
    for nth in tl.static_range(K):
        top = tl.max(numbers)
        best = tl.where(rank == nth, top, best)
        numbers = tl.where(numbers == top, LOWEST, numbers)
    return index_of(best)


@triton.jit
def _maxima(
    logits: tl.tensor,
    maxima: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    count: tl.tensor,
    BLOCKS: tl.constexpr,
) -> None:
    """maxima [N, count] float32 of each row's blocks."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    token = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    logit = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf"))
    highest = tl.max(logit.to(tl.float32), 1)
    tl.store(maxima + row * count + block, highest, mask=block < count)


@triton.jit
def _choose(
    logits: tl.tensor, maxima: tl.tensor, out: tl.tensor, stride: tl.tensor, vocab: tl.tensor,
    count: tl.tensor, wanted: tl.tensor, K: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """out [N, wanted]: the likeliest tokens of a row, from the blocks of the highest maxima."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COUNT)
    highest = tl.load(maxima + row * count + at, mask=at < count, other=0.0)
    block = _highest(tl.where(at < count, packed(highest, at), LOWEST), K)
    there = block < count
    token = tl.where(there, block, 0)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    there = there[:, None] & (token < vocab)
    logit = tl.load(logits + row * stride + token, mask=there, other=0.0)
    best = _highest(tl.where(there, packed(logit, token), LOWEST), K)
    rank = tl.arange(0, K)
    tl.store(out + row * wanted + rank, best, mask=rank < wanted)


def topk(logits: Tensor, k: int, *, launch: Launch | None = None) -> Tensor:
    """[N, k] int64: the likeliest tokens, falling, of equal logits the lowest first.

    Args:
        logits: [N, V] of any floating type, each row adjacent.
        k: at most V.
    """
    rows, vocab = logits.shape
    assert k <= vocab, f"{k} of {vocab} tokens asked for"
    assert logits.stride(1) == 1, "a row's logits must be adjacent"
    launch = launch or Launch()
    count = triton.cdiv(vocab, _BLOCK.value)
    maxima = torch.empty(rows, count, dtype=torch.float32, device=logits.device)
    out = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    _maxima[rows, triton.cdiv(count, launch.blocks)](
        logits, maxima, logits.stride(0), vocab, count, BLOCKS=launch.blocks,
        num_warps=launch.warps,
    )  # fmt: skip
    _choose[(rows,)](
        logits, maxima, out, logits.stride(0), vocab, count, k,
        K=triton.next_power_of_2(k), COUNT=triton.next_power_of_2(count),
        num_warps=launch.warps_to_choose,
    )  # fmt: skip
    return out


def argmax(logits: Tensor, *, launch: Launch | None = None) -> Tensor:
    """[N] int64: the likeliest token of each row of [N, V], of equal ones the lowest."""
    return topk(logits, 1, launch=launch)[:, 0]
