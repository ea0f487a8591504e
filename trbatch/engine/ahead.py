"""What the spines of a batch expect, as tensors: repeated passages laid over the rows.

The text itself is followed by `spine`; its expectations become the first candidates along one path
of the tree (`candidates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.spine import LONG, NO_TOKEN, Spine


@dataclass(frozen=True, slots=True)
class Ahead:
    """What the spines of B sequences expect.

    `tokens`: [B, D] the next ones, -1 where nothing is known; `matched`: [B] tokens of the match.
    """

    tokens: Tensor
    matched: Tensor

    def on_spine(self, path: Tensor) -> Tensor:
        """Which nodes of each sequence's accepted path stand on its spine.

        Args:
            path: [B, n] the tokens behind each node of the path (the root first), n ≤ D.

        Returns:
            [B, n] bool: every token that led to the node was the expected one.
        """
        agreed = (path == self.tokens[:, : path.shape[1]]) & (path >= 0)
        before = torch.ones_like(agreed[:, :1])
        return torch.cat([before, agreed[:, :-1]], dim=1).long().cumprod(1).bool()


def ahead_of(
    spines: Sequence[Spine],
    texts: Sequence[Sequence[int]],
    count: int,
    device: torch.device,
    forced: Sequence[Sequence[int]] | None = None,
) -> Ahead:
    """The next `count` tokens that B sequences' spines expect, after reading their texts.

    Args:
        forced: what must come next, as far as it is known; `count` tokens at most. It goes before
            what a spine expects, and is trusted as a long match.
    """
    tokens, matched = [], []
    for spine, text, must in zip(spines, texts, forced or [()] * len(texts), strict=True):
        spine.follow(text)
        expected, length = spine.ahead(text, count), spine.matched
        if must and expected[: len(must)] != list(must):
            expected, length = [*must, *[NO_TOKEN] * (count - len(must))], LONG
        tokens.append(expected)
        matched.append(length)
    return Ahead(torch.tensor(tokens, device=device), torch.tensor(matched, device=device))


def put_first(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows [n, k] with tokens [n] at rank 0; what stood before them moves down, the last falls."""
    there = rows == tokens[:, None]
    k = rows.shape[1]
    rank = torch.where(there.any(1), there.int().argmax(1), k)[:, None]
    place = torch.arange(k, device=rows.device)
    moved = rows.gather(1, torch.where(place <= rank, place - 1, place).clamp(min=0))
    moved[:, 0] = tokens
    return moved
