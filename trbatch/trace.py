"""What segments say of the work on their rows: whose it was, when, and in what steps.

Each segment's footer has one; `prune` puts the sum of all into the first of the new segments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import orjson

from trbatch.figures import covered_seconds

Span = tuple[float, float]  # Unix seconds
# (sequences decoded together, rounded up to a power of two; tokens of each) -> steps
Steps = Mapping[tuple[int, int], int]

TOUCHING_S = 1e-3  # spans so close are one


@dataclass(slots=True)
class Trace:
    """Of some segments: when each worker worked on their rows, and the steps of its engine."""

    spans: dict[str, list[Span]] = field(default_factory=dict)  # by worker
    steps: Counter[tuple[int, int]] = field(default_factory=Counter)
    longest_s: float = 0.0  # prefill and decoding of the row that took longest

    @classmethod
    def of(cls, worker: str, span: Span, steps: Steps, longest_s: float) -> Self:
        """The trace of one segment."""
        return cls({worker: [span]}, Counter(steps), longest_s)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """A trace as a footer holds it."""
        values = orjson.loads(data)
        spans = {name: [(a, b) for a, b in found] for name, found in values["spans"].items()}
        steps = Counter({(batch, size): count for batch, size, count in values["steps"]})
        return cls(spans, steps, values["longest_s"])

    def to_json(self) -> bytes:
        """The trace for a footer."""
        steps = [[batch, size, count] for (batch, size), count in sorted(self.steps.items())]
        values = {"spans": self.spans, "steps": steps, "longest_s": self.longest_s}
        return orjson.dumps(values)

    def add(self, other: Trace) -> None:
        """Add another segment's trace; spans of one worker that touch become one."""
        self.steps.update(other.steps)
        self.longest_s = max(self.longest_s, other.longest_s)
        for worker, spans in other.spans.items():
            self.spans[worker] = joined([*self.spans.get(worker, []), *spans])

    @property
    def worker_s(self) -> dict[str, float]:
        """Seconds in which each worker decoded rows of the job."""
        return {worker: covered_seconds(spans) for worker, spans in self.spans.items()}

    @property
    def busy(self) -> list[Span]:
        """When at least one worker did."""
        return joined(span for spans in self.spans.values() for span in spans)

    def to_dict(self) -> dict[str, Any]:
        """The trace as JSON-serialisable values."""
        loaded: dict[str, Any] = orjson.loads(self.to_json())
        return loaded


def joined(spans: Iterable[Span], gap_s: float = TOUCHING_S) -> list[Span]:
    """The union of spans, in order; those less than `gap_s` apart become one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1] + gap_s:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def step_kind(batch: int, size: float) -> tuple[int, int]:
    """What a step counts as in a trace: sequences as a power of two, rounded tokens of each."""
    return 1 << (batch - 1).bit_length(), round(size)
