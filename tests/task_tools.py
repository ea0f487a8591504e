"""What tests of tasks share: a small matrix with room for them, and what is written to it."""

from __future__ import annotations

from pathlib import Path

import torch

from trbatch.engine.calibration import Calibration
from trbatch.engine.matrix import Contexts, Matrix
from trbatch.engine.paths import PathCounts
from trbatch.engine.sequence import TaskKey
from trbatch.engine.tasks import Tasks

VOCAB = 50
CPU = torch.device("cpu")


class Room:
    """Tasks over a small matrix, and what is written to it."""

    def __init__(self, places: int = 2, *, vocab: int = VOCAB, model: str = "model") -> None:
        self.matrix = Matrix(slots=1, vocab_size=vocab, tasks=places, device=CPU, orders=0)
        self.calibration = Calibration(places, CPU)
        self.paths = [PathCounts() for _ in range(places)]
        self.tasks = Tasks(self.matrix, self.calibration, self.paths, places=places, model=model)

    def write(self, index: int, token: int, first: int) -> None:
        """Make `first` and those behind it the candidates after `token`."""
        at = Contexts(
            slots=torch.tensor([0]), tasks=torch.tensor([index]),
            tokens=torch.tensor([[token, token - 1, -1]]),
        )  # fmt: skip
        order = torch.tensor([0])
        row = torch.arange(first, first + self.matrix.candidates)[None]
        self.matrix.write(at, row, order, order)
        self.tasks.touch(index)

    def rows(self, index: int) -> torch.Tensor:
        return self.matrix.shared[index]


def cold(name: str, folder: Path, job: str = "job") -> TaskKey:
    """The task as a job opens it that wants to begin cold."""
    return TaskKey(name, folder, job, cold=True)
