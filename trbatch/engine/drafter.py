"""Which tokens to verify next: a fixed tree, a fixed number of nodes, or what the budget gives."""

from __future__ import annotations

from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine import best_first, drafting, heap_search
from trbatch.engine.best_first import Calibration
from trbatch.engine.budget import Budget
from trbatch.engine.drafting import Draft
from trbatch.engine.matrix import Matrix
from trbatch.engine.tree import Tree

_WIDEST = 32  # nodes kept a level while searching


class Drafter:
    """Draws the draft trees of a step.

    Args:
        most: tokens of one sequence's step, the root included.
        template: the tree to fill, if the same one is always used.
    """

    def __init__(
        self,
        matrix: Matrix,
        calibration: Calibration,
        budget: Budget,
        config: EngineConfig,
        *,
        most: int,
        template: Tree | None,
    ) -> None:
        self._matrix, self._calibration, self._budget = matrix, calibration, budget
        self._fixed, self._most, self._template = config.tree_size, most, template

    def draft(self, last: Tensor, slots: Tensor, tasks: Tensor, context: float) -> Draft | None:
        """Trees of B sequences, None where no node is worth its place.

        Args:
            last: [B, 3] last committed tokens, newest first.
            slots, tasks: [B] whose rows.
            context: committed tokens of a sequence, on average.
        """
        if self._template is not None:
            return drafting.from_template(self._matrix, self._template, slots, tasks, last)
        if self._fixed:
            return self._of_fixed_size(last, slots, tasks)
        if last.device.type == "cpu":
            return self._from_heap(last, slots, tasks, context)
        return self._from_levels(last, slots, tasks, context)

    def _of_fixed_size(self, last: Tensor, slots: Tensor, tasks: Tensor) -> Draft | None:
        count = self._fixed - 1
        found = best_first.expand(
            self._matrix, self._calibration, slots, tasks, last,
            width=min(count, _WIDEST), enough=count,
        )  # fmt: skip
        if found is None or count == 0:
            return None
        return best_first.build(found, best_first.take_likeliest(found, count, each=True), last)

    def _from_levels(
        self, last: Tensor, slots: Tensor, tasks: Tensor, context: float
    ) -> Draft | None:
        found = best_first.expand(
            self._matrix, self._calibration, slots, tasks, last,
            width=min(self._most - 1, _WIDEST),
            least=self._budget.least_chance(len(last), context),
        )  # fmt: skip
        if found is not None:
            found = best_first.limit(found, self._most - 1)
        chances = [] if found is None else best_first.falling_chances(found)
        count = self._budget.choose(len(last), context, chances)
        if found is None or count == 0:
            return None
        return best_first.build(found, best_first.take_likeliest(found, count, each=False), last)

    def _from_heap(
        self, last: Tensor, slots: Tensor, tasks: Tensor, context: float
    ) -> Draft | None:
        found = heap_search.search(
            self._matrix, self._calibration, slots, tasks, last,
            most=self._most - 1, least=self._budget.least_chance(len(last), context),
        )  # fmt: skip
        count = self._budget.choose(len(last), context, [node.chance for node in found])
        return heap_search.build(found[:count], last) if count else None
