"""`activation(gate) · up` of a product that holds both, with one launch.

The slow twin is what the MLPs of transformers do, in two or three launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # what the kernel can do
_BLOCK = 1024
_SILU = tl.constexpr(0)
_TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 · sqrt(2 / pi)


@triton.jit
def _gate(
    x: tl.tensor, out: tl.tensor, step: tl.tensor, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A block of one row: x [N, 2 * WIDTH], out [N, WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    x += row * step
    gate = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + WIDTH + column, mask=there, other=0.0).to(tl.float32)
    # Both are gate · sigmoid(z): (1 + tanh(y)) / 2 is sigmoid(2y).
    z = gate
    if ACTIVATION != _SILU:
        z = _TWICE_ROOT * (gate + 0.044715 * gate * gate * gate)
    # Beyond -80 nothing is left of it, and e^80 is still a float32.
    value = gate * tl.sigmoid(tl.maximum(z, -80.0)) * up
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=there)


def gate(x: Tensor, activation: str) -> Tensor:
    """`activation(gate) · up` in float32, rounded once.

    Args:
        x: [..., 2 I]: of each row the gate, then up.
        activation: one of `ACTIVATIONS`.

    Returns:
        [..., I], contiguous.
    """
    width = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    _gate[rows.shape[0], triton.cdiv(width, _BLOCK)](
        rows, out, rows.stride(0), WIDTH=width, ACTIVATION=ACTIVATIONS[activation], BLOCK=_BLOCK
    )
    return out
