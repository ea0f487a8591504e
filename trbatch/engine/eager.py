"""A decode step after which the host knows everything: draft → forward → verify → commit → learn.

On a GPU it waits for the device several times a step; steps as `lagged` starts them will not.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine import drafting, spans, verify
from trbatch.engine.budget import Budget
from trbatch.engine.choosing import choose_tokens, takes_likeliest
from trbatch.engine.drafter import Drafter
from trbatch.engine.drafting import Draft
from trbatch.engine.likeliest import Blocks, argmax, blocks_of, topk
from trbatch.engine.matrix import EMPTY, ORDERS, Matrix
from trbatch.engine.model import CausalModel
from trbatch.engine.sequence import Sequence
from trbatch.engine.tasks import Tasks


class EagerDecoder:
    """Decodes a batch, one forward a call.

    Args:
        recycling: draft and learn, or decode plainly.
    """

    def __init__(
        self,
        model: CausalModel,
        matrix: Matrix,
        tasks: Tasks,
        budget: Budget,
        drafter: Drafter,
        config: EngineConfig,
        *,
        recycling: bool,
    ) -> None:
        self._model, self._matrix, self._tasks = model, matrix, tasks
        self._budget, self._drafter = budget, drafter
        self._recycling, self._fixed = recycling, bool(config.tree_size)

    def run(self, batch: list[Sequence]) -> int:
        """One step of these sequences. Returns how many tokens they took."""
        start = time.perf_counter()
        context = sum(len(sequence.tokens) for sequence in batch) / len(batch)
        plain_s = self._budget.plain_seconds(len(batch), context)
        slots = self._ids([sequence.slot for sequence in batch])
        reads = self._ids([sequence.reads for sequence in batch])
        recycling = self._recycling and (self._fixed or self._budget.wants_draft())
        last = self._last_tokens(batch)
        plain = drafting.roots(last)
        ahead = self._drafter.look_ahead(batch) if recycling else None
        drafted = plain
        if recycling:
            drafted = self._drafter.draft(last, slots, reads, ahead, context) or plain
        logits = self._verify_forward(batch, drafted)
        blocks = blocks_of(logits)
        verdict = self._drafter.accept(drafted, self._chosen(batch, drafted, logits, blocks))
        taken = self._commit(batch, verdict)
        tokens = sum(drafted.sizes)
        if recycling:
            # Also where no node was worth it: what is not recycled now cannot be drafted later.
            self._keep_accepted(batch, verdict)
            # Before rows change.
            self._drafter.calibrate(batch, drafted, verdict, slots, reads, ahead)
            self._learn(batch, drafted, blocks, verdict, slots)
        seconds = time.perf_counter() - start
        for sequence, size, (count, accepted) in zip(batch, drafted.sizes, taken, strict=True):
            sequence.figures.count_forward(
                tokens=count, accepted=accepted, drafted=size - 1, seconds=seconds, plain_s=plain_s
            )
        self._budget.count(tokens, len(batch), context, seconds)
        return sum(count for count, _ in taken)

    def _last_tokens(self, batch: list[Sequence]) -> Tensor:
        rows = [([-1] * ORDERS + sequence.tokens)[: -ORDERS - 1 : -1] for sequence in batch]
        return torch.tensor(rows, device=self._model.loaded.device)

    def _verify_forward(self, batch: list[Sequence], drafted: Draft) -> Tensor:
        """Raw logits [N, V] of the drafted nodes, sequence after sequence."""
        nodes = [drafted.tokens[index, :size] for index, size in enumerate(drafted.sizes)]
        where = spans.of_trees(batch, drafted, self._model.loaded.max_positions)
        return self._model.forward(torch.cat(nodes).clamp_(min=0), where)

    def _chosen(
        self, batch: list[Sequence], drafted: Draft, logits: Tensor, blocks: Blocks
    ) -> Tensor:
        """[B, T] the model's own next token at each node; for sampled rows where the walk comes."""
        width = drafted.tokens.shape[1]
        likeliest = drafting.padded(argmax(blocks), drafted.sizes, width, verify.NOT_CHOSEN)
        plain = [takes_likeliest(sequence) for sequence in batch]
        if all(plain):
            return likeliest
        is_plain = torch.tensor(plain, device=logits.device)[:, None]
        chosen = torch.where(is_plain, likeliest, verify.NOT_CHOSEN)
        offsets = self._ids(drafted.offsets)

        def choose_at(members: Tensor, nodes: Tensor) -> Tensor:
            paths = [
                drafted.tokens[i][drafted.ancestors[i, node]][1:].tolist()
                for i, node in zip(members.tolist(), nodes.tolist(), strict=True)
            ]
            who = [batch[i] for i in members.tolist()]
            return choose_tokens(who, logits[offsets[members] + nodes], paths)

        walkers = self._ids([i for i, is_greedy in enumerate(plain) if not is_greedy])
        verify.walk(drafted, walkers, choose_at, chosen)
        return chosen

    def _commit(self, batch: list[Sequence], verdict: verify.Verdict) -> list[tuple[int, int]]:
        """Append what was accepted and the bonus token, cut at the first end.

        Returns:
            For each sequence how many tokens it took, and how many of these were drafted.
        """
        taken = []
        for sequence, row in zip(batch, verdict.tokens.tolist(), strict=True):
            proposed = [token for token in row if token >= 0]
            count = sequence.take(proposed)
            taken.append((count, min(count, len(proposed) - 1)))
        return taken

    def _keep_accepted(self, batch: list[Sequence], verdict: verify.Verdict) -> None:
        """Move the accepted nodes' keys and values from their tree slots to their own places."""
        sources, targets = spans.moves(batch, verdict.nodes.tolist())
        if sources:
            assert self._model.cache is not None
            self._model.cache.move(torch.stack(sources), torch.stack(targets))

    def _learn(
        self,
        batch: list[Sequence],
        drafted: Draft,
        blocks: Blocks,
        verdict: verify.Verdict,
        slots: Tensor,
    ) -> None:
        flat = topk(blocks, self._matrix.candidates)
        width = drafted.tokens.shape[1]
        candidates = drafting.padded(flat, drafted.sizes, width, EMPTY)
        turn = [0] * len(batch)
        for place, index in enumerate(sorted(range(len(batch)), key=lambda i: batch[i].turn)):
            turn[index] = place
        tasks = self._ids([sequence.task for sequence in batch])
        self._drafter.learn(drafted, candidates, verdict, slots, tasks, turn)
        for task in {sequence.task for sequence in batch}:
            self._tasks.touch(task)

    def _ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._model.loaded.device)
