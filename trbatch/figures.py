"""Sums over result rows: what a segment's footer carries, what progress and `stats.json` show."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(slots=True, kw_only=True)
class Figures:
    """Sums over result rows. Counts are rows (one a sample) or tokens, times are seconds."""

    rows_ok: int = 0
    rows_failed: int = 0
    rows_cancelled: int = 0
    rows_repetitive: int = 0  # of those that are ok; see `repetition`
    prompt_tokens: int = 0
    completion_tokens: int = 0
    decode_tokens: int = 0  # completion tokens without each row's first, which prefill gives
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    decode_s: float = 0.0
    compared_decode_s: float = 0.0  # `decode_s` of the rows that `baseline_decode_s` is known of
    baseline_decode_s: float = 0.0

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """The sums over result rows as dictionaries."""
        figures = cls()
        for row in rows:
            figures.count(row)
        return figures

    def count(self, row: Mapping[str, Any]) -> None:
        """Add one result row, a dictionary with the result columns that are not null."""
        reason = row["finish_reason"]
        self.rows_failed += reason == "error"
        self.rows_cancelled += reason == "cancelled"
        self.rows_ok += reason not in ("error", "cancelled")
        self.rows_repetitive += bool(row.get("repetitive"))
        tokens = row.get("completion_tokens") or 0
        self.prompt_tokens += row.get("prompt_tokens") or 0
        self.completion_tokens += tokens
        self.decode_tokens += max(tokens - 1, 0)
        self.num_spec_steps += row.get("num_spec_steps") or 0
        self.num_draft_tokens += row.get("num_draft_tokens") or 0
        self.num_accepted_draft_tokens += row.get("num_accepted_draft_tokens") or 0
        seconds = row.get("decode_s") or 0.0
        self.decode_s += seconds
        if speedup := row.get("speedup"):
            self.compared_decode_s += seconds
            self.baseline_decode_s += speedup * seconds

    def add(self, other: Figures) -> None:
        """Add another sum to this one."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def rows(self) -> int:
        """Rows counted, whatever became of them."""
        return self.rows_ok + self.rows_failed + self.rows_cancelled

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens a decode forward; plain decoding has 1.0."""
        return self.decode_tokens / self.num_spec_steps if self.num_spec_steps else None

    @property
    def draft_acceptance_rate(self) -> float | None:
        """Share of the draft tokens that came true."""
        return (
            self.num_accepted_draft_tokens / self.num_draft_tokens
            if self.num_draft_tokens
            else None
        )

    @property
    def speedup(self) -> float | None:
        """Plain decoding's seconds, by its measured cost, over the seconds that it took."""
        return self.baseline_decode_s / self.compared_decode_s if self.compared_decode_s else None

    def to_dict(self) -> dict[str, Any]:
        """The sums as JSON-serialisable values."""
        return dataclasses.asdict(self)


_SUMS = tuple(field.name for field in dataclasses.fields(Figures))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a job is. Rows are output rows: one for each sample, one for each bad input row."""

    rows: int
    rows_ok: int
    rows_failed: int  # the input's bad rows included
    rows_cancelled: int
    prompt_tokens: int
    completion_tokens: int
    num_spec_steps: int  # decode forwards, summed over rows
    mean_acceptance_length: float | None
    draft_acceptance_rate: float | None
    speedup: float | None
    busy_s: float  # seconds during which at least one worker decoded rows of this job
    tokens_per_s: float | None  # completion tokens over `busy_s`
    seconds_left: float | None  # at the pace of late, with the tail; None once they have passed
    last_row_at: float | None = None  # when the newest row was done, Unix seconds
    rows_repetitive: int = 0  # that go round in circles, of those that are ok

    @property
    def rows_done(self) -> int:
        """Rows that need no more work."""
        return self.rows_ok + self.rows_failed

    @property
    def complete(self) -> bool:
        """Whether no row is missing."""
        return self.rows_done >= self.rows

    def to_dict(self) -> dict[str, Any]:
        """Every figure, the derived ones included, as JSON-serialisable values."""
        return dataclasses.asdict(self) | {"rows_done": self.rows_done, "complete": self.complete}


def covered_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) spans: time that two workers share counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total
