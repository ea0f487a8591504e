"""What a step costs on this machine, by sequences and tokens: timed, not guessed."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import inf

TIMED_SIZES = (1, 2, 3, 4, 6, 8, 16, 32, 81)  # tokens a sequence; those between are interpolated
_MOST_LINES = 256  # kept


class CostTable:
    """Seconds of a step by (batch, T), piecewise linear between what was timed.

    Args:
        timed: (batch, T) -> seconds at `context` committed tokens a sequence.
        per_context: seconds that one more committed token of one sequence adds.
        most_tokens: of a step that memory suffices for; 0: nobody met its end.
    """

    def __init__(
        self,
        timed: Mapping[tuple[int, int], float],
        *,
        context: int,
        per_context: float,
        most_tokens: int = 0,
    ) -> None:
        assert timed, "time something first"
        self.most_tokens = most_tokens
        self.timed, self.context, self.per_context = dict(timed), context, per_context
        # Asked for many times a step: lines are laid through the points once.
        self._lines = {
            batch: _Line(sorted((t, s) for (b, t), s in timed.items() if b == batch))
            for batch in sorted({batch for batch, _ in timed})
        }
        self._by_size: dict[float, _Line] = {}

    def seconds(self, batch: int, size: float, context: float) -> float:
        """Expected seconds of a step of `size` tokens a sequence on average."""
        line = self._by_size.get(size)
        if line is None:
            if len(self._by_size) >= _MOST_LINES:
                self._by_size.clear()
            line = _Line([(b, other.at(size)) for b, other in self._lines.items()])
            self._by_size[size] = line
        extra = self.per_context * batch * (context - self.context)
        return max(1e-6, line.at(batch) + extra)

    def scaled(self, factor: float) -> CostTable:
        """The same on a machine where everything takes `factor` times as long."""
        timed = {cell: factor * seconds for cell, seconds in self.timed.items()}
        return CostTable(timed, context=self.context, per_context=factor * self.per_context)

    def up_to(self, tokens: int) -> CostTable:
        """The same where memory suffices for steps of so many tokens; 0: of any."""
        return CostTable(
            self.timed, context=self.context, per_context=self.per_context, most_tokens=tokens
        )


class _Line:
    """A line through points (x, y), x ascending; beyond the last as steep as the steepest piece."""

    __slots__ = ("_slope", "_x", "_y")

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self._x = [x for x, _ in points]
        self._y = [y for _, y in points]
        pieces = pairwise(points)
        self._slope = max(((b[1] - a[1]) / (b[0] - a[0]) for a, b in pieces), default=0.0)

    def at(self, x: float) -> float:
        """y at x."""
        xs, ys = self._x, self._y
        if len(xs) == 1:
            return ys[0]
        if x > xs[-1]:
            return ys[-1] + self._slope * (x - xs[-1])
        after = min(max(bisect_left(xs, x), 1), len(xs) - 1)
        left, right = after - 1, after
        slope = (ys[right] - ys[left]) / (xs[right] - xs[left])
        return ys[left] + slope * (x - xs[left])


def cells_of(
    batches: Sequence[int],
    sizes: Sequence[int],
    *,
    most_tokens: int,
    fits: Callable[[int, int], bool],
) -> list[tuple[int, int]]:
    """Which (batch, T) to time; the others are extrapolated.

    Args:
        sizes: T, ascending.
        most_tokens: of a step. The first two sizes of each batch are timed whatever they have:
            through one alone no line could be laid.
        fits: whether there are pages for such a step; if not for the first two, of a batch none
            is timed.
    """
    second = sizes[:2][-1]
    return [
        (batch, size)
        for batch in batches
        for size in sizes
        if size <= second or batch * size <= most_tokens
        if fits(batch, max(size, second))
    ]


def time_steps(
    run: Callable[[int, int, int], float], cells: Sequence[tuple[int, int]], *, context: int
) -> CostTable:
    """Time steps.

    Args:
        run: (batch, T, context) -> seconds of one such step; called a few times each. inf where
            memory does not suffice: such steps are extrapolated.
        cells: (batch, T) of these steps.
        context: committed tokens a sequence; a quarter of it gives the slope.
    """
    largest = max(batch for batch, _ in cells)
    short = (largest, 1, context // 4)
    least = least_seconds(run, [*((*cell, context) for cell in cells), short])
    done = {cell: least[*cell, context] for cell in cells if least[*cell, context] < inf}
    # A batch of one size alone would seem to take as long whatever its trees.
    sizes = Counter(batch for batch, _ in done)
    known = {cell: s for cell, s in done.items() if sizes[cell[0]] > 1}
    timed = rising(known or done)
    batch = max(batch for batch, _ in timed)
    if batch < largest:
        short = (batch, 1, context // 4)
        least |= least_seconds(run, [short])
    gained = (timed[batch, 1] - least[short]) / (batch * (context - context // 4))
    return CostTable(timed, context=context, per_context=max(0.0, gained))


def rising(timed: Mapping[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """No step dearer than one of more tokens: where one was, something disturbed it."""
    return {
        (batch, size): min(s for (b, t), s in timed.items() if b >= batch and t >= size)
        for batch, size in timed
    }


def least_seconds(
    run: Callable[[int, int, int], float], cells: Sequence[tuple[int, int, int]]
) -> dict[tuple[int, int, int], float]:
    """The least of three runs of each (batch, T, context): what the machine can do.

    In rounds, so that whatever disturbs the machine for a while does not meet the same cell thrice.
    """
    rounds = [{cell: run(*cell) for cell in cells} for _ in range(3)]
    return {cell: min(times[cell] for times in rounds) for cell in cells}
