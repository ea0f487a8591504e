"""Which ids occur more than once, in at most 12 bytes of memory a row."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

_PARTS = 16  # sorted one after the other, so that sorting needs little memory of its own


class RepeatCheck:
    """Collects ids as 64-bit hashes and finds those that came more than once."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, ids: Iterable[str]) -> None:
        """Count each id once more."""
        self._hashes.extend(map(hash, ids))

    def repeated(self) -> frozenset[int]:
        """Hashes, by `hash`, that came twice: of a repeated id or, very rarely, of two ids."""
        hashes = pa.Array.from_buffers(
            pa.int64(), len(self._hashes), [None, pa.py_buffer(self._hashes)]
        )
        found: set[int] = set()
        for part in range(_PARTS):
            # The lowest bits of a hash are as random as the others.
            chosen = pc.equal(pc.bit_wise_and(hashes, _PARTS - 1), part)
            ordered = hashes.filter(chosen)
            ordered = ordered.take(pc.array_sort_indices(ordered))
            twice = pc.equal(ordered[1:], ordered[:-1])
            found.update(ordered[1:].filter(twice).to_pylist())
        return frozenset(found)
