"""Moving keys and values of accepted tokens, in all layers with one launch.

A step's tokens are written by the attention kernel itself. The slow twin is `KVCache.move`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LONGEST_PATH = 128  # tokens that one sequence can move; they go through a program's registers
_LANES = 4  # (layer, keys or values, head) that one program moves


@triton.jit
def _move(
    stack: tl.tensor,  # [lanes, slots, DIM]
    sources: tl.tensor, targets: tl.tensor,  # [B, most]
    lanes: tl.tensor, slots: tl.tensor, most: tl.tensor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """The path of one sequence in a few lanes."""
    place, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    at = tl.program_id(0) * most + place
    source = tl.load(sources + at, mask=place < most, other=-1)
    target = tl.load(targets + at, mask=place < most, other=-1)
    moves = (source >= 0) & (target >= 0) & (source != target)
    if tl.max(moves.to(tl.int32), 0) == 0:
        return
    for nth in tl.static_range(LANES):
        lane = tl.program_id(1) * LANES + nth
        there = (moves & (lane < lanes))[:, None] & (d < DIM)[None, :]
        head = stack + lane.to(tl.int64) * slots * DIM + d[None, :]
        moved = tl.load(head + source.to(tl.int64)[:, None] * DIM, mask=there, other=0.0)
        # A target may be another token's source: all warps must have read before any writes.
        tl.debug_barrier()
        tl.store(head + target.to(tl.int64)[:, None] * DIM, moved, mask=there)


def move_paths(stack: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy slots to slots in every layer; of each sequence all are read before any is written.

    Args:
        stack: [layers, 2, kv_heads, slots, dim], adjacent.
        sources, targets: [B, P] slots, -1 where there is none; no slot of one sequence occurs in
            another.
    """
    assert stack.is_contiguous(), "the cache is one piece"
    batch, most = sources.shape
    assert most <= LONGEST_PATH, f"a path of {most} tokens; at most {LONGEST_PATH} can be moved"
    slots, dim = stack.shape[3:]
    lanes = stack.numel() // (slots * dim)
    sources, targets = sources.contiguous(), targets.contiguous()
    _move[batch, triton.cdiv(lanes, _LANES)](
        stack, sources, targets, lanes, slots, most, DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim), BLOCK_P=triton.next_power_of_2(most), LANES=_LANES,
    )  # fmt: skip
