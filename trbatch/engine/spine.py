"""The spine: a sequence that repeats a passage of its own text will probably go on repeating it.

Prompt lookup (Saxena 2023; also LLMA, Yang et al., arXiv 2304.04487) inside Token Recycling's tree:
the text that followed the earlier passage is put first in the rows along one path, and how far it
can be trusted is calibrated like any other origin of candidates. A pointer into the text is kept as
long as the text keeps to it, so a long match is not given up for a newer short one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.calibration import SPINE

MATCH = 4  # tokens that must repeat before a passage counts as repeated
LONG = 8  # tokens repeated, from which on the passage is trusted as a long one
NO_TOKEN = -1


class Spine:
    """Where in its own text a sequence seems to be."""

    __slots__ = ("_ends", "_read", "_source", "matched")

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # passage -> place behind its last occurrence
        self._read = 0
        self._source = -1  # the place whose token is expected next; -1: none
        self.matched = 0  # tokens before that place that agree with the text's last ones, at least

    def follow(self, tokens: Sequence[int]) -> None:
        """Read what was appended to the text since the last time.

        Args:
            tokens: the whole text.
        """
        for end in range(self._read + 1, len(tokens) + 1):
            if self._source >= 0 and tokens[self._source] == tokens[end - 1]:
                self._source += 1
                self.matched += 1
            else:
                self._source = -1
            if end < MATCH:
                continue
            passage = tuple(tokens[end - MATCH : end])
            if self._source < 0:
                self._source = self._ends.get(passage, -1)
                self.matched = MATCH if self._source >= 0 else 0
            self._ends[passage] = end
        self._read = len(tokens)

    def ahead(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that should come next, -1 where nothing is known."""
        known = list(tokens[self._source : self._source + count]) if self._source >= 0 else []
        return known + [NO_TOKEN] * (count - len(known))


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
