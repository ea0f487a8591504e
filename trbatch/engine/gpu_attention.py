"""Attention of a step by one kernel for all sequences; the plan that holds what it reads.

The twin of `attention.StepPlan`, which goes over the sequences one by one with torch's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.attention import Span
from trbatch.engine.kernels.attention import WORD, Layout
from trbatch.engine.kernels.operators import paged_attention
from trbatch.engine.kv_cache import KVCache
from trbatch.engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """What every layer needs to know about one forward. Made once a step, not once a layer."""

    cache: KVCache
    layout: Layout

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See `attention.StepPlan.attend`."""
        stack, place = self.cache.place(layer)
        at = self.layout
        out: Tensor = paged_attention(
            query, key, value, stack, place, at.starts, at.committed, at.pages, at.positions,
            at.ancestors, at.longest, at.page_size, scale, window or 0, softcap or 0.0,
        )  # fmt: skip
        return out


def plan_of(cache: KVCache, spans: Sequence[Span]) -> PagedPlan:
    """The plan of one forward over `spans`."""
    device = spans[0].positions.device
    lengths = [span.length for span in spans]
    most = max(len(span.room.pages) for span in spans)
    pages = [[*span.room.pages, *[0] * (most - len(span.room.pages))] for span in spans]
    # One copy to the device for all that the host knows.
    numbers = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    numbers += [span.committed for span in spans]
    numbers += [page for row in pages for page in row]
    known = to_device(numbers, device, torch.int32)
    starts, committed, table = known.split([len(spans) + 1, len(spans), len(spans) * most])
    return PagedPlan(
        cache,
        Layout(
            starts=starts,
            committed=committed,
            pages=table.view(len(spans), most),
            positions=torch.cat([span.positions for span in spans]).to(torch.int32),
            ancestors=None if all(span.causal for span in spans) else _ancestors(spans),
            longest=max(lengths),
            page_size=cache.page_size,
        ),
    )


def pack_bits(seen: Tensor) -> Tensor:
    """[..., T] bool -> [..., ceil(T / 64)] int64, bit j % 64 of word j // 64 for place j."""
    padded = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % WORD))
    shifts = torch.arange(WORD, device=seen.device)
    words = padded.view(*padded.shape[:-1], -1, WORD)
    return (words.to(torch.int64) << shifts).sum(-1)


def _ancestors(spans: Sequence[Span]) -> Tensor:
    """[N, W] int64: who sees whom, of all spans."""
    width = -(-max(span.length for span in spans) // WORD)
    parts = []
    for span in spans:
        inner = span.inner
        if inner is None:
            inner = torch.ones(1, 1, dtype=torch.bool, device=span.positions.device)
        words = pack_bits(inner)
        parts.append(torch.nn.functional.pad(words, (0, width - words.shape[1])))
    return torch.cat(parts)
