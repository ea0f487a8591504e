"""The kernels as operators that `torch.compile` leaves alone.

Each names the tensors that it changes. The cache comes as one whole stack and the number of a layer
in it, so that the compiler sees one tensor changed in place, not a view for each layer, and copies
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trbatch.engine.kernels.attention import Layout, attend


@torch.library.custom_op(
    "trbatch::paged_attention",
    mutates_args=("stack",),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor(a!) stack, int layer, Tensor starts, "
        "Tensor committed, Tensor pages, Tensor positions, Tensor? ancestors, int longest, "
        "int page_size, float scale, int window, float softcap) -> Tensor"
    ),
)
def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stack: Tensor,
    layer: int,
    starts: Tensor,
    committed: Tensor,
    pages: Tensor,
    positions: Tensor,
    ancestors: Tensor | None,
    longest: int,
    page_size: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Store this step's keys and values in `stack` and attend: see `kernels.attention.attend`.

    Args:
        stack: [layers, 2, kv_heads, slots, dim]; changed.
        layer: which of these.
    """
    layout = Layout(starts, committed, pages, positions, ancestors, longest, page_size)
    keys, values = stack[layer]
    return attend(
        query, key, value, keys, values, layout, scale=scale, window=window, softcap=softcap
    )


@paged_attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], query.shape[2])
