"""The matrix for a CPU: single rows read and written in its memory, without tensor operations.

A step of a few nodes needs a few rows, and a tensor operation costs more in being called than such
a row. The slow twins are `Matrix.find` and `Matrix.write`; they share the memory, so either may be
used at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trbatch.engine.matrix import MIX, Matrix


@dataclass(frozen=True, slots=True)
class HostRows:
    """A view of a matrix that lies in the CPU's memory."""

    shared: NDArray[np.int32]  # [tasks, V, k]
    keys: NDArray[np.int64]  # [slots, orders, own rows]
    rows: NDArray[np.int32]  # [slots, orders, own rows, k]
    vocab_size: int

    @classmethod
    def of(cls, matrix: Matrix) -> HostRows:
        """The view of this matrix."""
        return cls(
            shared=matrix.shared.numpy(),
            keys=matrix.keys.numpy(),
            rows=matrix.rows.numpy(),
            vocab_size=matrix.vocab_size,
        )

    def find(self, slot: int, task: int, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The row after `tokens` (newest first, -1 before the start), and where it came from."""
        keys = self._keys_of(tokens)
        for order in range(len(keys) - 1, -1, -1):
            place = self._place(keys[order])
            if self.keys[slot, order, place] == keys[order]:
                return self.rows[slot, order, place].tolist(), order + 1
        return self.shared[task, tokens[0]].tolist(), 0

    def write_own(self, slot: int, tokens: Sequence[int], row: NDArray[np.int32]) -> None:
        """Write a sequence's own row [k] behind `tokens`, over whatever lies there."""
        for order, key in enumerate(self._keys_of(tokens)):
            place = self._place(key)
            self.keys[slot, order, place] = key
            self.rows[slot, order, place] = row

    def write_shared(self, task: int, token: int, row: NDArray[np.int32]) -> None:
        """Write a task's row [k] behind `token`."""
        self.shared[task, token] = row

    def _keys_of(self, tokens: Sequence[int]) -> list[int]:
        """Keys of the last token, the last two, …, as far as there are tokens and orders."""
        keys, key = [], 0
        for token in tokens[: self.keys.shape[1]]:
            if token < 0:
                break
            key = key * self.vocab_size + token
            keys.append(key)
        return keys

    def _place(self, key: int) -> int:
        return (key * MIX >> 32) & (int(self.keys.shape[2]) - 1)
