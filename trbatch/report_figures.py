"""The figures of a report, counted in one pass over a job's rows; memory holds sums, not rows."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trbatch.figures import Figures
from trbatch.report_time import Clock, Pause, Spread, width_for

TIME_PARTS = 72  # of the picture of throughput, at most
FINE_PARTS = 1200  # of the time, from which groups of equally many rows are made
GROUPS = 16  # of rows in the order in which they ended
LONGEST_STEP = 8  # tokens of a forward that are told apart; this many and more are one
SPEEDUP_STEP = 0.02  # width in which speed-ups are counted
SPEEDUP_MOST = 20.0
SPEEDUP_BARS = 32
CATEGORIES = 500  # told apart; further ones are counted together
OTHERS = "(others)"
NO_CATEGORY = "(none)"
LISTED = 10  # slowest rows
FAILURES = 20  # failed rows
MESSAGE = 300  # characters of an error message

# What is read of each row.
COLUMNS = (
    "custom_id",
    "sample_index",
    "prompt_index",
    "finish_reason",
    "error_code",
    "error_message",
    "prompt_tokens",
    "completion_tokens",
    "worker",
    "finished_at",
    "prefill_s",
    "decode_s",
    "speedup",
    "repetitive",
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "mean_acceptance_length",
    "acceptance_histogram",
)


@dataclass(slots=True)
class Throughput:
    """Tokens a second by equal parts of the decoding time."""

    width_s: float = 1.0
    tokens_per_s: list[float] = field(default_factory=list)
    length_s: float = 0.0  # the last part may reach beyond it, and is divided by what it has
    pauses: list[Pause] = field(default_factory=list)
    untimed_rows: int = 0  # that an earlier version decoded, which did not note when


@dataclass(slots=True)
class Group:
    """Rows that ended one after the other, in decoding time from `from_s` to before `to_s`."""

    from_s: float
    to_s: float
    rows: int = 0
    rows_so_far: int = 0  # these included
    decode_tokens: int = 0
    forwards: int = 0
    histogram: list[int] = field(default_factory=list)  # as `acceptance`, up to `LONGEST_STEP`

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens a forward."""
        return self.decode_tokens / self.forwards if self.forwards else None


@dataclass(slots=True)
class Bar:
    """How many rows have a value from `start` to before `end`."""

    start: float
    end: float
    rows: int


@dataclass(slots=True)
class RowFigures:
    """What the pass over the rows has found."""

    total: Figures = field(default_factory=Figures)
    varied: Figures = field(default_factory=Figures)  # the total without repetitive rows
    workers: dict[str, Figures] = field(default_factory=dict)
    categories: dict[str, Figures] = field(default_factory=dict)  # {} without such a column
    throughput: Throughput = field(default_factory=Throughput)
    acceptance: list[int] = field(default_factory=list)  # [i]: forwards that gave i + 1 tokens
    groups: list[Group] = field(default_factory=list)
    speedups: list[Bar] = field(default_factory=list)
    slowest: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)  # failed rows by code
    failures: list[dict[str, Any]] = field(default_factory=list)  # the first of them

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-serialisable values."""
        return asdict(self)


class RowCount:
    """Counts rows for a report.

    Args:
        clock: of the job.
        categorised: whether rows have a category.
    """

    def __init__(self, clock: Clock, *, categorised: bool) -> None:
        self._clock, self._categorised = clock, categorised
        length = max(clock.length_s, 1e-3)
        width = width_for(length, TIME_PARTS)
        parts = max(1, -(-length // width))
        self._tokens = Spread(parts * width, int(parts))
        self._fine_width = length / FINE_PARTS
        self._fine: dict[int, Group] = {}
        self._by: dict[tuple[str, str], Figures] = {}  # (worker, category)
        self._varied = Figures()
        self._known: set[str] = set()  # categories told apart
        self._acceptance: Counter[int] = Counter()
        self._speedups: Counter[int] = Counter()
        self._slowest: list[tuple[float, int, dict[str, Any]]] = []
        self._errors: Counter[str] = Counter()
        self._failures: list[dict[str, Any]] = []
        self._untimed = self._seen = 0

    def add(self, row: Mapping[str, Any], category: str) -> None:
        """Count a result row, a mapping with `COLUMNS`; `category`: its own, if rows have one."""
        self._seen += 1
        key = (row["worker"] or "", self._told_apart(category))
        figures = self._by.get(key)
        if figures is None:
            figures = self._by[key] = Figures()
        figures.count(row)
        if not row["repetitive"]:
            self._varied.count(row)
        if row["finish_reason"] == "error":
            self._count_failure(row)
        if not row["completion_tokens"]:
            return
        self._count_time(row)
        self._count_slow(row, category)
        for index, count in enumerate(row["acceptance_histogram"] or ()):
            if count:
                self._acceptance[index] += count
        if row["speedup"]:
            self._speedups[int(min(row["speedup"], SPEEDUP_MOST) / SPEEDUP_STEP + 1e-9)] += 1

    def figures(self) -> RowFigures:
        """What was found."""
        found = RowFigures(
            varied=self._varied,
            throughput=self._throughput(),
            acceptance=[self._acceptance[i] for i in range(max(self._acceptance, default=-1) + 1)],
            groups=_grouped(sorted(self._fine.items())),
            speedups=bars_of(self._speedups),
            slowest=[row for *_, row in sorted(self._slowest, key=lambda one: (-one[0], -one[1]))],
            errors=dict(sorted(self._errors.items(), key=lambda pair: (-pair[1], pair[0]))),
            failures=self._failures,
        )
        for (worker, category), figures in sorted(self._by.items()):
            found.total.add(figures)
            if worker:
                found.workers.setdefault(worker, Figures()).add(figures)
            if self._categorised:
                found.categories.setdefault(category, Figures()).add(figures)
        return found

    def _told_apart(self, category: str) -> str:
        if not self._categorised or category in self._known:
            return category
        if len(self._known) >= CATEGORIES:
            return OTHERS
        self._known.add(category)
        return category

    def _count_failure(self, row: Mapping[str, Any]) -> None:
        self._errors[row["error_code"] or ""] += 1
        if len(self._failures) < FAILURES:
            names = ("custom_id", "sample_index", "prompt_index", "error_code")
            message = (row["error_message"] or "")[:MESSAGE]
            self._failures.append({name: row[name] for name in names} | {"error_message": message})

    def _count_time(self, row: Mapping[str, Any]) -> None:
        """Its tokens came evenly while it was decoded; it counts where it ended."""
        if row["finished_at"] is None:
            self._untimed += 1
            return
        end = self._clock.at(row["finished_at"])
        start = self._clock.at(row["finished_at"] - (row["decode_s"] or 0.0))
        self._tokens.add(row["completion_tokens"], start, end)
        part = min(FINE_PARTS - 1, int(end / self._fine_width))
        group = self._fine.get(part)
        if group is None:
            begin = part * self._fine_width
            group = self._fine[part] = Group(begin, begin + self._fine_width)
            group.histogram = [0] * LONGEST_STEP
        group.rows += 1
        group.decode_tokens += row["completion_tokens"] - 1
        group.forwards += row["num_spec_steps"] or 0
        for index, count in enumerate(row["acceptance_histogram"] or ()):
            group.histogram[min(index, LONGEST_STEP - 1)] += count

    def _count_slow(self, row: Mapping[str, Any], category: str) -> None:
        seconds = (row["prefill_s"] or 0.0) + (row["decode_s"] or 0.0)
        if len(self._slowest) >= LISTED and seconds <= self._slowest[0][0]:
            return
        names = ("custom_id", "sample_index", "prompt_tokens", "completion_tokens")
        kept = {name: row[name] for name in (*names, "mean_acceptance_length", "speedup")}
        kept |= {"seconds": seconds, "repetitive": bool(row["repetitive"])}
        kept |= {"category": category if self._categorised else None}
        heapq.heappush(self._slowest, (seconds, -self._seen, kept))
        if len(self._slowest) > LISTED:
            heapq.heappop(self._slowest)

    def _throughput(self) -> Throughput:
        sums, width, length = self._tokens.sums(), self._tokens.width, self._clock.length_s
        if not any(sums):
            sums = []
        seconds = [min(width, max(length - i * width, 1e-3)) for i in range(len(sums))]
        rates = [tokens / took for tokens, took in zip(sums, seconds, strict=True)]
        return Throughput(width, rates, length, self._clock.pauses, self._untimed)


def _grouped(fine: Sequence[tuple[int, Group]]) -> list[Group]:
    """Up to `GROUPS` groups of about equally many rows, each from whole fine parts."""
    total = sum(group.rows for _, group in fine)
    found: list[Group] = []
    seen = 0
    for _, one in fine:
        # A new group begins where the share of the one before is full.
        if not found or seen * GROUPS >= total * len(found):
            found.append(Group(one.from_s, one.to_s, histogram=[0] * LONGEST_STEP))
        last = found[-1]
        seen += one.rows
        last.to_s = one.to_s
        last.rows += one.rows
        last.rows_so_far = seen
        last.decode_tokens += one.decode_tokens
        last.forwards += one.forwards
        last.histogram = [a + b for a, b in zip(last.histogram, one.histogram, strict=True)]
    return found


def bars_of(counts: Mapping[int, int]) -> list[Bar]:
    """At most about `SPEEDUP_BARS` bars over what was counted in steps of `SPEEDUP_STEP`.

    The outermost half percent at each side goes into the first and the last bar, so that a few odd
    rows do not flatten the picture.
    """
    total = sum(counts.values())
    if not total:
        return []
    low, high = _quantile(counts, 0.005), _quantile(counts, 0.995)
    per_bar = next(n for n in (1, 2, 5, 10, 25, 50, 1000) if (high - low) / n <= SPEEDUP_BARS)
    first, last = low // per_bar, high // per_bar
    rows: Counter[int] = Counter()
    for part, count in counts.items():
        rows[min(last, max(first, part // per_bar))] += count
    width = per_bar * SPEEDUP_STEP
    bars = [Bar(i * width, (i + 1) * width, rows[i]) for i in range(first, last + 1)]
    bars[0].start = min(bars[0].start, min(counts) * SPEEDUP_STEP)
    bars[-1].end = max(bars[-1].end, (max(counts) + 1) * SPEEDUP_STEP)
    return bars


def _quantile(counts: Mapping[int, int], share: float) -> int:
    wanted, seen = share * sum(counts.values()), 0
    for part in sorted(counts):
        seen += counts[part]
        if seen > wanted:
            return part
    return max(counts)
