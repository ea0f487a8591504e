"""Where a sequence's part of a step lies in its room, and who sees whom in it."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from trbatch.engine.attention import Span
from trbatch.engine.drafting import Draft
from trbatch.engine.sequence import Sequence


def of_prompt(sequence: Sequence, count: int) -> Span:
    """The next `count` tokens of a prompt: each sees those before it."""
    device = sequence.room.slots.device
    return Span(
        room=sequence.room,
        committed=sequence.cached,
        length=count,
        positions=torch.arange(sequence.cached, sequence.cached + count, device=device),
        inner=torch.ones(count, count, dtype=torch.bool, device=device).tril(),
        in_order=True,
    )


def of_trees(batch: ListLike[Sequence], drafted: Draft, positions: int) -> list[Span]:
    """Each sequence's tree behind its committed tokens: each node sees its ancestors.

    Args:
        positions: how many the model has. A node beyond the last one gets the last: whatever it
            says is cut, since no text grows so long.
    """
    spans = []
    for index, (sequence, size) in enumerate(zip(batch, drafted.sizes, strict=True)):
        committed = len(sequence.tokens) - 1  # the last one is the root
        spans.append(
            Span(
                room=sequence.room,
                committed=committed,
                length=size,
                positions=(drafted.depths[index, :size] + committed).clamp(max=positions - 1),
                inner=drafted.ancestors[index, :size, :size] if size > 1 else None,
            )
        )
    return spans


def moves(
    batch: ListLike[Sequence], paths: ListLike[ListLike[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """From which slots to which the accepted nodes' keys and values have to go.

    Args:
        batch: whose tokens were taken already; those that have ended need nothing.
        paths: of each the accepted nodes, the root first, -1 behind the last.
    """
    sources, targets = [], []
    for sequence, nodes in zip(batch, paths, strict=True):
        if sequence.finish_reason:
            continue
        accepted = [node for node in nodes[1:] if node >= 0]
        root = len(sequence.tokens) - 1 - len(accepted) - 1
        for place, node in enumerate(accepted, 1):
            if node != place:
                sources.append(sequence.room.slots[root + node])
                targets.append(sequence.room.slots[root + place])
    return sources, targets
