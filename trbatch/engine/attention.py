"""Attention over the paged cache, for any model that goes through transformers' interface.

`ATTENTION` is registered with `transformers.AttentionInterface`, and with no mask function: then
transformers makes no mask, and never looks at positions, for which the host would have to wait for
the device. The plan decides who sees whom. While a `StepPlan` is active,
every attention layer of the unmodified model writes the keys and values of this step's tokens to
the cache and attends over its own sequence: all committed tokens, and of the step's tokens those
that the plan's inner mask allows (ancestors in a tree, predecessors in a prompt).
The slow twin is `reference.attend`; it also serves soft-capped logits, which SDPA cannot do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from trbatch.engine import reference
from trbatch.engine.kv_cache import KVCache, Room

ATTENTION = "trbatch"
# Of what models hand to their attention: where tokens stand, which a plan knows itself, and what to
# keep or to give back beside the output.
_WITHOUT_EFFECT = {"position_ids", "cache_position", "is_causal", "use_cache"}
_active = threading.local()


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step.

    `committed` tokens are in its room already; this step's `length` tokens follow them there.
    `positions` [length] are theirs; `inner` [length, length] says who sees whom among them, None
    for a single token. `in_order`: each sees itself and all before it.
    """

    room: Room
    committed: int
    length: int
    positions: Tensor
    inner: Tensor | None
    in_order: bool = False

    @property
    def causal(self) -> bool:
        """Whether `inner` need not be asked."""
        return self.in_order or self.inner is None


class Plan(Protocol):
    """What every layer needs to know about one forward, and how it attends."""

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
        """Store this step's keys and values, and attend.

        Args:
            query: [heads, N, dim].
            key, value: [kv_heads, N, dim].

        Returns:
            [N, heads, dim].
        """
        ...


@dataclass(slots=True)
class StepPlan:
    """What every layer needs to know about one forward: its sequences and where they lie."""

    cache: KVCache
    spans: Sequence[Span]
    dtype: torch.dtype
    _slots: Tensor | None = None
    _biases: dict[tuple[int, int | None, int], Tensor | None] = field(default_factory=dict)

    def write(self, stored: Tensor, new: Tensor) -> None:
        """Write this step's keys or values [kv_heads, N, head_dim] where their tokens lie."""
        first = self.spans[0].room.first
        if len(self.spans) == 1 and first is not None:
            start = first + self.spans[0].committed
            stored[:, start : start + new.shape[1]] = new
            return
        if self._slots is None:
            parts = [s.room.slots[s.committed : s.committed + s.length] for s in self.spans]
            self._slots = torch.cat(parts)
        stored.index_copy_(1, self._slots, new)

    def bias(self, index: int, window: int | None, group: int) -> Tensor | None:
        """Additive mask [group * length, committed + length] of a span, None where all is seen.

        The same for all layers of one window, so it is built once; repeated for each query head
        of a group because those are folded into the query's length.
        """
        key = (index, window, group)
        if key not in self._biases:
            bias = _bias(self.spans[index], window, self.dtype)
            self._biases[key] = bias if bias is None else bias.repeat(group, 1)
        return self._biases[key]

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
        """Store this step's keys and values, and attend, sequence after sequence."""
        keys, values = self.cache.layer(layer)
        self.write(keys, key)
        self.write(values, value)
        # Soft-capped scores take the slow path, which repeats keys instead of folding queries.
        group = 1 if softcap is not None else query.shape[0] // key.shape[0]
        parts, start = [], 0
        for index, span in enumerate(self.spans):
            stop = start + span.length
            bias = self.bias(index, window, group)
            part = query[:, start:stop]
            parts.append(_attend_span(part, keys, values, span, bias, scale, softcap))
            start = stop
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out.transpose(0, 1)


@dataclass(slots=True)
class ShapeProbe:
    """Stands in for a plan while one token runs alone, to learn each layer's K/V shape."""

    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)  # layer -> (kv_heads, dim)


def _bias(span: Span, window: int | None, dtype: torch.dtype) -> Tensor | None:
    positions = span.positions
    if window is not None and int(positions.max()) < window:
        window = None
    if span.inner is None and window is None:
        return None
    total = span.committed + span.length
    seen = torch.ones(span.length, total, dtype=torch.bool, device=positions.device)
    if span.inner is not None:
        seen[:, span.committed :] = span.inner
    if window is not None:
        # By position, not by slot: two nodes of one depth share a position.
        committed = torch.arange(span.committed, device=positions.device)
        keys = torch.cat([committed, positions])
        seen &= keys[None, :] > positions[:, None] - window
    bias = torch.zeros(seen.shape, dtype=dtype, device=positions.device)
    return bias.masked_fill_(~seen, torch.finfo(dtype).min)


@contextlib.contextmanager
def active(plan: Plan | ShapeProbe) -> Iterator[None]:
    """Let the attention layers that run in this thread use `plan`."""
    _active.plan = plan
    try:
        yield
    finally:
        del _active.plan


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention over the active plan's cache.

    Args:
        query: [1, heads, N, head_dim], the step's tokens one sequence after the other.
        key, value: [1, kv_heads, N, head_dim] of the same tokens.
        others: whatever else the model hands over; the probe has seen that none of it matters.

    Returns:
        [1, N, heads, head_dim], contiguous as some models need it, and no attention weights.
    """
    plan: Plan | ShapeProbe = _active.plan
    layer: Any = module.layer_idx
    if isinstance(plan, ShapeProbe):
        _refuse(module, others)
        return _probe(plan, layer, query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = plan.attend(
        layer, query[0], key[0], value[0], scale=scale, window=sliding_window, softcap=softcap
    )
    return out[None].contiguous(), None


def _refuse(module: nn.Module, others: Mapping[str, Any]) -> None:
    """Raise TypeError for attention that would be another if it were computed as ours is.

    Sinks, biases and selected blocks come as arguments that transformers' own functions know.
    """
    if not (getattr(module, "is_causal", True) and others.get("is_causal", True)):
        raise TypeError("its attention looks both ways")
    given = {name for name, value in others.items() if value is not None and value is not False}
    if unknown := sorted(given - _WITHOUT_EFFECT):
        raise TypeError(f"its attention takes {', '.join(unknown)}")


def _probe(
    probe: ShapeProbe, layer: int, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, None]:
    """A token that sees only itself: its attention is its own value."""
    if layer in probe.shapes or key.shape != value.shape:
        raise TypeError("its keys and values differ in shape, or layers share them")
    probe.shapes[layer] = (key.shape[1], key.shape[3])
    group = query.shape[1] // key.shape[1]
    return value.repeat_interleave(group, dim=1).transpose(1, 2), None


def _attend_span(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    span: Span,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of one sequence: query [heads, length, dim] -> [heads, length, dim]."""
    total = span.committed + span.length
    if span.room.first is not None:
        visible = slice(span.room.first, span.room.first + total)
        k, v = keys[:, visible], values[:, visible]
    else:
        slots = span.room.slots[:total]
        k, v = keys.index_select(1, slots), values.index_select(1, slots)
    if softcap is not None:
        return reference.attend(query, k, v, bias, scale, softcap)
    # The query heads of a group read the same keys: fold them into the query's length, so that
    # nothing is repeated.
    folded = query.reshape(k.shape[0], -1, query.shape[-1])
    out = functional.scaled_dot_product_attention(
        folded[None], k[None], v[None], attn_mask=bias, scale=scale
    )
    return out.reshape(query.shape[0], span.length, -1)


AttentionInterface.register(ATTENTION, attention_forward)
