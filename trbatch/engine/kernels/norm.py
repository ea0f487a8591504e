"""RMSNorm of rows that need not be adjacent: heads of a joined projection are not.

The slow twin is `torch.rms_norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 1024  # of one program: several short rows


# What differs from step to step must not make another kernel of it.
@triton.jit(do_not_specialize=["rows", "inner"])
def _rms_norm(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, rows: tl.tensor, inner: tl.tensor,
    outer_step: tl.tensor, inner_step: tl.tensor, eps: tl.tensor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """A few rows; row r lies at (r // inner, r % inner)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    there = (row < rows)[:, None] & (d < DIM)[None, :]
    at = (row // inner).to(tl.int64) * outer_step + (row % inner).to(tl.int64) * inner_step
    value = tl.load(x + at[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)
    factor = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    value = value * scale[:, None] * factor[None, :]
    to = out + row.to(tl.int64)[:, None] * DIM + d[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight`, rounded once.

    Args:
        x: [..., d].
        weight: [d] of any floating type.

    Returns:
        The shape and type of x, contiguous.
    """
    dim = x.shape[-1]
    # A view, where all but the last two sizes are one place after the other, as 1 always is.
    parts = x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:]) if x.dim() > 1 else x[None, None]
    if parts.stride(2) != 1:
        parts = parts.contiguous()
    outer, inner, _ = parts.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_d = triton.next_power_of_2(dim)
    block_r = max(1, _VALUES // block_d)
    _rms_norm[(triton.cdiv(outer * inner, block_r),)](
        parts, weight, out, outer * inner, inner, parts.stride(0), parts.stride(1), eps,
        DIM=dim, BLOCK_D=block_d, BLOCK_R=block_r, num_warps=8 if block_d > 2048 else 4,
    )  # fmt: skip
    return out
