"""How often each candidate came true, counted while decoding: the chances that trees are built on.

Counted by task, by depth in the tree and by cell (`candidates`: where its rows are from, which rank
they give it). A cell that was hardly seen takes the chance of its group. Saved with the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trbatch.engine.candidates import CELLS, cell_names, coarse_cells

DEPTHS = 4  # depths told apart: 0, 1, 2, 3 and more
PLACES = DEPTHS * CELLS  # of one task
_MOST = 0.98  # below 1, so that a child is always less likely than its parent
_GROUP_WEIGHT = 8.0  # observations that a group's chance is worth to its cells
_PRIOR_WEIGHT = 20.0  # observations that the prior is worth to a group
_MEMORY = 4000.0  # observations of one cell after which an old one counts half
_MOST_SEEN = _MEMORY / math.log(2)  # as many are kept where old ones fade with each new one
_REFRESH = (4, 64)  # steps between two looks at the counts, when few and when many are there

# What a first run knows, by origin and rank, measured with the small model on prompts that the
# published figures do not use. Counting replaces it within seconds.
_FIRST = (
    (0.150, 0.060, 0.050, 0.035, 0.020, 0.018, 0.016, 0.010),  # the model's bigram
    (0.170, 0.060, 0.050, 0.035, 0.020, 0.015, 0.015, 0.010),  # the task's row of one token
    (0.420, 0.080, 0.030, 0.025, 0.020, 0.020, 0.010, 0.010),  # of two
    (0.380, 0.090, 0.050, 0.035, 0.020, 0.020, 0.010, 0.010),  # own row of one token
    (0.570, 0.096, 0.050, 0.030, 0.025, 0.014, 0.014, 0.010),  # of two
    (0.720, 0.083, 0.036, 0.028, 0.014, 0.014, 0.009, 0.009),  # of three
)
_SECOND = (  # what only the second row has, by that row's origin
    (0.020, 0.010, 0.010, 0.007, 0.005, 0.005, 0.005, 0.003),
    (0.015, 0.008, 0.005, 0.004, 0.004, 0.004, 0.004, 0.003),
    (0.115, 0.024, 0.008, 0.006, 0.006, 0.005, 0.005, 0.004),
    (0.113, 0.032, 0.019, 0.010, 0.007, 0.006, 0.006, 0.004),
    (0.120, 0.030, 0.015, 0.010, 0.008, 0.006, 0.006, 0.005),
    (0.120, 0.030, 0.015, 0.010, 0.008, 0.006, 0.006, 0.005),
    (0.010,) * 8,
)
_SPINE = (0.80, 0.35, 0.90, 0.45)  # short match and the row agrees, it does not; the same if long
_BESIDE = 0.015  # other candidates there


class Calibration:
    """How often candidates came true.

    Args:
        tasks: counted apart.
        device: where the counts are.
    """

    def __init__(self, tasks: int, device: torch.device) -> None:
        self._tasks = tasks
        groups, count = coarse_cells()
        self._prior = _prior_of_groups(groups, count).to(device)
        by_depth = [groups + depth * count for depth in range(DEPTHS)]
        self._groups = torch.cat(by_depth).to(device)  # [PLACES]
        self._members = _members_of(torch.cat(by_depth)).to(device)  # [groups, most of one]
        # [task, true or seen, place]
        self._counts = torch.zeros(tasks, 2, PLACES, dtype=torch.float64, device=device)
        self._fresh = torch.zeros_like(self._counts)  # of it, since it was saved the last time
        self._steps = [0] * tasks  # counted
        self._due = [0] * tasks  # the step at which the chances are looked at again
        self._chances = torch.zeros(tasks, PLACES, device=device)
        self._listed: list[list[float] | None] = [None] * tasks
        for task in range(tasks):
            self._refresh(task)

    @property
    def chances(self) -> Tensor:
        """[tasks * PLACES] chance of each candidate, given that its row's own token came true."""
        return self._chances.view(-1)

    def listed(self, task: int) -> list[float]:
        """The chances of one task's places as a list."""
        known = self._listed[task]
        if known is None:
            known = self._listed[task] = self._chances[task].tolist()
        return known

    def count(self, places: Tensor, true: Tensor) -> None:
        """Count n candidates whose next token is now known.

        Args:
            places: [n] as `places_of` gives them.
            true: [n] bool, whether the candidate came true.
        """
        total = self._tasks * PLACES
        fresh = torch.stack(
            [torch.bincount(places[true], minlength=total), torch.bincount(places, minlength=total)]
        )
        by_task = fresh.view(2, self._tasks, PLACES).transpose(0, 1)
        self.absorb(by_task, (places // PLACES).unique().tolist())

    def absorb(self, fresh: Tensor, tasks: Iterable[int], *, steps: int = 1) -> None:
        """Take what was counted elsewhere, over one step or several, and set it to 0 there.

        Nothing here waits for the device.

        Args:
            fresh: [tasks, 2, PLACES] whole numbers: what came true, and what was seen.
            tasks: those of which anything may have been counted.
            steps: over which it was counted; observations counted together do not fade each other.
        """
        counted = fresh.to(self._counts)
        self._counts *= 0.5 ** (counted[:, 1:] / _MEMORY)
        self._counts += counted
        self._fresh += counted
        fresh.zero_()
        self._tick(set(tasks), steps)

    def count_few(self, places: Sequence[int], true: Sequence[bool]) -> None:
        """The same without tensor operations, for counts in the CPU's memory."""
        counts, fade = self._counts.numpy(), 0.5 ** (1 / _MEMORY)
        fresh = self._fresh.numpy()
        for place, came in zip(places, true, strict=True):
            task, at = divmod(place, PLACES)
            counts[task, 0, at] = counts[task, 0, at] * fade + came
            counts[task, 1, at] = counts[task, 1, at] * fade + 1.0
            fresh[task, 0, at] += came
            fresh[task, 1, at] += 1.0
        self._tick({place // PLACES for place in places})

    def of_task(self, task: int) -> Tensor:
        """[2, PLACES] what came true and what was seen, to be kept."""
        return self._counts[task].cpu().clone()

    def added_to(self, kept: Tensor | None, task: int) -> Tensor:
        """[2, PLACES] what others have kept, with what was counted here since `saved`."""
        if kept is None or not self._fits(kept):
            return self.of_task(task)
        fresh = self._fresh[task].cpu()
        both = kept.to(fresh) + fresh
        return both * (_MOST_SEEN / both[1].clamp(min=_MOST_SEEN))

    def saved(self, task: int) -> None:
        """What was counted so far is kept."""
        self._fresh[task] = 0.0

    def restore(self, task: int, counts: Tensor | None) -> None:
        """Go on from what was kept; None or what are no counts of this kind: begin anew."""
        known = counts is not None and self._fits(counts)
        self._counts[task] = counts.to(self._counts) if known and counts is not None else 0.0
        self._fresh[task] = 0.0
        self._steps[task] = self._due[task] = 0
        self._refresh(task)

    def _fits(self, counts: Tensor) -> bool:
        sound = counts.shape == self._counts[0].shape and counts.is_floating_point()
        return sound and bool((torch.isfinite(counts) & (counts >= 0)).all())

    def _tick(self, tasks: set[int], steps: int = 1) -> None:
        for task in tasks:
            self._steps[task] += steps
            if self._steps[task] >= self._due[task]:
                self._refresh(task)

    def _refresh(self, task: int) -> None:
        """Make a task's chances from its counts, and say when to do so again."""
        true, seen = self._counts[task]
        # Added up in one order, which `index_add_` has not on a GPU: a run can be repeated.
        groups = functional.pad(self._counts[task], (0, 1))[:, self._members].sum(2)
        of_group = (groups[0] + self._prior * _PRIOR_WEIGHT) / (groups[1] + _PRIOR_WEIGHT)
        chances = (true + of_group[self._groups] * _GROUP_WEIGHT) / (seen + _GROUP_WEIGHT)
        self._chances[task] = chances.clamp(max=_MOST)
        self._listed[task] = None
        often, seldom = _REFRESH
        self._due[task] = self._steps[task] + min(seldom, max(often, self._steps[task] // 8))


def _members_of(groups: Tensor) -> Tensor:
    """[n] groups -> [count, most] the places of each group; n, where there is none, behind them."""
    order = groups.sort(stable=True).indices
    sizes = groups.bincount()
    first = (sizes.cumsum(0) - sizes)[groups[order]]
    members = torch.full((len(sizes), int(sizes.max())), len(groups))
    members[groups[order], torch.arange(len(groups)) - first] = order
    return members


def _prior_of_groups(groups: Tensor, count: int) -> Tensor:
    """[DEPTHS * groups] the chance of each group before anything was counted."""
    prior = torch.zeros(count, dtype=torch.float64)
    for cell, (kind, origin, rank) in enumerate(cell_names()):
        if kind == "first":
            chance = _FIRST[origin][rank]
        elif kind == "second":
            chance = _SECOND[origin][rank]
        else:
            chance = _SPINE[origin] if kind == "spine" else _BESIDE
        prior[groups[cell]] = chance
    return prior.repeat(DEPTHS)


def place_of(task: int, depth: int) -> int:
    """Where the cells of a task and depth begin."""
    return (task * DEPTHS + min(depth, DEPTHS - 1)) * CELLS


def places_of(tasks: Tensor, depths: Tensor) -> Tensor:
    """`place_of` of tensors."""
    return (tasks * DEPTHS + depths.clamp(max=DEPTHS - 1)) * CELLS
