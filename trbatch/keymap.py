"""A number for each row key, in 24 bytes a key: millions of keys in a worker or a client.

Keys are kept as two independent 64-bit hashes of this process. That two of a hundred million keys
share both has a chance of 1 in 10^22.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from trbatch.schema import Key

_PENDING = 1 << 16  # keys that are gathered before they are sorted, where nobody asks meanwhile


class KeyMap:
    """Keys and the smallest number given for each.

    Sorted runs whose sizes fall by half at least; adding costs amortised sorting, a look-up one
    bisection a run.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._pending = _Run()

    def __len__(self) -> int:
        """Distinct keys."""
        self._settle(everything=True)
        return len(self._runs[0]) if self._runs else 0

    def add(self, items: Iterable[tuple[Key, int]]) -> None:
        """Give keys their numbers; the smallest of a key counts."""
        pending = self._pending
        for (name, mark, sample), value in items:
            pending.first.append(hash((name, mark, sample)))
            pending.second.append(hash(f"{sample} {mark}{name}"))
            pending.values.append(value)
        if len(pending) >= _PENDING:
            self._settle()

    def get(self, key: Key) -> int | None:
        """The number of a key; None if it has none."""
        if len(self._pending):
            self._settle()
        name, mark, sample = key
        first, second = hash((name, mark, sample)), hash(f"{sample} {mark}{name}")
        found = [run.find(first, second) for run in self._runs]
        return min((value for value in found if value is not None), default=None)

    def _settle(self, *, everything: bool = False) -> None:
        if len(self._pending):
            self._runs.append(self._pending.ordered())
            self._pending = _Run()
        runs = self._runs
        while len(runs) > 1 and (everything or len(runs[-2]) < 2 * len(runs[-1])):
            last = runs.pop()
            runs[-1] = runs[-1].joined(last).ordered()


class _Run:
    """Three columns: two hashes of each key, and its number."""

    def __init__(self, columns: Iterable[array[int]] = ()) -> None:
        self.first, self.second, self.values = [*columns] or [array("q") for _ in range(3)]

    def __len__(self) -> int:
        return len(self.first)

    def find(self, first: int, second: int) -> int | None:
        """The number of a key in a run that is ordered."""
        place = bisect_left(self.first, first)
        while place < len(self.first) and self.first[place] == first:
            if self.second[place] == second:
                return self.values[place]
            place += 1
        return None

    def joined(self, other: _Run) -> _Run:
        """Both, one behind the other."""
        pairs = zip(self._columns(), other._columns(), strict=True)
        return _Run([one + another for one, another in pairs])

    def ordered(self) -> _Run:
        """Sorted by hash, each key once, with its smallest number."""
        table = self._table()
        table = table.take(pc.sort_indices(table["first"]))
        if _any_neighbours_equal(table["first"]):
            order = [(name, "ascending") for name in table.column_names]
            table = _first_of_equals(table.take(pc.sort_indices(table, sort_keys=order)))
        return _Run([_as_array(column) for column in table.columns])

    def _columns(self) -> tuple[array[int], array[int], array[int]]:
        return self.first, self.second, self.values

    def _table(self) -> pa.Table:
        columns = [
            pa.Array.from_buffers(pa.int64(), len(self), [None, pa.py_buffer(column)])
            for column in self._columns()
        ]
        return pa.table(columns, names=["first", "second", "value"])


def _any_neighbours_equal(values: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.equal(values[1:], values[:-1])).as_py())


def _first_of_equals(table: pa.Table) -> pa.Table:
    """The rows whose two hashes differ from those of the row before."""
    same = pc.and_(
        pc.equal(table["first"][1:], table["first"][:-1]),
        pc.equal(table["second"][1:], table["second"][:-1]),
    )
    return table.filter(pa.concat_arrays([pa.array([True]), *pc.invert(same).chunks]))


def _as_array(column: pa.ChunkedArray) -> array[int]:
    values = array("q")
    for chunk in column.chunks:
        data = chunk.buffers()[1]
        start = 8 * chunk.offset
        values.frombytes(memoryview(data)[start : start + 8 * len(chunk)])
    return values
