"""A task's matrix as one of several equal copies: changes go out, those of others come in.

Changes are packed deltas of whole rows. Every worker applies every delta in the order of the
stream, its own included, and leaves alone the rows that it has changed since it last sent any:
these win when they are sent in their turn. So all copies are equal once everything was sent and
applied. Deltas come out of a queue that others may write to: nothing in them is trusted.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trbatch.engine.matrix import EMPTY, NO_KEY, Matrix
from trbatch.engine.sequence import TaskKey
from trbatch.engine.tasks import Tasks

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<4sIII")  # magic, candidates a row, rows, pairs
_MAGIC = b"TRD1"


class BadDelta(ValueError):
    """A delta that does not fit this matrix."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Rows behind single tokens and behind pairs."""

    tokens: NDArray[np.int32]  # [n]
    rows: NDArray[np.int32]  # [n, k]
    pair_keys: NDArray[np.int64]  # [m]
    pair_rows: NDArray[np.int32]  # [m, k]

    def __len__(self) -> int:
        return len(self.tokens) + len(self.pair_keys)

    def pack(self) -> bytes:
        """The delta as bytes."""
        header = _HEADER.pack(_MAGIC, self.rows.shape[1], len(self.tokens), len(self.pair_keys))
        parts = (self.tokens, self.rows, self.pair_keys, self.pair_rows)
        return zlib.compress(header + b"".join(part.tobytes() for part in parts), 1)


def unpack(data: bytes, matrix: Matrix) -> Delta:
    """The delta in bytes that anybody may have written.

    Raises:
        BadDelta: it is not one, or not one for this matrix.
    """
    k, vocab, pairs = matrix.candidates, matrix.vocab_size, matrix.pair_keys.shape[1]
    most = _HEADER.size + vocab * 4 * (1 + k) + pairs * (8 + 4 * k)
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(data, most + 1)
        magic, wide, rows, pairs_in = _HEADER.unpack_from(raw)
    except (zlib.error, struct.error) as error:
        raise BadDelta(f"it cannot be unpacked: {error}") from error
    size = _HEADER.size + rows * 4 * (1 + k) + pairs_in * (8 + 4 * k)
    if magic != _MAGIC or wide != k or len(raw) != size or not inflater.eof:
        raise BadDelta(f"{rows} rows and {pairs_in} pairs of {wide} do not fit")
    at = _HEADER.size
    arrays = []
    for shape, kind in (
        ((rows,), "<i4"),
        ((rows, k), "<i4"),
        ((pairs_in,), "<i8"),
        ((pairs_in, k), "<i4"),
    ):
        array = np.frombuffer(raw, dtype=kind, count=int(np.prod(shape)), offset=at).reshape(shape)
        at += array.nbytes
        arrays.append(array.copy())
    delta = Delta(*arrays)
    _check(delta.tokens, 0, vocab)
    _check(delta.pair_keys, 0, vocab * vocab)
    _check(delta.rows, EMPTY, vocab)
    _check(delta.pair_rows, EMPTY, vocab)
    return delta


def _check(values: NDArray[np.integer], low: int, high: int) -> None:
    if values.size and (values.min() < low or values.max() >= high):
        raise BadDelta(f"it holds {values.min()} … {values.max()}, not {low} … {high - 1}")


def take_changes(matrix: Matrix, task: int) -> Delta:
    """What was written here since the last call."""
    changed, pairs = matrix.changed[task], matrix.pair_changed[task]
    delta = _rows_at(matrix, task, changed.nonzero()[:, 0], pairs.nonzero()[:, 0])
    changed.zero_()
    pairs.zero_()
    return delta


def put_back(matrix: Matrix, task: int, delta: Delta) -> None:
    """These changes were not sent after all: they are still to be sent, as they are by then."""
    device = matrix.shared.device
    matrix.changed[task, torch.from_numpy(delta.tokens).long().to(device)] = True
    keys = torch.from_numpy(delta.pair_keys).to(device)
    matrix.pair_changed[task, matrix.pair_place(keys)] = True


def everything(matrix: Matrix, task: int) -> Delta:
    """All rows of a task."""
    return _rows_at(
        matrix,
        task,
        (matrix.shared[task] != EMPTY).any(1).nonzero()[:, 0],
        (matrix.pair_keys[task] != NO_KEY).nonzero()[:, 0],
    )


def apply(matrix: Matrix, task: int, delta: Delta) -> None:
    """Write a delta's rows, but none over a row that was changed here and not sent yet."""
    device = matrix.shared.device
    tokens = torch.from_numpy(delta.tokens).long().to(device)
    stale = ~matrix.changed[task, tokens]
    matrix.shared[task, tokens[stale]] = torch.from_numpy(delta.rows).to(device)[stale]
    keys = torch.from_numpy(delta.pair_keys).to(device)
    places = matrix.pair_place(keys)
    stale = ~matrix.pair_changed[task, places]
    matrix.pair_keys[task, places[stale]] = keys[stale]
    matrix.pair_rows[task, places[stale]] = torch.from_numpy(delta.pair_rows).to(device)[stale]


def replace(matrix: Matrix, task: int, whole: Delta) -> None:
    """Begin again from a copy of somebody else's; rows changed here and not sent yet stay."""
    kept, pairs_kept = matrix.changed[task], matrix.pair_changed[task]
    matrix.shared[task, ~kept] = EMPTY
    matrix.pair_keys[task, ~pairs_kept] = NO_KEY
    apply(matrix, task, whole)


class Copies:
    """The open tasks' matrices as copies of what the workers of a task share; bytes in and out."""

    def __init__(self, matrix: Matrix, tasks: Tasks) -> None:
        self._matrix, self._tasks = matrix, tasks

    def position(self, key: TaskKey) -> str:
        """How far in the stream a task's copy is; "" if it is not open or not shared yet."""
        task = self._tasks.current(key)
        return task.position if task is not None else ""

    def take(self, key: TaskKey) -> bytes:
        """What was written here since the last time, b"" for nothing."""
        task = self._tasks.current(key)
        delta = take_changes(self._matrix, task.index) if task is not None else None
        return delta.pack() if delta else b""

    def put_back(self, key: TaskKey, data: bytes) -> None:
        """What `take` gave could not be sent."""
        if data and (task := self._tasks.current(key)) is not None:
            put_back(self._matrix, task.index, unpack(data, self._matrix))

    def whole(self, key: TaskKey) -> bytes:
        """All rows of a task; b"" if it is not open: an open one has a few bytes at least."""
        task = self._tasks.current(key)
        return everything(self._matrix, task.index).pack() if task is not None else b""

    def began_cold(self, key: TaskKey) -> bool:
        """Whether a task is to take the place of what was known of it."""
        task = self._tasks.current(key)
        return task is not None and task.began_cold

    def outdate(self, key: TaskKey) -> None:
        """What a task's copy was made of was replaced: its file is read when it is opened next."""
        self._tasks.outdate(key)

    def merge(
        self, key: TaskKey, whole: bytes | None, deltas: Iterable[bytes], position: str
    ) -> None:
        """Apply what the stream holds up to `position`. What cannot be read is left out.

        Args:
            whole: a matrix to begin again from; None goes on from what is there.
        """
        task = self._tasks.current(key)
        if task is None:
            return
        for data, use in [(whole, replace), *((delta, apply) for delta in deltas)]:
            if data is None:
                continue
            try:
                use(self._matrix, task.index, unpack(data, self._matrix))
            except BadDelta as error:
                logger.warning(
                    "task %r: an entry of its shared matrix is skipped: %s", key.name, error
                )
        task.changed, task.position = True, position


def _rows_at(matrix: Matrix, task: int, tokens: Tensor, places: Tensor) -> Delta:
    return Delta(
        tokens=tokens.to(torch.int32).cpu().numpy(),
        rows=matrix.shared[task, tokens].cpu().numpy(),
        pair_keys=matrix.pair_keys[task, places].cpu().numpy(),
        pair_rows=matrix.pair_rows[task, places].cpu().numpy(),
    )
