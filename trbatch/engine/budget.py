"""Which tree size now: the one that gives the most tokens a second on this machine.

    T* = argmax over T of (expected tokens of a forward with T nodes) / (its seconds)

Expected tokens come from how often each node of the nested tree was accepted lately, seconds from a
table over (batch, T) timed at the start and corrected by every real step. T = 1 is plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from trbatch.engine.tree import RANK_PROBABILITY, Tree

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 81, 96, 128)
TIMED_SIZES = (1, 2, 4, 8, 16, 32, 81)  # those between are interpolated
_PRIOR_WEIGHT = 24.0  # how many observations the prior is worth
_MEMORY = 2000.0  # observations after which an old one counts half
_BETTER = 1.02  # a change of T has to promise this much
_PLAIN_EVERY = 256  # steps between plain ones that keep the baseline honest (0.4 %)
_EXPLORE_EVERY = 48  # steps between those with a larger tree than seems best


class CostTable:
    """Seconds of a step by (batch, T), piecewise linear between what was timed.

    Args:
        timed: (batch, T) -> seconds at `context` committed tokens a sequence.
        per_context: seconds that one more committed token of one sequence adds.
    """

    def __init__(
        self, timed: Mapping[tuple[int, int], float], *, context: int, per_context: float
    ) -> None:
        assert timed, "time something first"
        self.timed, self.context, self.per_context = dict(timed), context, per_context
        self._batches = sorted({batch for batch, _ in timed})

    def seconds(self, batch: int, size: int, context: float) -> float:
        """Expected seconds of a step."""
        points = [(b, self._at(b, size)) for b in self._batches]
        extra = self.per_context * batch * (context - self.context)
        return max(1e-6, _interpolate(points, batch) + extra)

    def _at(self, batch: int, size: int) -> float:
        points = sorted((t, s) for (b, t), s in self.timed.items() if b == batch)
        return _interpolate(points, size)


def _interpolate(points: Sequence[tuple[int, float]], x: float) -> float:
    """Linear through the neighbours of x; beyond the ends along the last piece, never falling."""
    if len(points) == 1:
        return points[0][1]
    at = next((i for i, (px, _) in enumerate(points) if px >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(0, at - 1)], points[max(1, at)]
    slope = (y1 - y0) / (x1 - x0)
    if x > points[-1][0]:
        return y1 + max(0.0, slope) * (x - x1)
    return y0 + slope * (x - x0)


def time_steps(
    run: Callable[[int, int, int], float],
    *,
    batches: Sequence[int],
    sizes: Sequence[int],
    most_tokens: int,
    context: int,
) -> CostTable:
    """Time steps over a grid.

    Args:
        run: (batch, T, context) -> seconds of one such step; called a few times each.
        sizes: T, ascending.
        most_tokens: steps of more tokens than this are extrapolated, not timed.
        context: committed tokens a sequence; a quarter of it gives the slope.
    """
    timed = {}
    for batch in batches:
        for size in sizes:
            if size in sizes[:2] or batch * size <= most_tokens:
                timed[batch, size] = _steady(run, batch, size, context)
    short = _steady(run, batches[-1], 1, context // 4)
    gained = (timed[batches[-1], 1] - short) / (batches[-1] * (context - context // 4))
    return CostTable(timed, context=context, per_context=max(0.0, gained))


def _steady(run: Callable[[int, int, int], float], batch: int, size: int, context: int) -> float:
    """The least of three runs after a first one: what the machine can do, not what disturbed it."""
    run(batch, size, context)
    return min(run(batch, size, context) for _ in range(3))


@dataclass
class Acceptance:
    """How often each node of the nested tree is accepted, with the tree's prior behind it."""

    tree: Tree
    _hits: list[float] = field(init=False)
    _seen: list[float] = field(init=False)
    _prior: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._hits, self._seen = [0.0] * self.tree.size, [0.0] * self.tree.size
        self._prior = []
        for path in ((), *self.tree.paths):
            chance = 1.0
            for rank in path:
                chance *= RANK_PROBABILITY[rank]
            self._prior.append(chance)

    def count(self, size: int, batch: int, accepted: Sequence[int]) -> None:
        """Count one step: which nodes (any order, repeats for several sequences) were accepted."""
        fade = 0.5 ** (batch / _MEMORY)
        for node in range(1, size):
            self._hits[node] *= fade
            self._seen[node] = self._seen[node] * fade + batch
        for node in accepted:
            self._hits[node] += 1

    def expected(self, size: int) -> float:
        """Expected tokens of a forward with the first `size` nodes, the bonus token included."""
        return 1.0 + sum(self.chances()[1:size])

    def chances(self) -> list[float]:
        """[T] chance of each node to be accepted.

        What was seen, with the prior behind it as if it had been seen `_PRIOR_WEIGHT` times. The
        prior is scaled by how the nodes that were seen did against theirs: it tells how good the
        rest of the tree will be.
        """
        trust = [min(1.0, seen / _PRIOR_WEIGHT) for seen in self._seen]
        counted = zip(self._hits, self._seen, strict=True)
        rates = [hits / seen if seen else 0.0 for hits, seen in counted]
        expected = sum(t * p for t, p in zip(trust, self._prior, strict=True))
        found = sum(t * r for t, r in zip(trust, rates, strict=True))
        scale = found / expected if expected else 1.0
        return [
            min(1.0, (hits + prior * scale * _PRIOR_WEIGHT) / (seen + _PRIOR_WEIGHT))
            for hits, seen, prior in zip(self._hits, self._seen, self._prior, strict=True)
        ]


class Budget:
    """Chooses T for each step and knows what a plain step would have cost.

    Args:
        costs: the timed table.
        tree: the largest tree; any prefix of it may be chosen.
        fixed: always this T (0: choose).
    """

    def __init__(self, costs: CostTable, tree: Tree, *, fixed: int = 0) -> None:
        self._costs, self._tree, self._fixed = costs, tree, fixed
        self.acceptance = Acceptance(tree)
        self._correction: dict[int, float] = {}  # T -> measured over expected seconds
        self._steps = 0
        self._last = 1
        self.chosen: dict[int, int] = {}  # T -> steps

    def choose(self, batch: int, context: float) -> int:
        """T for a step of `batch` sequences with `context` committed tokens on average."""
        self._steps += 1
        size = self._fixed or self._choose(batch, context)
        self.chosen[size] = self.chosen.get(size, 0) + 1
        return size

    def plain_seconds(self, batch: int, context: float) -> float:
        """What a plain step of this batch takes here."""
        return self._seconds(batch, 1, context)

    def count(
        self, size: int, batch: int, context: float, seconds: float, accepted: Sequence[int]
    ) -> None:
        """Learn from a step that was made: its time and which nodes it accepted."""
        ratio = seconds / self._costs.seconds(batch, size, context)
        old = self._correction.get(size, ratio)
        # A step that something else disturbed counts as twice the usual at most.
        self._correction[size] = old + 0.05 * (min(ratio, 2 * old) - old)
        if size > 1:
            self.acceptance.count(size, batch, accepted)

    def _choose(self, batch: int, context: float) -> int:
        if self._steps % _PLAIN_EVERY == 0:
            return 1
        sizes = [size for size in SIZES if size < self._tree.size] + [self._tree.size]
        chances = self.acceptance.chances()
        rates = {}
        for size in sizes:
            expected = 1.0 + sum(chances[1:size])
            rates[size] = expected / self._seconds(batch, size, context)
        best = max(sizes, key=lambda size: rates[size])
        if rates[best] < _BETTER * rates.get(self._last, 0.0):
            best = self._last
        self._last = best
        if self._steps % _EXPLORE_EVERY == 0:
            return next((size for size in sizes if size > best), best)
        return best

    def _seconds(self, batch: int, size: int, context: float) -> float:
        known = self._correction
        if size in known:
            factor = known[size]
        elif known:
            factor = known[min(known, key=lambda other: abs(other - size))]
        else:
            factor = 1.0
        return factor * self._costs.seconds(batch, size, context)
