"""How long a job will yet take: the pace of late, and the tail of a batch that empties."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest

from trbatch.figures import Figures
from trbatch.pace import Pace, recent_pace
from trbatch.segments import Footer


def footer(
    end: float, rows: int, seconds: float, *, row_s: float = 4.0, worker: str = "w"
) -> Footer:
    figures = Figures(rows_ok=rows, decode_s=rows * row_s, completion_tokens=rows * 10)
    return Footer(figures, (end - seconds, end), worker, 2 * row_s)


def ends_of(durations: list[float], slots: int) -> list[float]:
    """When each row ends if so many are decoded together and the next one takes a free slot."""
    free = [0.0] * slots
    ends = []
    for duration in durations:
        end = heapq.heappop(free) + duration
        heapq.heappush(free, end)
        ends.append(end)
    return sorted(ends)


LENGTHS: dict[str, Callable[[random.Random], float]] = {
    "evenly spread": lambda draw: draw.uniform(1, 8),
    "most cut off at the limit": lambda draw: min(8.0, draw.expovariate(1 / 6)),
    "a few long ones": lambda draw: min(30.0, draw.lognormvariate(0.5, 0.8)),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("done", [0.5, 0.8, 0.9, 0.97])
def test_the_estimate_holds_to_the_very_end(
    lengths: Callable[[random.Random], float], done: float
) -> None:
    slots, rows = 32, 640
    ratios = []
    for seed in range(20):
        draw = random.Random(seed)
        durations = [lengths(draw) for _ in range(rows)]
        ends = ends_of(durations, slots)
        now = ends[int(done * rows)]
        seen = durations[: int(done * rows)]
        pace = Pace(int(done * rows) / now, sum(seen) / len(seen), max(seen))
        ratios.append(pace.seconds_for(rows - int(done * rows)) / (ends[-1] - now))
    typical = sorted(ratios)[len(ratios) // 2]
    assert 0.7 < typical < 1.5, ratios


def test_without_the_tail_the_end_would_be_promised_far_too_early() -> None:
    pace = Pace(rows_per_s=8.0, row_s=4.0, longest_s=10.0)
    assert pace.in_flight == 32
    assert pace.seconds_for(32) == pytest.approx(10.0)  # and not 4
    assert pace.seconds_for(832) == pytest.approx(100.0 + 10.0)
    assert pace.seconds_for(0) == 0
    left = [pace.seconds_for(rows) for rows in range(1, 200)]
    assert left == sorted(left)
    assert left[0] == pytest.approx(10.0 / 4.06, rel=0.01)  # the last of 32 takes 4.06 times one


def test_the_pace_is_that_of_late() -> None:
    slow = [footer(10.0 * (i + 1), 10, 10.0) for i in range(10)]
    quick = [footer(5000 + 10.0 * (i + 1), 40, 10.0) for i in range(10)]
    pace = recent_pace(slow + quick)
    assert pace is not None
    assert pace.rows_per_s == pytest.approx(4.0), "neither the slow begin nor the pause counts"
    assert (pace.row_s, pace.longest_s) == (pytest.approx(4.0), 8.0)


def test_two_workers_are_twice_as_fast() -> None:
    both = [footer(10.0 * (i // 2 + 1), 10, 10.0, worker=f"w{i % 2}") for i in range(40)]
    pace = recent_pace(both)
    assert pace is not None
    assert pace.rows_per_s == pytest.approx(2.0)


def test_nothing_done_has_no_pace() -> None:
    assert recent_pace([]) is None
    assert recent_pace([footer(10.0, 0, 5.0)]) is None
