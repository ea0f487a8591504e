"""How often each candidate came true, counted while decoding: the chances that trees are built on.

A candidate's chance depends on where its row came from (the text's own continuation of a repeated
passage; the last 3, 2 or 1 tokens of this very text; the task's matrix), on its rank, and on how
deep it stands. Counted per task, saved with the task's matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trbatch.engine.matrix import ORDERS

DEPTHS = 4  # depths told apart: 0, 1, 2, 3 and more
# Where a row came from: 0 the task's matrix, 1 to 3 an own row of so many tokens, then the spine's.
SPINE = ORDERS + 1
ORIGINS = SPINE + 4  # short or long match, and whether the row's first candidate agreed
_MOST = 0.98  # below 1, so that a child is always less likely than its parent
_PRIOR_WEIGHT = 20.0  # observations that the prior is worth
_MEMORY = 4000.0  # observations of one kind after which an old one counts half

# What a first run knows, measured once with the small model: the chance of each rank by origin.
# Counting replaces it within seconds.
_PRIOR = (
    (0.100, 0.035, 0.020, 0.015, 0.012, 0.010, 0.008, 0.005),  # the task's matrix, when cold
    (0.350, 0.110, 0.070, 0.040, 0.030, 0.022, 0.015, 0.014),  # own row of the last token
    (0.530, 0.130, 0.055, 0.035, 0.022, 0.013, 0.012, 0.007),  # of the last two
    (0.700, 0.100, 0.040, 0.022, 0.012, 0.011, 0.008, 0.007),  # of the last three
    (0.750, 0.080, 0.030, 0.018, 0.010, 0.009, 0.007, 0.006),  # short spine, the row agrees
    (0.300, 0.350, 0.070, 0.030, 0.020, 0.012, 0.010, 0.007),  # short spine, it does not
    (0.850, 0.050, 0.020, 0.012, 0.008, 0.006, 0.005, 0.004),  # long spine, the row agrees
    (0.400, 0.300, 0.060, 0.030, 0.020, 0.012, 0.010, 0.007),  # long spine, it does not
)


class Calibration:
    """How often the candidate of each rank came true, by task, depth and origin of its row.

    Args:
        candidates: k.
        tasks: counted apart.
    """

    def __init__(self, candidates: int, tasks: int = 1) -> None:
        # [task, true or seen, kind, rank]: a rank is seen where its row has a candidate there.
        self._counts = torch.zeros(tasks, 2, DEPTHS * ORIGINS, candidates, dtype=torch.float64)
        prior = torch.zeros(DEPTHS, ORIGINS, candidates, dtype=torch.float64)
        ranks = min(candidates, len(_PRIOR[0]))
        prior[:, :, :ranks] = torch.tensor(_PRIOR, dtype=torch.float64)[:, :ranks]
        self._prior = prior.flatten(0, 1) * _PRIOR_WEIGHT
        self._chances: Tensor | None = None
        self._listed: list[list[float]] | None = None

    def chances(self, device: torch.device) -> Tensor:
        """[tasks * kinds, k] chance of each candidate, given that the row's own token came true."""
        if self._chances is None:
            true, seen = self._counts.unbind(1)
            chances = (true + self._prior) / (seen + _PRIOR_WEIGHT)
            self._chances = chances.clamp(max=_MOST).float().flatten(0, 1).to(device)
        return self._chances

    def listed(self) -> list[list[float]]:
        """`chances` as lists: for a CPU, which `count_one` keeps up to date."""
        if self._listed is None:
            self._listed = self.chances(torch.device("cpu")).tolist()
        return self._listed

    def count(self, kinds: Tensor, rows: Tensor, truth: Tensor) -> None:
        """Count n rows whose next token is now known.

        Args:
            kinds: [n] as `kinds_of` gives them.
            rows: [n, k] candidates, -1 where there is none.
            truth: [n] the token that came.
        """
        fresh = torch.zeros_like(self._counts).transpose(0, 1).flatten(1, 2)  # [2, kinds, k]
        fresh[0].index_add_(0, kinds.cpu(), (rows == truth[:, None]).to(fresh).cpu())
        fresh[1].index_add_(0, kinds.cpu(), (rows >= 0).to(fresh).cpu())
        by_task = fresh.view_as(self._counts.transpose(0, 1)).transpose(0, 1)
        self._counts *= 0.5 ** (by_task[:, 1:] / _MEMORY)
        self._counts += by_task
        self._chances = self._listed = None

    def count_one(self, kind: int, row: Sequence[int], truth: int) -> None:
        """`count` of one row, without tensor operations."""
        task, place = divmod(kind, DEPTHS * ORIGINS)
        true, seen = self._counts.numpy()[task, :, place]
        prior = self._prior[place].tolist()
        fade, listed = 0.5 ** (1 / _MEMORY), self.listed()[kind]
        for rank, token in enumerate(row):
            if token < 0:
                continue
            true[rank] = true[rank] * fade + (token == truth)
            seen[rank] = seen[rank] * fade + 1.0
            chance = (true[rank] + prior[rank]) / (seen[rank] + _PRIOR_WEIGHT)
            listed[rank] = min(_MOST, float(chance))
        self._chances = None

    def of_task(self, task: int) -> Tensor:
        """[2, kinds, k] what came true and what was seen, to be kept."""
        return self._counts[task].clone()

    def restore(self, task: int, counts: Tensor | None) -> None:
        """Go on from what was kept; None or counts of another shape: begin anew."""
        known = counts is not None and counts.shape == self._counts[task].shape
        self._counts[task] = counts.to(self._counts) if known and counts is not None else 0.0
        self._chances = self._listed = None


def kind_of(task: int, depth: int, origin: int) -> int:
    """Index into a calibration's rows."""
    return (task * DEPTHS + min(depth, DEPTHS - 1)) * ORIGINS + origin


def kinds_of(tasks: Tensor, depths: Tensor, origins: Tensor) -> Tensor:
    """`kind_of` of tensors."""
    return (tasks * DEPTHS + depths.clamp(max=DEPTHS - 1)) * ORIGINS + origins
