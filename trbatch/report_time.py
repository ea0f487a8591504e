"""Time as a report shows it: decoding time without the pauses, and what fell into which part of it.

A job may be paused for a night; a picture of that night would be empty. So a clock runs only while
workers decode rows of the job, and remembers where it stood.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from trbatch.trace import Span, joined

SHORT_PAUSE_S = 10.0  # shorter ones, or shorter than this share of the work, are part of it
SHORT_PAUSE = 0.01
_WIDTHS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)


@dataclass(frozen=True, slots=True)
class Pause:
    """The clock stood still at `at_s` for `length_s` seconds of the world outside."""

    at_s: float
    length_s: float


class Clock:
    """Decoding time since the begin, in seconds, of points in time in Unix seconds.

    Args:
        busy: when rows were decoded.
    """

    def __init__(self, busy: Sequence[Span]) -> None:
        short = max(SHORT_PAUSE_S, SHORT_PAUSE * sum(end - start for start, end in busy))
        self._spans = joined(busy, gap_s=short)
        self._starts = [start for start, _ in self._spans]
        self._before = [0.0]  # decoding time before each span
        for start, end in self._spans:
            self._before.append(self._before[-1] + end - start)

    @property
    def length_s(self) -> float:
        """All decoding time."""
        return self._before[-1]

    @property
    def pauses(self) -> list[Pause]:
        """Where it stood still."""
        pairs = zip(self._spans, self._spans[1:], self._before[1:], strict=False)
        return [Pause(at, after[0] - before[1]) for before, after, at in pairs]

    def at(self, moment: float) -> float:
        """The decoding time of a moment; one inside a pause counts as the pause's begin."""
        index = bisect_right(self._starts, moment) - 1
        if index < 0:
            return 0.0
        start, end = self._spans[index]
        return self._before[index] + min(moment, end) - start


def width_for(length_s: float, most: int) -> float:
    """A width that people count in, of which at most `most` cover `length_s`."""
    for width in _WIDTHS_S:
        if length_s <= most * width:
            return width
    day = 86400.0
    while length_s > most * day:
        day *= 2
    return day


def utc(moment: float) -> str:
    """A Unix time to the minute, as a page shows it that is read anywhere and at any time."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")


class Spread:
    """Amounts spread evenly over spans of time and summed by equal parts of the whole time.

    Args:
        length: of the whole time.
        parts: how many.
    """

    def __init__(self, length: float, parts: int) -> None:
        self.width = length / parts
        self._parts = parts
        # An amount is a rate that begins at one point and ends at another. Of each such change:
        # what it adds to its own part, and to each part behind it. So all spans cost the same.
        self._own = [0.0] * parts
        self._behind = [0.0] * (parts + 1)

    def add(self, amount: float, start: float, end: float) -> None:
        """Spread an amount over a span; all of it in one point if the span has no length."""
        if end - start < 1e-9:
            self._own[self._part(end)] += amount
            return
        rate = amount / (end - start)
        for point, change in ((start, rate), (end, -rate)):
            part = self._part(point)
            self._own[part] += change * ((part + 1) * self.width - point)
            self._behind[part + 1] += change * self.width

    def sums(self) -> list[float]:
        """What fell into each part."""
        found, running = [], 0.0
        for own, more in zip(self._own, self._behind, strict=False):
            running += more
            found.append(max(0.0, own + running))
        return found

    def _part(self, point: float) -> int:
        return min(self._parts - 1, max(0, int(point / self.width)))
