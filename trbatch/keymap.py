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

_HALF = 1 << 63  # hashes go from minus this to below this
_MANY = 1 << 14  # look-ups in a row for which it pays to have one run
_PENDING = 1 << 16  # keys that are gathered before they are sorted, where nobody asks meanwhile


class KeyMap:
    """Keys and the smallest number given for each.

    Sorted runs whose sizes fall by half at least; adding costs amortised sorting, a look-up one
    bisection a run.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._pending = _Run()
        self._asked = 0  # since the last key was added

    def __len__(self) -> int:
        """Distinct keys."""
        self._settle(everything=True)
        return len(self._runs[0]) if self._runs else 0

    def add(self, items: Iterable[tuple[Key, int]]) -> None:
        """Give keys their numbers; the smallest of a key counts."""
        pending, self._asked = self._pending, 0
        for (name, mark, sample), value in items:
            pending.first.append(hash((name, mark, sample)))
            pending.second.append(hash(f"{sample} {mark}{name}"))
            pending.values.append(value)
        if len(pending) >= _PENDING:
            self._settle()

    def get(self, key: Key) -> int | None:
        """The number of a key; None if it has none."""
        self._asked += 1
        if len(self._pending) or self._asked == _MANY:
            self._settle(everything=self._asked == _MANY)
        name, mark, sample = key
        first, second = hash((name, mark, sample)), hash(f"{sample} {mark}{name}")
        found = [run.find(first, second) for run in self._runs]
        return min((value for value in found if value is not None), default=None)

    def _settle(self, *, everything: bool = False) -> None:
        if len(self._pending):
            self._pending.order()
            self._runs.append(self._pending)
            self._pending = _Run()
        runs = self._runs
        while len(runs) > 1 and (everything or len(runs[-2]) < 2 * len(runs[-1])):
            last = runs.pop()
            runs[-1].extend(last)
            runs[-1].order()
            if len(runs[-1]) > _PENDING:
                pa.default_memory_pool().release_unused()


class _Run:
    """Three columns: two hashes of each key, and its number."""

    def __init__(self) -> None:
        self.first, self.second, self.values = self.columns = tuple(array("q") for _ in range(3))
        self._starts = array("q")  # where hashes of each beginning start; made when first asked for
        self._shift = 0  # what is left of a hash behind its beginning, bits

    def __len__(self) -> int:
        return len(self.first)

    def find(self, first: int, second: int) -> int | None:
        """The number of a key in a run that is ordered."""
        if not self._starts:
            self._index()
        beginning = (first + _HALF) >> self._shift
        low, high = self._starts[beginning], self._starts[beginning + 1]
        place = bisect_left(self.first, first, low, high)
        while place < len(self.first) and self.first[place] == first:
            if self.second[place] == second:
                return self.values[place]
            place += 1
        return None

    def _index(self) -> None:
        """Note where hashes of each beginning start, about sixteen keys apart."""
        bits = min(max(len(self).bit_length() - 4, 0), 16)
        self._shift = 64 - bits
        borders = ((beginning << self._shift) - _HALF for beginning in range(1 << bits))
        self._starts.extend(bisect_left(self.first, border) for border in borders)
        self._starts.append(len(self))

    def extend(self, other: _Run) -> None:
        """Append another run."""
        del self._starts[:]
        for column, more in zip(self.columns, other.columns, strict=True):
            column.extend(more)

    def order(self) -> None:
        """Sort by hash and keep each key once, with its smallest number.

        Works column by column in place, so that memory for one column more is all it takes.
        """
        self._put_in(pc.array_sort_indices(_view(self.first)))
        if not _any_neighbours_equal(self.first):
            return
        self._put_in(self._order_of_all())
        same = pc.and_(_same_as_before(self.first), _same_as_before(self.second))
        self._put_in(pc.indices_nonzero(pc.invert(same)))

    def _order_of_all(self) -> pa.Array:
        table = pa.table([_view(column) for column in self.columns], names=["a", "b", "c"])
        return pc.sort_indices(table, [(name, "ascending") for name in "abc"])

    def _put_in(self, order: pa.Array) -> None:
        for column in self.columns:
            taken = _view(column).take(order)
            size = 8 * len(taken)
            with memoryview(column) as numbers:
                numbers.cast("B")[:size] = memoryview(taken.buffers()[1]).cast("B")[:size]
            del column[len(taken) :]


def _view(column: array[int]) -> pa.Array:
    """A column as Arrow sees it, without a copy; it must not change meanwhile."""
    return pa.Array.from_buffers(pa.int64(), len(column), [None, pa.py_buffer(column)])


def _any_neighbours_equal(column: array[int]) -> bool:
    return bool(pc.any(_same_as_before(column)).as_py())


def _same_as_before(column: array[int]) -> pa.Array:
    """Of each number whether the one before it is the same."""
    values = _view(column)
    return pa.concat_arrays([pa.array([False]), pc.equal(values[1:], values[:-1])])
