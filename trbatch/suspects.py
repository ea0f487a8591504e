"""Which rows may have killed a worker, and how they are told from the innocent: in halves.

Pure bookkeeping, kept with the chunk's entry in the queue. A crash leaves the rows that the engine
was decoding as suspects. They run again half by half in a process that does nothing else. Each
crash halves the part that crashed, until a row is alone; alone and crashed three times it is
poison.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import orjson

from trbatch.flight import Row
from trbatch.masking import printable

ALONE = 3  # crashes of a row that ran alone make it poison
_MOST = 1 << 20  # characters of the bookkeeping that are read


@dataclass(frozen=True, slots=True)
class Suspects:
    """The suspects of one chunk. Groups are run one after the other, each by itself."""

    groups: tuple[tuple[Row, ...], ...] = ()
    alone: Mapping[Row, int] = field(default_factory=dict)  # crashes of each row that ran alone
    cause: str = ""  # of the last crash, in words

    def __bool__(self) -> bool:
        return bool(self.groups)

    @property
    def poison(self) -> frozenset[Row]:
        """Rows that need not be tried again."""
        return frozenset(row for row, crashes in self.alone.items() if crashes >= ALONE)

    def after_crash(self, running: Sequence[Row], cause: str, *, alone: bool) -> Suspects:
        """What is to be done after a crash.

        Args:
            running: this chunk's rows that the engine was decoding then, at least one.
            cause: how the process died, in words.
            alone: whether the only one of them was the only row in the process.
        """
        assert running, "a crash without rows in the engine makes nobody suspect"
        counts = dict(self.alone)
        if alone:
            (row,) = running
            counts[row] = counts.get(row, 0) + 1
        middle = (len(running) + 1) // 2
        halves = [tuple(running[:middle]), tuple(running[middle:])]
        others = [_without(group, running) for group in self.groups]
        groups = tuple(group for group in [*halves, *others] if group)
        return Suspects(groups, counts, cause)

    def to_json(self) -> str:
        """For the queue."""
        counts = [[*row, crashes] for row, crashes in self.alone.items()]
        return orjson.dumps([self.groups, counts, self.cause]).decode()

    @classmethod
    def from_json(cls, text: str | bytes | None) -> Self:
        """From the queue. What is no bookkeeping of ours suspects nobody: it comes out of Redis."""
        if not text or len(text) > _MOST:
            return cls()
        try:
            groups, counts, cause = orjson.loads(text)
            rows = [tuple(dict.fromkeys(_row(*row) for row in group)) for group in groups]
            crashes = {_row(order, sample): _whole(times) for order, sample, times in counts}
            return cls(
                tuple(group for group in rows if group),
                {row: min(times, ALONE) for row, times in crashes.items()},
                printable(str(cause)[:500]),
            )
        except (ValueError, TypeError):
            return cls()


def _without(group: Iterable[Row], running: Sequence[Row]) -> tuple[Row, ...]:
    gone = set(running)
    return tuple(row for row in group if row not in gone)


def _row(order: int, sample: int) -> Row:
    return _whole(order), _whole(sample)


def _whole(number: object) -> int:
    if not isinstance(number, int) or not 0 <= number < 2**63:
        raise ValueError("no place, sample or count")
    return number
