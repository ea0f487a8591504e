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

from trbatch.engine import candidates
from trbatch.engine.ahead import Ahead
from trbatch.engine.best_first import MAX_DEPTH
from trbatch.engine.calibration import Calibration, place_of
from trbatch.engine.drafting import Draft
from trbatch.engine.host_rows import HostRows, Row
from trbatch.engine.matrix import ORDERS
from trbatch.engine.spine import NO_TOKEN
from trbatch.engine.verify import Verdict


@dataclass(frozen=True, slots=True)
class Node:
    """A drafted token of one sequence. `parent` is an index into the nodes found, -1 the root."""

    chance: float
    member: int
    parent: int
    depth: int
    context: tuple[int, ...]  # 3 tokens, newest (its own) first
    on_spine: bool = True


# The least leaves the heap first: the likeliest, then by sequence, parent and rank.
_Entry = tuple[float, int, int, int, Node]


def search(
    matrix: HostRows,
    calibration: Calibration,
    slots: Tensor,
    tasks: Tensor,
    last: Tensor,
    ahead: Ahead | None = None,
    *,
    most: int,
    least: float,
) -> list[Node]:
    """The likeliest nodes of B sequences together, falling; a parent comes before its children.

    Args:
        slots, tasks: [B] whose rows.
        last: [B, 3] last committed tokens, newest first.
        ahead: what the sequences' spines expect.
        most: nodes of one sequence.
        least: chance below which a node is not worth its place.
    """
    rows = _Rows(matrix, calibration, slots, tasks, ahead)
    found: list[Node] = []
    counts = [0] * len(slots)
    heap: list[_Entry] = []
    for member, context in enumerate(last.tolist()):
        _push_children(heap, Node(1.0, member, -1, 0, tuple(context)), -1, rows, least)
    while heap:
        *_, node = heappop(heap)
        if counts[node.member] == most:
            continue
        counts[node.member] += 1
        found.append(node)
        if node.depth < MAX_DEPTH:
            _push_children(heap, node, len(found) - 1, rows, least)
    return found


class _Rows:
    """Candidates of single places with their chances."""

    def __init__(
        self, matrix: HostRows, calibration: Calibration, slots: Tensor, tasks: Tensor,
        ahead: Ahead | None,
    ) -> None:  # fmt: skip
        self._reader, self._calibration = matrix, calibration
        self._slots, self._tasks = slots.tolist(), tasks.tolist()
        self._expected = None if ahead is None else ahead.tokens.tolist()
        self._matched = None if ahead is None else ahead.matched.tolist()

    def after(
        self, member: int, context: Sequence[int], depth: int, *, on_spine: bool
    ) -> tuple[list[tuple[int, int]], bool]:
        """(token, cell) of the candidates after a place, and whether the first is the spine's."""
        rows = self.find(member, context)
        if self._expected is None or self._matched is None or not on_spine:
            return candidates.of_row(*rows), False
        expected = self._expected[member][depth]
        matched = self._matched[member] + depth
        return candidates.of_row(*rows, expected, matched), expected != NO_TOKEN

    def find(self, member: int, context: Sequence[int]) -> tuple[Row, int, Row, int]:
        """The two rows after a place; see `HostRows.find`."""
        return self._reader.find(self._slots[member], self._tasks[member], context)

    def begin(self, member: int, depth: int) -> int:
        """Where the calibration's places for this sequence and depth begin."""
        return place_of(self._tasks[member], depth)

    def chances(self, member: int) -> list[float]:
        """By place of this sequence's task."""
        return self._calibration.listed(self._tasks[member])


def _push_children(heap: list[_Entry], node: Node, index: int, rows: _Rows, least: float) -> None:
    found, spine_first = rows.after(node.member, node.context, node.depth, on_spine=node.on_spine)
    chances, begin = rows.chances(node.member), place_of(0, node.depth)
    older = node.context[: ORDERS - 1]
    for rank, (token, cell) in enumerate(found):
        reached = node.chance * chances[begin + cell]
        if reached >= least:
            on_spine = spine_first and rank == 0
            child = Node(reached, node.member, index, node.depth + 1, (token, *older), on_spine)
            heappush(heap, (-reached, node.member, index, rank, child))


def calibrate(
    matrix: HostRows,
    calibration: Calibration,
    drafted: Draft,
    verdict: Verdict,
    slots: Tensor,
    tasks: Tensor,
    ahead: Ahead | None,
) -> list[list[int]]:
    """Count which candidates came true, before rows change: `Drafter.calibrate` for few nodes.

    Returns:
        For each sequence the rank that each of its new tokens had in the first row, -1 for none.
    """
    rows = _Rows(matrix, calibration, slots, tasks, ahead)
    expected = None if ahead is None else ahead.tokens.tolist()
    places: list[int] = []
    true: list[bool] = []
    ranks: list[list[int]] = []
    paths = zip(verdict.nodes.tolist(), verdict.tokens.tolist(), strict=True)
    for member, (nodes, tokens) in enumerate(paths):
        on_spine = True
        ranks.append([])
        for depth, (node, truth) in enumerate(zip(nodes, tokens, strict=True)):
            if node < 0:
                break
            context = drafted.contexts[member, node].tolist()
            found, _ = rows.after(member, context, depth, on_spine=on_spine)
            begin = rows.begin(member, depth)
            places += [begin + cell for _, cell in found]
            true += [token == truth for token, _ in found]
            first = rows.find(member, context)[0]
            ranks[-1].append(first.index(truth) if truth in first else -1)
            on_spine &= expected is None or expected[member][depth] == truth
    calibration.count_few(places, true)
    return ranks


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
