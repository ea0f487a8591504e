"""The highest of many numbers, falling, within one program: a bitonic network that keeps only them.

The numbers are int64, at least 0 and below 2**62, so that two of them can be added up.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exchange(
    x: tl.tensor, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Order all pairs of places STRIDE apart: falling in even blocks of BLOCK places, else rising.

    x: [SIZE] int64.
    """
    pairs = tl.reshape(x, [SIZE // (2 * STRIDE), 2, STRIDE])
    other = tl.sum(pairs, 1, keep_dims=True) - pairs
    group = tl.arange(0, SIZE // (2 * STRIDE))[:, None, None]
    rising = (group // (BLOCK // (2 * STRIDE))) % 2
    higher = tl.arange(0, 2)[None, :, None] == rising
    ordered = tl.where((pairs > other) == higher, pairs, other)
    return tl.reshape(ordered, [SIZE])


@triton.constexpr_function
def _log2(power: int) -> int:
    return power.bit_length() - 1


@triton.jit
def _merge(x: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Order blocks whose halves fall and rise, or rise and fall: even ones will fall, odd rise."""
    for nth in tl.static_range(_log2(BLOCK)):
        x = _exchange(x, SIZE, BLOCK >> (nth + 1), BLOCK)
    return x


@triton.jit
def highest(x: tl.tensor, SIZE: tl.constexpr, K: tl.constexpr) -> tl.tensor:
    """[K] the highest of [SIZE] numbers, falling. Powers of two, K ≤ SIZE."""
    for nth in tl.static_range(_log2(K)):
        x = _merge(x, SIZE, 2 << nth)
    # Blocks of K fall and rise by turns: place by place, the higher of two neighbours are the
    # highest K of both.
    for nth in tl.static_range(_log2(SIZE // K)):
        neighbours = tl.reshape(x, [(SIZE >> (nth + 1)) // K, 2, K])
        x = tl.reshape(tl.max(neighbours, 1), [SIZE >> (nth + 1)])
        x = _merge(x, SIZE >> (nth + 1), K)
    return x


@triton.jit
def insert(falling: tl.tensor, node: tl.tensor, W: tl.constexpr) -> tl.tensor:
    """One more number into [W] falling ones, whose lowest goes."""
    lane = tl.arange(0, W)
    higher = tl.sum((falling > node).to(tl.int32), 0)
    moved = tl.gather(falling, tl.maximum(lane - 1, 0), 0)
    return tl.where(lane < higher, falling, tl.where(lane == higher, node, moved))
