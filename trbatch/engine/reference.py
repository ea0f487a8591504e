"""The slow, plain twin of each fast path. Never changed for speed; the tests compare with it."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention as the textbook has it, in float32.

    Args:
        query: [heads, length, dim].
        keys, values: [kv_heads, total, dim]; each serves heads / kv_heads query heads in a row.
        bias: [length, total], added to the scores; None for zero.
        scale: what the scores are multiplied by.
        softcap: c in c·tanh(score / c), as Gemma 2 has it.

    Returns:
        [heads, length, dim] in the query's type.
    """
    group = query.shape[0] // keys.shape[0]
    k = keys.float().repeat_interleave(group, dim=0)
    v = values.float().repeat_interleave(group, dim=0)
    scores = query.float() @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.float()
    return (torch.softmax(scores, dim=-1) @ v).to(query.dtype)
