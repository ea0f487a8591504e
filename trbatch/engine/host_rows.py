"""The matrix for a CPU: single rows read and written in its memory, without tensor operations.

A step of a few nodes needs a few rows, and a tensor operation costs more in being called than such
a row. The slow twins are `Matrix.find` and `Matrix.write`; they share the memory, so either may be
used at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trbatch.engine.matrix import MIX, MODEL, NOWHERE, OWN, TASK, TASK_PAIR, Matrix

Row = list[int]


@dataclass(frozen=True, slots=True)
class HostRows:
    """A view of a matrix that lies in the CPU's memory."""

    keys: NDArray[np.int64]  # [slots, orders, own rows]
    rows: NDArray[np.int32]  # [slots, orders, own rows, k]
    pair_keys: NDArray[np.int64]  # [tasks, pair rows]
    pair_rows: NDArray[np.int32]  # [tasks, pair rows, k]
    shared: NDArray[np.int32]  # [tasks, V, k]
    bigrams: NDArray[np.int32]  # [V, k]
    changed: NDArray[np.bool_]  # [tasks, V]
    pair_changed: NDArray[np.bool_]  # [tasks, pair rows]

    @classmethod
    def of(cls, matrix: Matrix) -> HostRows:
        """The view of this matrix."""
        return cls(
            keys=matrix.keys.numpy(),
            rows=matrix.rows.numpy(),
            pair_keys=matrix.pair_keys.numpy(),
            pair_rows=matrix.pair_rows.numpy(),
            shared=matrix.shared.numpy(),
            bigrams=matrix.bigrams.numpy(),
            changed=matrix.changed.numpy(),
            pair_changed=matrix.pair_changed.numpy(),
        )

    def find(self, slot: int, task: int, tokens: Sequence[int]) -> tuple[Row, int, Row, int]:
        """The two rows after `tokens` (newest first, -1 before the start), each with its origin."""
        sources = self._sources(slot, task, tokens)
        first, origin = next(sources, ([-1] * self.bigrams.shape[1], MODEL))
        for second, behind in sources:
            if second != first:
                return first, origin, second, behind
        return first, origin, [], NOWHERE

    def _sources(self, slot: int, task: int, tokens: Sequence[int]) -> Iterator[tuple[Row, int]]:
        """The rows that are there and count, the most trusted first; see `Matrix.find`."""
        keys, nearer = self._keys_of(tokens), False
        for order in range(min(len(keys), self.keys.shape[1]) - 1, -1, -1):
            place = _place(keys[order], self.keys.shape[2])
            if self.keys[slot, order, place] == keys[order]:
                nearer = True
                yield self.rows[slot, order, place].tolist(), OWN + order
        if self.pair_keys.size and len(keys) > 1:
            place = _place(keys[1], self.pair_keys.shape[1])
            if self.pair_keys[task, place] == keys[1]:
                nearer = True
                yield self.pair_rows[task, place].tolist(), TASK_PAIR
        of_task, of_model = self.shared[task, tokens[0]], self.bigrams[tokens[0]]
        if of_task[0] >= 0 and not (nearer and of_model[0] >= 0):
            yield of_task.tolist(), TASK
        if of_model[0] >= 0:
            yield of_model.tolist(), MODEL

    def write_own(self, slot: int, tokens: Sequence[int], row: NDArray[np.int32]) -> None:
        """Write a sequence's own rows [k] behind `tokens`, over whatever lies there."""
        for order, key in enumerate(self._keys_of(tokens)[: self.keys.shape[1]]):
            place = _place(key, self.keys.shape[2])
            self.keys[slot, order, place] = key
            self.rows[slot, order, place] = row

    def write_shared(self, task: int, tokens: Sequence[int], row: NDArray[np.int32]) -> None:
        """Write a task's rows [k] behind `tokens`."""
        self.shared[task, tokens[0]] = row
        self.changed[task, tokens[0]] = True
        keys = self._keys_of(tokens)
        if self.pair_keys.size and len(keys) > 1:
            place = _place(keys[1], self.pair_keys.shape[1])
            self.pair_keys[task, place] = keys[1]
            self.pair_rows[task, place] = row
            self.pair_changed[task, place] = True

    def _keys_of(self, tokens: Sequence[int]) -> list[int]:
        """Keys of the last token, the last two, …, as far as there are tokens."""
        keys, key = [], 0
        for token in tokens:
            if token < 0:
                break
            key = key * self.shared.shape[1] + token
            keys.append(key)
        return keys


def _place(key: int, size: int) -> int:
    return (key * MIX >> 32) & (size - 1)
