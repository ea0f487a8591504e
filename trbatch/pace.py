"""How fast rows come, and how long it will yet take, the tail included.

While rows wait, they come at a steady pace. Once none waits, the batch empties: the last rows take
as long as rows take, however few they are. That tail is part of every estimate here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trbatch.figures import Figures, covered_seconds
from trbatch.segments import Footer

LEAST_S = 60.0  # of work that a pace is taken of, if there was so much
SHARE = 0.25  # of all work so far, the newest, that it is taken of at least


@dataclass(frozen=True, slots=True)
class Pace:
    """How rows came in the last while. Seconds are of work, pauses left out."""

    rows_per_s: float
    row_s: float  # that a row took in decoding, on average
    longest_s: float  # that the slowest row took, prefill and decoding

    @property
    def in_flight(self) -> float:
        """Rows decoded at the same time, by Little's law."""
        return max(1.0, self.rows_per_s * self.row_s)

    def seconds_for(self, rows: int) -> float:
        """How long so many rows will take from now on, until the last of them is done.

        Rows behind those in flight come at the pace. The last ones end one by one: of n that end
        independently of each other the last takes about H(n) = 1 + 1/2 + … + 1/n times as long as
        one, but not longer than the slowest row that was seen.
        """
        if rows <= 0:
            return 0.0
        last = min(float(rows), self.in_flight)
        whole_batch = min(max(self.longest_s, self.row_s), self.row_s * _harmonic(self.in_flight))
        tail = whole_batch * _harmonic(last) / _harmonic(self.in_flight)
        return (rows - last) / self.rows_per_s + tail


def recent_pace(footers: Sequence[Footer]) -> Pace | None:
    """The pace of the newest segments; None before there is any."""
    busy = covered_seconds(footer.span for footer in footers)
    if not busy:
        return None
    # Without pauses: a job that was taken up again goes on at the pace that it had.
    window = max(LEAST_S, SHARE * busy)
    newest: list[Footer] = []
    covered = 0.0
    for footer in reversed(footers):
        newest.append(footer)
        covered += footer.span[1] - footer.span[0]  # of several workers: a little too much
        if covered >= window * _workers(newest):
            break
    return _pace_of(newest)


def _pace_of(footers: Iterable[Footer]) -> Pace | None:
    figures, longest = Figures(), 0.0
    spans = []
    for footer in footers:
        figures.add(footer.figures)
        spans.append(footer.span)
        longest = max(longest, footer.longest_s)
    rows = figures.rows_ok + figures.rows_failed
    seconds = covered_seconds(spans)
    if not rows or not seconds:
        return None
    return Pace(rows / seconds, figures.decode_s / rows, longest)


def _workers(footers: Iterable[Footer]) -> int:
    return len({footer.worker for footer in footers})


def _harmonic(count: float) -> float:
    """1 + 1/2 + … + 1/count, for any count from 1 on."""
    return math.log(count) + 0.5772 + 0.4228 / count
