"""Draft trees that go where they are likely to be right.

A candidate's chance to come true depends on where its row came from (the last 3, 2 or 1 tokens of
this very text, or the task's matrix), on its rank, and on how deep it stands. `Calibration` counts
that while decoding. The chance of a node is the product along its path; a sequence whose rows are
sure gets a deep chain, one that knows little gets few nodes, and the batch's nodes go to whichever
sequences use them best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trbatch.engine.drafting import Draft, find_rows
from trbatch.engine.matrix import ORDERS, Matrix

MAX_DEPTH = 12
_DEPTHS = 4  # depths told apart: 0, 1, 2, 3 and more
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
)


class Calibration:
    """How often the candidate of each rank came true, by depth and origin of its row.

    Args:
        candidates: k.
    """

    def __init__(self, candidates: int) -> None:
        self._ranks = candidates
        kinds = _DEPTHS * (ORDERS + 1)
        # [kind, rank]; the last rank counts rows that did not hold the token.
        self._counts = torch.zeros(kinds, candidates + 1, dtype=torch.float64)
        prior = torch.zeros(kinds, candidates + 1, dtype=torch.float64)
        for depth in range(_DEPTHS):
            for origin, ranks in enumerate(_PRIOR):
                chances = ranks[:candidates]
                prior[depth * (ORDERS + 1) + origin, : len(chances)] = torch.tensor(
                    chances, dtype=torch.float64
                )
        self._prior = prior * _PRIOR_WEIGHT
        self._chances: Tensor | None = None

    def clear(self) -> None:
        """Forget what was counted."""
        self._counts.zero_()
        self._chances = None

    def chances(self, device: torch.device) -> Tensor:
        """[kinds, k] chance of each rank, given that the row's own token came true."""
        if self._chances is None:
            seen = self._counts.sum(1, keepdim=True) + _PRIOR_WEIGHT
            chances = (self._counts + self._prior) / seen
            self._chances = chances[:, : self._ranks].clamp(max=_MOST).float().to(device)
        return self._chances

    def count(self, depths: Tensor, origins: Tensor, rows: Tensor, truth: Tensor) -> None:
        """Count n rows whose next token is now known.

        Args:
            depths: [n] of the nodes that the rows belong to.
            origins: [n] where the rows came from.
            rows: [n, k].
            truth: [n] the token that came.
        """
        hit = rows == truth[:, None]
        rank = torch.where(hit.any(1), hit.int().argmax(1), self._ranks)
        kind_of = kinds(depths, origins)
        seen = torch.bincount(
            kind_of * (self._ranks + 1) + rank, minlength=self._counts.numel()
        ).view_as(self._counts)
        fresh = seen.to(self._counts)
        self._counts *= 0.5 ** (fresh.sum(1, keepdim=True) / _MEMORY)
        self._counts += fresh
        self._chances = None


def kind(depth: int, origin: int) -> int:
    """Index into a calibration's rows."""
    return min(depth, _DEPTHS - 1) * (ORDERS + 1) + origin


def kinds(depths: Tensor, origins: Tensor) -> Tensor:
    """`kind` of tensors."""
    return depths.clamp(max=_DEPTHS - 1) * (ORDERS + 1) + origins


@dataclass(frozen=True, slots=True)
class Candidates:
    """All nodes worth a thought of B sequences, level after level, C in all; the root is not one.

    `parents`: [B, C] index of the parent among the candidates, -1 for the root.
    """

    tokens: Tensor  # [B, C]
    parents: Tensor  # [B, C]
    depths: Tensor  # [B, C]
    contexts: Tensor  # [B, C, 3]
    chances: Tensor  # [B, C] that the whole path up to here comes true; 0 for absent ones


def expand(
    matrix: Matrix,
    calibration: Calibration,
    slots: Tensor,
    tasks: Tensor,
    last: Tensor,
    *,
    width: int,
    least: float = 0.0,
    enough: int = 0,
) -> Candidates | None:
    """Search level by level, keeping the `width` likeliest nodes of each.

    Args:
        last: [B, 3] last committed tokens, newest first.
        width: nodes kept a level.
        least: chance below which a node is not worth its place; ends the search.
        enough: nodes a sequence will get; the search ends when no deeper one can be among them.

    Returns:
        The nodes found, None if there are none.
    """
    batch = last.shape[0]
    # The chances of a level sum up to 1 at most: no more than this can be worth their place.
    width = min(width, int(1 / least) + 1) if least > 0 else width
    chance = torch.ones(batch, 1, device=last.device)
    contexts = last[:, None]
    parts: list[tuple[Tensor, ...]] = []
    start = 0
    for depth in range(MAX_DEPTH):
        rows, origins = find_rows(matrix, slots, tasks, contexts)
        count, k = rows.shape[1:]
        kind_of = kinds(torch.full_like(origins, depth), origins)
        each = calibration.chances(last.device)[kind_of] * (rows >= 0)
        flat = (chance[:, :, None] * each).view(batch, -1)
        chance, at = flat.topk(min(width, count * k), dim=1)
        if float(chance[:, 0].max()) < least or _cannot_matter(parts, chance, enough):
            break
        above = at // k
        older = contexts.gather(1, above[:, :, None].expand(-1, -1, ORDERS))[:, :, : ORDERS - 1]
        tokens = rows.view(batch, -1).gather(1, at)
        contexts = torch.cat([tokens[:, :, None], older], dim=2)
        parents = above + (start - count) if depth else torch.full_like(above, -1)
        parts.append((tokens, parents, torch.full_like(tokens, depth + 1), contexts, chance))
        start += chance.shape[1]
    if not parts:
        return None
    return Candidates(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


def _cannot_matter(parts: list[tuple[Tensor, ...]], chance: Tensor, enough: int) -> bool:
    """Whether each sequence has `enough` nodes already that are likelier than any new one."""
    if not enough or sum(part[-1].shape[1] for part in parts) < enough:
        return False
    known = torch.cat([part[-1] for part in parts], dim=1)
    return bool((known.topk(enough, dim=1).values[:, -1] >= chance[:, 0]).all())


def limit(found: Candidates, most: int) -> Candidates:
    """Without all but the `most` likeliest nodes of each sequence: their chances become 0."""
    kept = found.chances.topk(min(most, found.chances.shape[1]), dim=1)
    chances = torch.zeros_like(found.chances).scatter_(1, kept.indices, kept.values)
    return replace(found, chances=chances)


def take_likeliest(found: Candidates, count: int, *, each: bool) -> Tensor:
    """Mark nodes to verify: the `count` likeliest of all, or of each sequence. [B, C] bool.

    A child is less likely than its parent, so whatever is taken is a tree.
    """
    chances = found.chances if each else found.chances.flatten()[None]
    best = chances.topk(min(count, chances.shape[1]), dim=1)
    marked = torch.zeros_like(chances, dtype=torch.bool)
    marked.scatter_(1, best.indices, best.values > 0)
    return marked.view_as(found.chances)


def falling_chances(found: Candidates) -> list[float]:
    """The chances of all candidates of all sequences, the likeliest first."""
    chances: list[float] = found.chances.flatten().sort(descending=True).values.tolist()
    return chances


def build(found: Candidates, taken: Tensor, last: Tensor) -> Draft:
    """The trees of the taken nodes, padded to the largest.

    Args:
        taken: [B, C] bool, closed under parents.
        last: [B, 3] the roots' contexts.
    """
    batch, total = taken.shape
    place = taken.long().cumsum(1)  # a taken node's index in its tree; the root is 0
    counts = place[:, -1]
    width = int(counts.max())
    # Candidates stand level after level, so their order is one with parents first.
    order = torch.where(taken, torch.arange(total, device=last.device), total)
    order = order.sort(dim=1).values[:, :width]
    there = order < total
    order = order.clamp(max=total - 1)

    def pick(column: Tensor, absent: int) -> Tensor:
        return torch.where(there, column.gather(1, order), absent)

    above = pick(found.parents, -1)
    parents = torch.where(above < 0, 0, place.gather(1, above.clamp(min=0)))
    zero = last.new_zeros(batch, 1)
    parents = torch.cat([zero, parents], dim=1)
    depths = torch.cat([zero, pick(found.depths, 0)], dim=1)
    contexts = found.contexts.gather(1, order[:, :, None].expand(-1, -1, ORDERS))
    contexts = torch.where(there[:, :, None], contexts, -1)
    return Draft(
        tokens=torch.cat([last[:, :1], pick(found.tokens, -1)], dim=1),
        parents=parents,
        depths=depths,
        ancestors=_ancestors(parents, int(depths.max())),
        contexts=torch.cat([last[:, None], contexts], dim=1),
        sizes=[count + 1 for count in counts.tolist()],
    )


def _ancestors(parents: Tensor, deepest: int) -> Tensor:
    """[B, T] parents -> [B, T, T] bool; one more generation a round."""
    batch, size = parents.shape
    itself = torch.eye(size, dtype=torch.bool, device=parents.device).expand(batch, -1, -1)
    ancestors, index = itself, parents[:, :, None].expand(-1, -1, size)
    for _ in range(deepest):
        ancestors = itself | ancestors.gather(1, index)
    return ancestors
