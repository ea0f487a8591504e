"""Prompts into the cache, a piece a step, and what they teach on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine import drafting, spans
from trbatch.engine.budget import Budget
from trbatch.engine.choosing import choose_tokens
from trbatch.engine.likeliest import blocks_of, topk
from trbatch.engine.matrix import Matrix
from trbatch.engine.model import CausalModel
from trbatch.engine.sequence import Sequence
from trbatch.engine.tasks import Tasks

_SMALL_TREE = 6.0  # tokens a step and sequence
Piece = tuple[Sequence, int]  # whose prompt, and how many of its tokens come next


class Prefiller:
    """Runs prompts through the model.

    Args:
        recycling: whether anything is drafted, so that prompts are worth learning from.
    """

    def __init__(
        self,
        model: CausalModel,
        matrix: Matrix,
        tasks: Tasks,
        budget: Budget,
        config: EngineConfig,
        *,
        recycling: bool,
    ) -> None:
        self._model, self._matrix, self._tasks = model, matrix, tasks
        self._budget, self._chunk = budget, config.prefill_chunk
        self._learning = recycling and config.recycle_prompts

    def run(self, sequences: list[Sequence]) -> list[Sequence]:
        """One forward over pieces of prompts, `prefill_chunk` tokens in all.

        Returns:
            Those whose prompt is done: they have taken their first token.
        """
        start = time.perf_counter()
        pieces = pieces_of(sequences, self._chunk)
        where = [spans.of_prompt(sequence, count) for sequence, count in pieces]
        tokens = tokens_of(pieces)
        everywhere = self._learning and self._wants_prompt_candidates()
        ends = torch.tensor([count for _, count in pieces]).cumsum(0) - 1
        ends = ends.to(self._model.loaded.device)
        logits = self._model.forward(self._ids(tokens), where, None if everywhere else ends)
        last = logits[ends] if everywhere else logits
        if self._learning:
            self._learn_prompts(pieces, logits if everywhere else None)
        for sequence, count in pieces:
            sequence.cached += count
        first = self._first_tokens([sequence for sequence, _ in pieces], last)
        seconds = time.perf_counter() - start
        for sequence, count in pieces:
            sequence.figures.prefill_s += seconds * count / len(tokens)
        for sequence, token in first:
            sequence.take([token])
        return [sequence for sequence, _ in first]

    def _wants_prompt_candidates(self) -> bool:
        """Whether prompts are worth the output projection at each of their tokens.

        A GPU does it in passing. On a CPU it is a quarter of a prefill, and a tree of few nodes
        hardly ever asks for more than the prompt's own next token (docs/performance.md).
        """
        return self._model.loaded.device.type != "cpu" or self._budget.usual_size > _SMALL_TREE

    def _learn_prompts(self, pieces: list[Piece], logits: Tensor | None) -> None:
        """Recycle prompts: the candidates of each token, or None for the texts alone."""
        wide = self._matrix.candidates
        candidates = None if logits is None else topk(blocks_of(logits), wide)
        # The later row of the input wins, whatever the slots.
        for sequence, count in sorted(pieces, key=lambda piece: piece[0].turn):
            start = sum(c for s, c in pieces[: [s for s, _ in pieces].index(sequence)])
            end = sequence.cached + count
            drafting.learn_prompt(
                self._matrix, self._ids(sequence.tokens[: end + 1]), sequence.cached,
                count if candidates is None else candidates[start : start + count],
                sequence.slot, sequence.task,
            )  # fmt: skip
            self._tasks.touch(sequence.task)

    def _first_tokens(
        self, sequences: list[Sequence], logits: Tensor
    ) -> list[tuple[Sequence, int]]:
        """The token after each wholly prefilled prompt."""
        ready = [i for i, sequence in enumerate(sequences) if sequence.prefilled]
        if not ready:
            return []
        who = [sequences[i] for i in ready]
        chosen = choose_tokens(who, logits[ready], [[]] * len(ready))
        return list(zip(who, chosen.tolist(), strict=True))

    def _ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._model.loaded.device)


def pieces_of(sequences: ListLike[Sequence], most: int) -> list[Piece]:
    """What is prefilled next: `most` tokens of the prompts that are not in the cache yet."""
    pieces: list[Piece] = []
    for sequence in sequences:
        count = min(most, sequence.prompt_length - sequence.cached)
        if count == 0:
            break
        pieces.append((sequence, count))
        most -= count
    return pieces


def tokens_of(pieces: ListLike[Piece]) -> list[int]:
    """The tokens of pieces, one after the other."""
    return [
        token
        for sequence, count in pieces
        for token in sequence.tokens[sequence.cached : sequence.cached + count]
    ]
