"""The spine: a sequence that repeats a passage of its own text will probably go on repeating it.

Prompt lookup (Saxena 2023; also LLMA, Yang et al., arXiv 2304.04487) inside Token Recycling's tree:
the text that followed the earlier passage is put first in the rows along one path, and how far it
can be trusted is calibrated like any other origin of candidates. A pointer into the text is kept as
long as the text keeps to it, so a long match is not given up for a newer short one.
"""

from __future__ import annotations

from collections.abc import Sequence

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
