"""The search of `best_first.expand` for a CPU: one heap of nodes instead of tensors level by level.

A tree of a few nodes needs a few rows. Reading these one at a time takes a fraction of a
millisecond where the tensor operations of twelve levels take five. The slow twin is
`best_first.expand` with `take_likeliest` and `build`; both find the same nodes (ties apart).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

from trbatch.engine.best_first import MAX_DEPTH, Calibration, kind
from trbatch.engine.drafting import Draft
from trbatch.engine.matrix import ORDERS, Matrix, RowReader


@dataclass(frozen=True, slots=True)
class Node:
    """A drafted token of one sequence. `parent` is an index into the nodes found, -1 the root."""

    chance: float
    member: int
    parent: int
    depth: int
    context: tuple[int, ...]  # 3 tokens, newest (its own) first


# The least leaves the heap first: the likeliest, then by sequence, parent and rank.
_Entry = tuple[float, int, int, int, Node]


def search(
    matrix: Matrix,
    calibration: Calibration,
    slots: Tensor,
    tasks: Tensor,
    last: Tensor,
    *,
    most: int,
    least: float,
) -> list[Node]:
    """The likeliest nodes of B sequences together, falling; a parent comes before its children.

    Args:
        slots, tasks: [B] whose rows.
        last: [B, 3] last committed tokens, newest first.
        most: nodes of one sequence.
        least: chance below which a node is not worth its place.
    """
    reader = matrix.reader()
    chances = calibration.chances(last.device).tolist()
    where = list(zip(slots.tolist(), tasks.tolist(), strict=True))
    found: list[Node] = []
    counts = [0] * len(where)
    heap: list[_Entry] = []
    for member, context in enumerate(last.tolist()):
        root = Node(1.0, member, -1, 0, tuple(context))
        _push_children(heap, root, -1, reader, where[member], chances, least)
    while heap:
        *_, node = heappop(heap)
        if counts[node.member] == most:
            continue
        counts[node.member] += 1
        found.append(node)
        if node.depth < MAX_DEPTH:
            at = where[node.member]
            _push_children(heap, node, len(found) - 1, reader, at, chances, least)
    return found


def _push_children(
    heap: list[_Entry],
    node: Node,
    index: int,
    reader: RowReader,
    where: tuple[int, int],
    chances: list[list[float]],
    least: float,
) -> None:
    row, origin = reader.find(*where, node.context)
    older = node.context[: ORDERS - 1]
    ranked = zip(row, chances[kind(node.depth, origin)], strict=True)
    for rank, (token, chance) in enumerate(ranked):
        reached = node.chance * chance
        if token >= 0 and reached >= least:
            child = Node(reached, node.member, index, node.depth + 1, (token, *older))
            heappush(heap, (-reached, node.member, index, rank, child))


def build(nodes: Sequence[Node], last: Tensor) -> Draft:
    """The trees of nodes as `search` gives them (any first part of its list).

    Args:
        last: [B, 3] the roots' contexts.
    """
    batch = last.shape[0]
    sizes = [1] * batch
    places = []  # of each node in its tree; 0 is the root
    for node in nodes:
        places.append(sizes[node.member])
        sizes[node.member] += 1
    width = max(sizes)
    contexts = torch.full((batch, width, ORDERS), -1)
    contexts[:, 0] = last
    parents, depths = torch.zeros(2, batch, width, dtype=torch.long)
    ancestors = torch.eye(width, dtype=torch.bool).repeat(batch, 1, 1)
    written, above, deep, seen = (
        contexts.numpy(),
        parents.numpy(),
        depths.numpy(),
        ancestors.numpy(),
    )
    for node, place in zip(nodes, places, strict=True):
        member, parent = node.member, places[node.parent] if node.parent >= 0 else 0
        written[member, place] = node.context
        above[member, place], deep[member, place] = parent, node.depth
        seen[member, place] |= seen[member, parent]
    seen[:, :, 0] = True
    return Draft(
        tokens=contexts[:, :, 0],
        parents=parents,
        depths=depths,
        ancestors=ancestors,
        contexts=contexts,
        sizes=sizes,
    )
