"""What the spines of a batch expect, as tensors: repeated passages laid over the rows.

The text itself is followed by `spine`; here its expectations become the first candidates of the
rows along one path, with an origin of their own that is calibrated like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.calibration import SPINE
from trbatch.engine.spine import LONG, Spine


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
    spines: Sequence[Spine], texts: Sequence[Sequence[int]], count: int, device: torch.device
) -> Ahead:
    """The next `count` tokens that B sequences' spines expect, after reading their texts."""
    tokens = []
    for spine, text in zip(spines, texts, strict=True):
        spine.follow(text)
        tokens.append(spine.ahead(text, count))
    matched = [spine.matched for spine in spines]
    return Ahead(torch.tensor(tokens, device=device), torch.tensor(matched, device=device))


def origin_of(matched: int, agrees: bool) -> int:
    """Which kind of row a spine's is."""
    return SPINE + 2 * (matched >= LONG) + (not agrees)


def lay_over(
    rows: Tensor, origins: Tensor, expected: Tensor, matched: Tensor
) -> tuple[Tensor, Tensor]:
    """Put the spine's tokens first in their rows.

    Args:
        rows: [B, n, k] candidates.
        origins: [B, n] where they came from.
        expected: [B, n] the token that the spine expects after each place, -1 for none.
        matched: [B, n] or [B, 1], tokens of the match that leads there.

    Returns:
        Both with the spine in them.
    """
    there = expected >= 0
    agrees = rows[..., 0] == expected
    spine = SPINE + 2 * (matched >= LONG).long() + (~agrees).long()
    laid = put_first(expected.flatten(), rows.flatten(0, 1)).view_as(rows)
    return torch.where(there[..., None], laid, rows), torch.where(there, spine, origins)


def put_first(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows [n, k] with tokens [n] at rank 0; what stood before them moves down, the last falls."""
    longer = torch.cat([tokens[:, None], rows], dim=1)
    repeated = longer == tokens[:, None]
    repeated[:, 0] = False
    order = repeated.int().sort(dim=1, stable=True).indices
    return longer.gather(1, order)[:, : rows.shape[1]]
