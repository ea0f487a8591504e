"""What may come at a place: the candidates of its two rows and of its spine, each with its cell.

A cell is what is known of a candidate before the model has spoken: where the two rows are from and
which rank each gives it. Candidates of one cell come true equally often, so chances are counted by
cell (`calibration`). Cells are numbered from 0 within a depth:

    rows of origins (a, b):  rank in the first row and, roughly, in the second; or in that alone
    spine of kind s:         the token that the repeated passage expects, then the rows' others

The likeliest are expected first, so the order is: spine, first row, what the second row adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.matrix import CANDIDATES, NOWHERE, ORIGINS, Found
from trbatch.engine.spine import LONG, NO_TOKEN

RANKS = CANDIDATES
BEHIND = (0, 1, 2, 2, 3, 3, 3, 3)  # of a rank in the second row, where the first has it too
ABSENT = 4  # the first row has it, the second has not
STEPS = ABSENT + 1
PAIR_CELLS = RANKS * STEPS + RANKS  # of two origins
ROW_CELLS = ORIGINS * (NOWHERE + 1) * PAIR_CELLS
SPINES = 4  # short or long match, and whether the first row agrees
SPINE_CELLS = 1 + 2 * RANKS  # of one kind of spine
CELLS = ROW_CELLS + SPINES * SPINE_CELLS
WIDTH = 2 * RANKS + 1  # candidates of a place, at most


@dataclass(frozen=True, slots=True)
class Candidates:
    """Of n places. `tokens`: [n, W], -1 for none, none twice; `cells`: [n, W]."""

    tokens: Tensor
    cells: Tensor


def of_rows(found: Found, expected: Tensor, matched: Tensor) -> Candidates:
    """The candidates of n places.

    Args:
        expected: [n] the token that a spine expects, -1 where there is none.
        matched: [n] tokens of the match that leads there.
    """
    first, second = found.rows.unbind(1)
    k = first.shape[1]
    rank = torch.arange(k, device=first.device)
    same = (first[:, :, None] == second[:, None, :]) & (first >= 0)[:, :, None]
    behind = torch.tensor(BEHIND, device=first.device)[same.int().argmax(2)]
    behind = behind.where(same.any(2), ABSENT)
    base = (found.origins[:, :1] * (NOWHERE + 1) + found.origins[:, 1:]) * PAIR_CELLS
    cells = torch.cat([base + rank * STEPS + behind, base + RANKS * STEPS + rank], dim=1)
    tokens = torch.cat([first, second.masked_fill(same.any(1), -1)], dim=1)
    there = (expected != NO_TOKEN)[:, None]
    kind = 2 * (matched >= LONG).long() + (first[:, 0] != expected).long()
    spine = (ROW_CELLS + kind * SPINE_CELLS)[:, None]
    ranks = torch.arange(2 * RANKS, device=first.device)
    ranks = torch.cat([ranks[:k], ranks[RANKS : RANKS + k]])
    cells = torch.where(there, spine + 1 + ranks, cells)
    tokens = tokens.masked_fill(there & (tokens == expected[:, None]), -1)
    return Candidates(
        torch.cat([expected[:, None], tokens], dim=1), torch.cat([spine, cells], dim=1)
    )


def of_row(
    first: Sequence[int],
    origin: int,
    second: Sequence[int],
    behind: int,
    expected: int = NO_TOKEN,
    matched: int = 0,
) -> list[tuple[int, int]]:
    """(token, cell) of each candidate of one place: `of_rows` without tensor operations."""
    ranks = {token: rank for rank, token in enumerate(second)}
    base = (origin * (NOWHERE + 1) + behind) * PAIR_CELLS
    found = {}
    for rank, token in enumerate(first):
        if token >= 0:
            step = BEHIND[ranks[token]] if token in ranks else ABSENT
            found[token] = base + rank * STEPS + step
    for token, rank in ranks.items():
        if token >= 0 and token not in found:
            found[token] = base + RANKS * STEPS + rank
    if expected == NO_TOKEN:
        return list(found.items())
    kind = 2 * (matched >= LONG) + (first[0] != expected)
    spine = ROW_CELLS + kind * SPINE_CELLS
    others = [(t, spine + 1 + r) for r, t in enumerate(first) if t >= 0]
    have = set(first)
    others += [(t, spine + 1 + RANKS + r) for r, t in enumerate(second) if t >= 0 and t not in have]
    return [(expected, spine), *((t, cell) for t, cell in others if t != expected)]


def cell_names() -> list[tuple[str, int, int]]:
    """(kind, origin or kind of spine, rank) of each cell, whatever its other row says."""
    names: list[tuple[str, int, int]] = []
    for origin in range(ORIGINS):
        for behind in range(NOWHERE + 1):
            names += [("first", origin, rank) for rank in range(RANKS) for _ in range(STEPS)]
            names += [("second", behind, rank) for rank in range(RANKS)]
    for kind in range(SPINES):
        names.append(("spine", kind, 0))
        names += [("beside", kind, rank) for rank in range(2 * RANKS)]
    return names


def coarse_cells() -> tuple[Tensor, int]:
    """[CELLS] the group of each cell, and how many groups there are.

    A group holds the cells of one name: its chance stands in until a cell has one of its own.
    """
    numbers: dict[tuple[str, int, int], int] = {}
    groups = [numbers.setdefault(name, len(numbers)) for name in cell_names()]
    return torch.tensor(groups), len(numbers)
