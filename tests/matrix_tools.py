"""What tests of shared matrices share: a small one, something to write to it, a comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trbatch.engine.matrix import Contexts, Matrix
from trbatch.engine.replica import Delta
from trbatch.engine.sequence import TaskKey

CPU = torch.device("cpu")


VOCAB = 40


KEY = "trbatch:matrix:test"


TASK = TaskKey("task")


def small_matrix() -> Matrix:
    return Matrix(
        slots=1, vocab_size=VOCAB, tasks=2, device=CPU, candidates=4, own_rows=16, pair_rows=64
    )


def write(matrix: Matrix, seed: int, task: int = 1, count: int = 12) -> None:
    """Some rows at random, as a step would write them."""
    generator = torch.Generator().manual_seed(seed)
    at = Contexts(
        slots=torch.zeros(count, dtype=torch.long), tasks=torch.full((count,), task),
        tokens=torch.randint(0, VOCAB, (count, 3), generator=generator),
    )  # fmt: skip
    rows = torch.randint(0, VOCAB, (count, 4), generator=generator)
    matrix.write(at, rows, torch.arange(count), torch.arange(count))


def same(one: Matrix, other: Matrix, task: int = 1) -> bool:
    """Whether a task's rows are the same, also behind pairs."""
    there = one.pair_keys[task] >= 0
    return (
        torch.equal(one.shared[task], other.shared[task])
        and torch.equal(one.pair_keys[task], other.pair_keys[task])
        and torch.equal(one.pair_rows[task][there], other.pair_rows[task][there])
    )


def delta(**changes: Any) -> Delta:
    fields = {
        "tokens": np.array([3], np.int32), "rows": np.array([[1, 2, 3, -1]], np.int32),
        "pair_keys": np.array([7], np.int64), "pair_rows": np.array([[1, 2, 3, 4]], np.int32),
    }  # fmt: skip
    return Delta(**(fields | changes))
