"""How often each candidate came true, counted while decoding: the chances that trees are built on.

A candidate's chance depends on where its row came from (the text's own continuation of a repeated
passage; the last 3, 2 or 1 tokens of this very text; the task's matrix), on its rank, and on how
deep it stands. Counted per task, saved with the task's matrix.
"""

from __future__ import annotations

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
        self._ranks, self._tasks = candidates, tasks
        # [task, kind, rank]; the last rank counts rows that did not hold the token.
        self._counts = torch.zeros(tasks, DEPTHS * ORIGINS, candidates + 1, dtype=torch.float64)
        prior = torch.zeros(DEPTHS, ORIGINS, candidates + 1, dtype=torch.float64)
        ranks = min(candidates, len(_PRIOR[0]))
        prior[:, :, :ranks] = torch.tensor(_PRIOR, dtype=torch.float64)[:, :ranks]
        self._prior = prior.flatten(0, 1) * _PRIOR_WEIGHT
        self._chances: Tensor | None = None

    def chances(self, device: torch.device) -> Tensor:
        """[tasks * kinds, k] chance of each rank, given that the row's own token came true."""
        if self._chances is None:
            seen = self._counts.sum(2, keepdim=True) + _PRIOR_WEIGHT
            chances = ((self._counts + self._prior) / seen)[:, :, : self._ranks]
            self._chances = chances.clamp(max=_MOST).float().flatten(0, 1).to(device)
        return self._chances

    def count(self, kinds: Tensor, rows: Tensor, truth: Tensor) -> None:
        """Count n rows whose next token is now known.

        Args:
            kinds: [n] as `kinds_of` gives them.
            rows: [n, k].
            truth: [n] the token that came.
        """
        hit = rows == truth[:, None]
        rank = torch.where(hit.any(1), hit.int().argmax(1), self._ranks)
        seen = torch.bincount(kinds * (self._ranks + 1) + rank, minlength=self._counts.numel())
        fresh = seen.view_as(self._counts).to(self._counts)
        self._counts *= 0.5 ** (fresh.sum(2, keepdim=True) / _MEMORY)
        self._counts += fresh
        self._chances = None

    def of_task(self, task: int) -> Tensor:
        """[kinds, k + 1] what was counted, to be kept."""
        return self._counts[task].clone()

    def restore(self, task: int, counts: Tensor | None) -> None:
        """Go on from what was kept; None or counts of another shape: begin anew."""
        known = counts is not None and counts.shape == self._counts[task].shape
        self._counts[task] = counts.to(self._counts) if known and counts is not None else 0.0
        self._chances = None


def kind_of(task: int, depth: int, origin: int) -> int:
    """Index into a calibration's rows."""
    return (task * DEPTHS + min(depth, DEPTHS - 1)) * ORIGINS + origin


def kinds_of(tasks: Tensor, depths: Tensor, origins: Tensor) -> Tensor:
    """`kind_of` of tensors."""
    return (tasks * DEPTHS + depths.clamp(max=DEPTHS - 1)) * ORIGINS + origins
