"""Draft trees that go where they are likely to be right.

`Calibration` knows each candidate's chance to come true. The chance of a node is the product along
its path; a sequence whose rows are sure gets a deep chain, one that knows little few nodes, and the
batch's nodes go to whichever sequences use them best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trbatch.engine import candidates
from trbatch.engine.ahead import Ahead
from trbatch.engine.calibration import Calibration, places_of
from trbatch.engine.drafting import Draft, find_rows
from trbatch.engine.matrix import ORDERS, Matrix

MAX_DEPTH = 12
WIDEST = 32  # nodes that are kept a level when a whole search must be quick


@dataclass(frozen=True, slots=True)
class Nodes:
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
    ahead: Ahead | None = None,
    *,
    width: int,
    least: float = 0.0,
    enough: int = 0,
) -> Nodes | None:
    """Search level by level, keeping the `width` likeliest nodes of each.

    Args:
        last: [B, 3] last committed tokens, newest first.
        ahead: what the sequences' spines expect.
        width: nodes kept a level.
        least: chance below which a node is not worth its place; ends the search.
        enough: nodes a sequence will get; the search ends when no deeper one can be among them.

    Returns:
        The nodes found, None if there are none.
    """
    batch = last.shape[0]
    # The chances of a level sum up to about 1: not many more than this can be worth their place.
    width = min(width, int(2 / least) + 1) if least > 0 else width
    chance = torch.ones(batch, 1, device=last.device)
    contexts = last[:, None]
    parts: list[tuple[Tensor, ...]] = []
    start = 0
    on_spine = torch.ones(batch, 1, dtype=torch.bool, device=last.device)
    for depth in range(MAX_DEPTH):
        count = contexts.shape[1]
        expected, matched = _expected(ahead, on_spine, depth)
        found = candidates.of_rows(
            find_rows(matrix, slots, tasks, contexts), expected.flatten(), matched.flatten()
        )
        places = places_of(tasks, torch.full_like(tasks, depth)).repeat_interleave(count)
        each = calibration.chances[places[:, None] + found.cells] * (found.tokens >= 0)
        flat = (chance.flatten()[:, None] * each).view(batch, -1)
        k = each.shape[1]
        chance, at = _likeliest(flat, min(width, count * k))
        if float(chance[:, 0].max()) < least or _cannot_matter(parts, chance, enough):
            break
        above = at // k
        on_spine = (expected.gather(1, above) >= 0) & (at % k == 0)
        older = contexts.gather(1, above[:, :, None].expand(-1, -1, ORDERS))[:, :, : ORDERS - 1]
        tokens = found.tokens.view(batch, -1).gather(1, at)
        contexts = torch.cat([tokens[:, :, None], older], dim=2)
        parents = above + (start - count) if depth else torch.full_like(above, -1)
        parts.append((tokens, parents, torch.full_like(tokens, depth + 1), contexts, chance))
        start += chance.shape[1]
    if not parts:
        return None
    return Nodes(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


def _expected(ahead: Ahead | None, on_spine: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """[B, n] what the spine expects after each place, -1 off it, and how long its match is."""
    if ahead is None:
        nothing = torch.full_like(on_spine, -1, dtype=torch.long)
        return nothing, nothing
    expected = torch.where(on_spine, ahead.tokens[:, depth, None], -1)
    return expected, (ahead.matched[:, None] + depth).expand_as(expected)


def _cannot_matter(parts: list[tuple[Tensor, ...]], chance: Tensor, enough: int) -> bool:
    """Whether each sequence has `enough` nodes already that are likelier than any new one."""
    if not enough or sum(part[-1].shape[1] for part in parts) < enough:
        return False
    known = torch.cat([part[-1] for part in parts], dim=1)
    return bool((known.topk(enough, dim=1).values[:, -1] >= chance[:, 0]).all())


def _likeliest(chances: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row of [B, n] chances and their places, falling.

    Of equal chances the first comes first, on every device: a chance and its place are packed into
    one number, since the bits of positive floats rise with them.
    """
    end = chances.shape[1] - 1
    places = torch.arange(end, -1, -1, device=chances.device)
    packed = chances.view(torch.int32).long() << 32 | places
    at = end - (packed.topk(count, dim=1).values & 0xFFFFFFFF)
    return chances.gather(1, at), at


def limit(found: Nodes, most: int) -> Nodes:
    """Without all but the `most` likeliest nodes of each sequence: their chances become 0."""
    kept, at = _likeliest(found.chances, min(most, found.chances.shape[1]))
    chances = torch.zeros_like(found.chances).scatter_(1, at, kept)
    return replace(found, chances=chances)


def take_likeliest(found: Nodes, count: int, *, each: bool) -> Tensor:
    """Mark nodes to verify: the `count` likeliest of all, or of each sequence. [B, C] bool.

    A child is less likely than its parent, so whatever is taken is a tree.
    """
    chances = found.chances if each else found.chances.flatten()[None]
    best, at = _likeliest(chances, min(count, chances.shape[1]))
    marked = torch.zeros_like(chances, dtype=torch.bool)
    marked.scatter_(1, at, best > 0)
    return marked.view_as(found.chances)


def falling_chances(found: Nodes) -> list[float]:
    """The chances of all candidates of all sequences, the likeliest first."""
    chances: list[float] = found.chances.flatten().sort(descending=True).values.tolist()
    return chances


def build(found: Nodes, taken: Tensor, last: Tensor) -> Draft:
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
