"""How many nodes now: as many as give the most tokens a second on this machine.

    n* = argmax over n of (B + sum of the n largest chances) / seconds(B sequences, B + n tokens)

Chances are calibrated while decoding (`best_first`), seconds come from a table timed at the start
and corrected by every real step. n = 0 is plain decoding, and when it stays the best for long,
drafting and learning are left out too and only tried again now and then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from trbatch.engine.costs import TIMED_SIZES, CostTable

_PLAIN_EVERY = 256  # steps between plain ones that keep the baseline honest (0.4 %)
_HOPELESS = 32  # steps without a node worth drafting, after which drafting rests
_REST = 16  # plain steps between two tries then
_STEP = 0.08  # weight of the newest step in a correction
# A drafted token is worth more than itself: whatever it finds is recycled (docs/performance.md).
_WORTH = 1.15


class Budget:
    """Chooses the nodes of each step and knows what a plain step would have cost.

    Args:
        costs: the timed table.
        most: nodes and root of one sequence, at most.
    """

    def __init__(self, costs: CostTable, *, most: int) -> None:
        self._costs, self._most = costs, most
        self._correction: dict[int, float] = {}  # kind of step -> measured over expected seconds
        self._steps = self._misses = self._pause = 0
        self.chosen: dict[int, int] = {}  # tokens a sequence, rounded -> steps

    def wants_draft(self) -> bool:
        """Whether this step should look for drafts at all."""
        self._steps += 1
        if self._steps % _PLAIN_EVERY == 0:
            return False
        if self._pause > 0:
            self._pause -= 1
            return False
        return True

    def least_chance(self, batch: int, context: float) -> float:
        """The chance below which no node of any sequence can pay for itself."""
        plain = self._seconds(batch, 1.0, context)
        slope = self._seconds(batch, 1 + 8 / batch, context) - plain
        return min(0.5, max(0.01, 0.5 * slope / 8 / (plain / batch) / _WORTH))

    def choose(self, batch: int, context: float, chances: Sequence[float]) -> int:
        """How many nodes to verify in all.

        Args:
            batch: sequences of the step.
            context: committed tokens of a sequence, on average.
            chances: of all candidates, falling.
        """
        best, best_rate, expected, taken = 0, batch / self._seconds(batch, 1.0, context), 0.0, 0
        for count in _grid(min(len(chances), batch * (self._most - 1))):
            expected += _WORTH * sum(chances[taken:count])
            taken = count
            rate = (batch + expected) / self._seconds(batch, 1 + count / batch, context)
            if rate > best_rate:
                best, best_rate = count, rate
        self._misses = 0 if best else self._misses + 1
        if self._misses >= _HOPELESS:
            self._pause = _REST
        return best

    def plain_seconds(self, batch: int, context: float) -> float:
        """What a plain step of this batch takes here."""
        return self._seconds(batch, 1.0, context)

    def count(self, tokens: int, batch: int, context: float, seconds: float) -> None:
        """Learn from a step that was made: its tokens in all and its time."""
        size = tokens / batch
        rounded = round(size)
        self.chosen[rounded] = self.chosen.get(rounded, 0) + 1
        ratio = seconds / self._costs.seconds(batch, size, context)
        kind = _kind(size)
        old = self._correction.get(kind, ratio)
        # A step that something else disturbed counts as one and a half of the usual at most.
        self._correction[kind] = old + _STEP * (min(ratio, 1.5 * old) - old)

    def _seconds(self, batch: int, size: float, context: float) -> float:
        known = self._correction
        kind = _kind(size)
        if known and kind not in known:
            kind = min(known, key=lambda other: abs(other - kind))
        return known.get(kind, 1.0) * self._costs.seconds(batch, size, context)


def _kind(size: float) -> int:
    """Plain steps apart, the others by the timed size that they reach."""
    return 0 if size == 1.0 else bisect_left(TIMED_SIZES, size)


def _grid(most: int) -> list[int]:
    """Counts to try: every one up to 16, then a quarter more each time."""
    counts, count = [], 1
    while count <= most:
        counts.append(count)
        count += max(1, count // 16 * 4)
    return counts
