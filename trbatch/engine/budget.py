"""How many nodes now: as many as give the most tokens a second on this machine.

    n* = argmax over n of (B + sum of the n largest chances) / seconds(B sequences, B + n tokens)

Chances are calibrated while decoding (`best_first`), seconds come from a table timed at the start
and corrected by every real step: by how fast the machine is just now, and by what the table got
wrong about steps of this kind. n = 0 is plain decoding, and when it stays the best for long,
drafting and learning are left out too and only tried again now and then.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from statistics import median

from trbatch.engine.costs import TIMED_SIZES, CostTable
from trbatch.engine.curve import STEP_SIZES, Curve
from trbatch.trace import step_kind

# Steps between plain ones, which keep the baseline honest: the less drafting gains, the less one
# costs and the more depends on it. (gain below which, steps)
_PLAIN_EVERY = ((1.1, 12), (1.3, 48), (math.inf, 256))
# Where steps are read one late: plain ones in a row, of which the middle one has its like around
# it, and the steps before the first of them.
_PLAIN_RUN, _PLAIN_FROM = 3, 29
# Steps from one such run to the next where so many plain ones have taught what they take.
_PLAIN_SELDOM, _WELL_KNOWN = 640, 8
_HOPELESS = 32  # steps without a node worth drafting, after which drafting rests
_REST = 16  # plain steps between two tries then
_PACE_STEP = 0.1  # weight of the newest step in the machine's pace, logarithmic
_SIZE_STEP = 0.03  # the same in the usual size of a tree
_FIRST_STEP = 0.5  # of the first in a kind; it falls as 1 / (steps of the kind)
_KIND_STEP = 0.015  # the same in what is particular to its kind of step
_WORTH_A_CHANGE = 1.03  # gain for which the size of a step is changed: each has its own graph
_PATIENCE = 64  # steps without a typical one, from which on the others teach as well
_SURPRISE = math.log(1.5)  # a step that something else disturbed counts as this much at most
# Where others of its kind are around a step, the median of the kind's last such steps is what it
# takes: what a disturbed one took longer is its delay, which a plain one would have had as well.
_RECENT = 63


class Budget:
    """Chooses the nodes of each step and knows what a plain step would have cost.

    Args:
        costs: the timed table.
        most: nodes and root of one sequence, at most.
        most_tokens: of a whole step whose size is chosen for all; 0: any. Fewer where memory
            suffices for fewer.
    """

    def __init__(self, costs: CostTable, *, most: int, most_tokens: int = 0) -> None:
        self._costs, self._most = costs, most
        self._most_tokens = costs.most_tokens or most_tokens
        # Logarithms of measured over expected seconds. A machine that slows down slows all steps,
        # also those that are not being made: without the common part they would look cheap.
        self._pace: float | None = None
        self._particular: dict[tuple[int, int], float] = {}
        self._made: dict[tuple[int, int], int] = {}  # steps of each kind
        # Of each kind what its last typical steps took, over the pace of that time.
        self._recent: dict[tuple[int, int], deque[float]] = {}
        self._gain = 1.0  # expected of the last drafts over plain decoding, smoothed
        self._steps = self._misses = self._pause = 0
        self._untypical = 0  # steps since the last typical one
        self.usual_size = float(most)  # tokens a step and sequence, of the last 30 steps or so
        self.steps: Counter[tuple[int, int]] = Counter()  # that were made; see `trace.Steps`
        self._curve = Curve()
        self._size = 0  # of the last step that was chosen whole
        self._tried_at = _PLAIN_FROM - _PLAIN_EVERY[-1][1]  # step of the last plain run's begin

    def beside(self) -> Budget:
        """One for steps of another sort that are made beside these, such as the host's own.

        What such steps take says nothing of these, so each learns by itself. They are counted
        together, in the same `steps`.
        """
        other = Budget(self._costs, most=self._most, most_tokens=self._most_tokens)
        other.steps = self.steps
        return other

    @property
    def chosen(self) -> dict[int, int]:
        """Steps by the tokens of each of their sequences, rounded."""
        found: Counter[int] = Counter()
        for (_, size), count in self.steps.items():
            found[size] += count
        return dict(found)

    def wants_draft(self) -> bool:
        """Whether this step should look for drafts at all."""
        self._steps += 1
        if self._steps % next(every for gain, every in _PLAIN_EVERY if self._gain < gain) == 0:
            return False
        if self._pause > 0:
            self._pause -= 1
            return False
        return True

    def least_chance(self, batch: int, context: float) -> float:
        """The chance below which no node of any sequence can pay for itself."""
        plain = self.step_seconds(batch, 1.0, context)
        slope = self.step_seconds(batch, 1 + 8 / batch, context) - plain
        return min(0.5, max(0.01, 0.7 * slope / 8 / (plain / batch)))

    def choose(self, batch: int, context: float, chances: Sequence[float]) -> int:
        """How many nodes to verify in all.

        Args:
            batch: sequences of the step.
            context: committed tokens of a sequence, on average.
            chances: of all candidates, falling.
        """
        plain_rate = batch / self.step_seconds(batch, 1.0, context)
        best, best_rate, expected, taken = 0, plain_rate, 0.0, 0
        for count in _grid(min(len(chances), batch * (self._most - 1))):
            expected += sum(chances[taken:count])
            taken = count
            rate = (batch + expected) / self.step_seconds(batch, 1 + count / batch, context)
            if rate > best_rate:
                best, best_rate = count, rate
        self._gain += _PACE_STEP * (best_rate / plain_rate - self._gain)
        self._misses = 0 if best else self._misses + 1
        if self._misses >= _HOPELESS:
            self._pause = _REST
        return best

    def choose_size(self, batch: int, context: float) -> int:
        """How many tokens each sequence of a step gets, the root included, all the same number.

        The plain step is taken now and then to keep the baseline honest, one in 200 once it is well
        known; where it is the best, the best size with drafts is tried now and then, since it may
        have become better.
        """

        def rate(size: int) -> float:
            return self._curve.expected(size) / self.step_seconds(batch, float(size), context)

        self._steps += 1
        room = self._most_tokens // batch if self._most_tokens else self._most
        sizes = [size for size in STEP_SIZES if size <= max(1, min(self._most, room))]
        best = max(sizes, key=rate)
        if self._size in sizes and rate(best) < _WORTH_A_CHANGE * rate(self._size):
            best = self._size
        self._size = best
        if self._tries_another(batch, best):
            drafting = [size for size in sizes if size > 1]
            return max(drafting, key=rate, default=1) if best == 1 else 1
        return best

    def limit(self, most_tokens: int) -> None:
        """No step whose size is chosen for all may have more tokens than so many from now on.

        Plain ones may: they cannot be smaller with as many sequences.
        """
        self._most_tokens = min(self._most_tokens or most_tokens, most_tokens)

    def _tries_another(self, batch: int, best: int) -> bool:
        known = best > 1 and self._made.get(_kind(batch, 1.0), 0) >= _WELL_KNOWN
        if self._steps - self._tried_at >= (_PLAIN_SELDOM if known else _PLAIN_EVERY[-1][1]):
            self._tried_at = self._steps
        return self._steps - self._tried_at < _PLAIN_RUN

    def count_tokens(self, size: int, tokens: int, sequences: int) -> None:
        """Learn what a step whose size was chosen whole gave."""
        self._curve.count(size, tokens, sequences)

    def plain_seconds(self, batch: int, context: float) -> float:
        """What a plain step of this batch takes here."""
        return self.step_seconds(batch, 1.0, context)

    def count(
        self,
        tokens: int,
        batch: int,
        context: float,
        seconds: float,
        *,
        typical: bool | None = None,
        lent: bool = False,
    ) -> None:
        """Learn from a step that was made: its tokens in all and its time.

        Args:
            typical: whether its time is known to have nothing else in it, or known to have; None:
                it may have.
            lent: whether a shape for more rows made it, so that it took longer than its kind does.
        """
        size = tokens / batch
        self.usual_size += _SIZE_STEP * (size - self.usual_size)
        self.steps[step_kind(batch, size)] += 1
        if lent:
            return
        kind = _kind(batch, size)
        self._untypical = self._untypical + 1 if typical is False else 0
        if 0 < self._untypical < _PATIENCE:
            return
        found = math.log(seconds / self._costs.seconds(batch, size, context))
        if self._pace is None:
            self._pace = found
        particular, made = self._particular.get(kind, 0.0), self._made.get(kind, 0)
        self._made[kind] = made + 1
        if typical:
            self._learn_typical(kind, found - self._pace)
            return
        surprise = max(-_SURPRISE, min(_SURPRISE, found - self._pace - particular))
        # A kind that is hardly known says more about itself than about the machine.
        self._pace += _PACE_STEP * made / (made + 3) * surprise
        self._particular[kind] = particular + max(_KIND_STEP, _FIRST_STEP / (made + 1)) * surprise

    def _learn_typical(self, kind: tuple[int, int], found: float) -> None:
        """found: logarithm of what it took over what the table and the pace say."""
        recent = self._recent.setdefault(kind, deque(maxlen=_RECENT))
        known = len(recent) == _RECENT
        recent.append(found)
        middle = median(recent)
        if not known:
            self._particular[kind] = middle
            return
        # What a well known kind takes longer now, all kinds do: also those that are not made.
        moved = middle - self._particular[kind]
        assert self._pace is not None, "it was set by the first step"
        self._pace += moved
        self._recent[kind] = deque((one - moved for one in recent), maxlen=_RECENT)

    def step_seconds(self, batch: int, size: float, context: float) -> float:
        """What a step of `size` tokens a sequence takes here."""
        correction = (self._pace or 0.0) + self._particular.get(_kind(batch, size), 0.0)
        return math.exp(correction) * self._costs.seconds(batch, size, context)


def _kind(batch: int, size: float) -> tuple[int, int]:
    """Batches by powers of two; plain steps apart, the others by the timed size they reach."""
    return batch.bit_length(), 0 if size == 1.0 else bisect_left(TIMED_SIZES, size)


def _grid(most: int) -> list[int]:
    """Counts to try: every one up to 16, then a quarter more each time."""
    counts, count = [], 1
    while count <= most:
        counts.append(count)
        count += max(1, count // 16 * 4)
    return counts
