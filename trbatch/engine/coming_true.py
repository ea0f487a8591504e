"""Which candidates came true along the accepted paths of a step: what `calibration` counts."""

from __future__ import annotations

import torch
from torch import Tensor

from trbatch.engine import candidates, drafting
from trbatch.engine.ahead import Ahead
from trbatch.engine.calibration import Calibration, places_of
from trbatch.engine.drafting import Draft
from trbatch.engine.matrix import ORDERS, Matrix
from trbatch.engine.verify import Verdict


def count_paths(
    matrix: Matrix,
    calibration: Calibration,
    drafted: Draft,
    verdict: Verdict,
    slots: Tensor,
    tasks: Tensor,
    ahead: Ahead | None,
) -> list[list[int]]:
    """Count the candidates of every accepted node, before rows change.

    Args:
        slots, tasks: [B] whose rows drafted.
        ahead: what the spines expected.

    Returns:
        For each sequence and accepted node the rank that its first row gave the token which came
        next, -1 where it had not.
    """
    there = verdict.nodes >= 0
    nodes = verdict.nodes.clamp(min=0).long()
    index = nodes[:, :, None].expand(-1, -1, ORDERS)
    depths = drafted.depths.gather(1, nodes)
    expected, matched = torch.full_like(nodes, -1), depths
    if ahead is not None:
        expected = ahead.tokens[:, : nodes.shape[1]]
        expected = expected.where(ahead.on_spine(verdict.tokens), -1)
        matched = ahead.matched[:, None] + depths
    rows = drafting.find_rows(matrix, slots, tasks, drafted.contexts.gather(1, index))
    found = candidates.of_rows(rows, expected.flatten(), matched.flatten())
    places = places_of(tasks[:, None], depths).flatten()[:, None] + found.cells
    true = found.tokens == verdict.tokens.flatten()[:, None]
    counted = there.flatten()[:, None] & (found.tokens >= 0)
    calibration.count(places[counted], true[counted])
    hit = rows.rows[:, 0] == verdict.tokens.flatten()[:, None]
    ranks = torch.where(hit.any(1), hit.int().argmax(1), -1).view_as(nodes)
    return [row[: sum(path)] for row, path in zip(ranks.tolist(), there.tolist(), strict=True)]
