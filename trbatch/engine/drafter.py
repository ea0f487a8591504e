"""Which tokens to verify next: a fixed tree, a fixed number of nodes, or what the budget gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine import best_first, drafting, heap_search, verify
from trbatch.engine.ahead import Ahead, ahead_of
from trbatch.engine.budget import Budget
from trbatch.engine.calibration import Calibration
from trbatch.engine.coming_true import count_paths
from trbatch.engine.drafting import Draft
from trbatch.engine.grammar import grammar_of
from trbatch.engine.host_rows import HostRows
from trbatch.engine.matrix import Matrix
from trbatch.engine.paths import PathCounts
from trbatch.engine.sequence import Sequence as Running
from trbatch.engine.tree import Tree
from trbatch.engine.verify import Verdict

_REACH = best_first.MAX_DEPTH + 1  # tokens that a spine is asked for
_FEW = 64  # nodes of a step that a CPU goes through one by one


class Drafter:
    """Draws the draft trees of a step.

    Args:
        paths: by task, which paths of ranks came true.
        most: tokens of one sequence's step, the root included.
        template: the tree to fill, if the same one is always used.
    """

    def __init__(
        self,
        matrix: Matrix,
        calibration: Calibration,
        paths: Sequence[PathCounts],
        budget: Budget,
        config: EngineConfig,
        *,
        most: int,
        template: Tree | None,
    ) -> None:
        self._matrix, self._calibration, self._budget = matrix, calibration, budget
        self._paths, self._template = paths, template
        self._fixed, self._most = config.tree_size, most
        self._learned = config.tree == "learned" and template is None
        self._spine = config.spine and template is None and not self._learned
        on_cpu = matrix.shared.device.type == "cpu"
        self._host = HostRows.of(matrix) if on_cpu else None

    def look_ahead(self, batch: Sequence[Running]) -> Ahead | None:
        """What the sequences' spines expect; None where the tree has no place for them."""
        if not self._spine:
            return None
        return ahead_of(
            [sequence.spine for sequence in batch], [sequence.tokens for sequence in batch],
            _REACH, self._matrix.shared.device, [_forced(sequence) for sequence in batch],
        )  # fmt: skip

    def draft(
        self, last: Tensor, slots: Tensor, tasks: Tensor, ahead: Ahead | None, context: float
    ) -> Draft | None:
        """Trees of B sequences, None where no node is worth its place.

        Args:
            last: [B, 3] last committed tokens, newest first.
            slots, tasks: [B] whose rows.
            ahead: what `look_ahead` said.
            context: committed tokens of a sequence, on average.
        """
        if self._template is not None:
            return drafting.from_template(self._matrix, self._template, slots, tasks, last)
        if self._learned:
            return self._from_learned(last, slots, tasks, context)
        if self._fixed:
            return self._of_fixed_size(last, slots, tasks, ahead)
        if self._host is not None:
            return self._from_heap(self._host, last, slots, tasks, ahead, context)
        return self._from_levels(last, slots, tasks, ahead, context)

    def _from_learned(
        self, last: Tensor, slots: Tensor, tasks: Tensor, context: float
    ) -> Draft | None:
        """The learned tree of the first row's task: a step has one shape for all."""
        batch, paths = len(last), self._paths[int(tasks[0])]
        tree, size = paths.tree(), self._fixed
        if not size:
            known = paths.probabilities()
            chances = [known[path] for path in tree.paths[: self._most - 1] for _ in range(batch)]
            size = 1 + -(-self._budget.choose(batch, context, chances) // batch)
        if size == 1:
            return None
        return drafting.from_template(self._matrix, tree.prefix(size), slots, tasks, last)

    def _of_fixed_size(
        self, last: Tensor, slots: Tensor, tasks: Tensor, ahead: Ahead | None
    ) -> Draft | None:
        count = self._fixed - 1
        found = best_first.expand(
            self._matrix, self._calibration, slots, tasks, last, ahead,
            width=min(count, best_first.WIDEST), enough=count,
        )  # fmt: skip
        if found is None or count == 0:
            return None
        return best_first.build(found, best_first.take_likeliest(found, count, each=True), last)

    def _from_levels(
        self, last: Tensor, slots: Tensor, tasks: Tensor, ahead: Ahead | None, context: float
    ) -> Draft | None:
        found = best_first.expand(
            self._matrix, self._calibration, slots, tasks, last, ahead,
            width=min(self._most - 1, best_first.WIDEST),
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
        self,
        rows: HostRows,
        last: Tensor,
        slots: Tensor,
        tasks: Tensor,
        ahead: Ahead | None,
        context: float,
    ) -> Draft | None:
        found = heap_search.search(
            rows, self._calibration, slots, tasks, last, ahead,
            most=self._most - 1, least=self._budget.least_chance(len(last), context),
        )  # fmt: skip
        count = self._budget.choose(len(last), context, [node.chance for node in found])
        return heap_search.build(found[:count], last) if count else None

    def accept(self, drafted: Draft, chosen: Tensor) -> Verdict:
        """Follow the agreeing children from the root. See `verify.accept`."""
        if self._few(drafted) is None:
            return verify.accept(drafted, chosen)
        return verify.accept_few(drafted, chosen)

    def learn(
        self,
        drafted: Draft,
        candidates: Tensor,
        verdict: Verdict,
        slots: Tensor,
        tasks: Tensor,
        turn: list[int],
    ) -> None:
        """Recycle every node's candidates. See `drafting.learn`.

        Args:
            candidates: [B, T, k].
            turn: [B] a sequence's place among the batch.
        """
        if rows := self._few(drafted):
            drafting.learn_few(rows, drafted, candidates, verdict.on_path, slots, tasks, turn)
            return
        places = torch.tensor(turn, device=slots.device)
        drafting.learn(self._matrix, drafted, candidates, verdict.on_path, slots, tasks, places)

    def calibrate(
        self,
        batch: Sequence[Running],
        drafted: Draft,
        verdict: Verdict,
        slots: Tensor,
        tasks: Tensor,
        ahead: Ahead | None,
    ) -> None:
        """Count which candidates and which paths of ranks came true, before rows change."""
        if rows := self._few(drafted):
            ranks = heap_search.calibrate(
                rows, self._calibration, drafted, verdict, slots, tasks, ahead
            )
        else:
            ranks = count_paths(
                self._matrix, self._calibration, drafted, verdict, slots, tasks, ahead
            )
        for sequence, found in zip(batch, ranks, strict=True):
            for rank in found:
                self._paths[sequence.reads].count(sequence.ranks, None if rank < 0 else rank)

    def _few(self, drafted: Draft) -> HostRows | None:
        """The rows in this machine's memory, where going through few nodes singly is quicker."""
        return self._host if sum(drafted.sizes) <= _FEW else None


def _forced(sequence: Running) -> list[int]:
    """The tokens that its grammar leaves no choice about."""
    grammar = grammar_of(sequence.request)
    return [] if grammar is None else grammar.forced(sequence.tokens, _REACH)
