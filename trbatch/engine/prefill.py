"""Prompts into the cache, a piece a step, and what they teach on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine import drafting, spans
from trbatch.engine.budget import Budget
from trbatch.engine.choosing import choose_tokens
from trbatch.engine.likeliest import blocks_of, topk
from trbatch.engine.logprobs import record_prompt
from trbatch.engine.matrix import Matrix
from trbatch.engine.model import CausalModel
from trbatch.engine.prefix import Piece, Prefixes
from trbatch.engine.sequence import Sequence
from trbatch.engine.tasks import Tasks

_SMALL_TREE = 6.0  # tokens a step and sequence
_LESSON = 512  # places that are learned from at once


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
        prefixes: Prefixes,
        config: EngineConfig,
        *,
        recycling: bool,
    ) -> None:
        self._model, self._matrix, self._tasks = model, matrix, tasks
        self._budget, self._prefixes = budget, prefixes
        self._learning = recycling and config.recycle_prompts

    def run(self, sequences: list[Sequence], most: int) -> list[Sequence]:
        """One forward over pieces of prompts, `most` tokens in all.

        Returns:
            Those whose prompt is done: they have taken their first token.
        """
        start = time.perf_counter()
        pieces = pieces_of(sequences, most, self._prefixes)
        where = [spans.of_prompt(sequence, count) for sequence, count in pieces]
        tokens = tokens_of(pieces)
        recycling = self._learning and self._wants_prompt_candidates()
        everywhere = recycling or any(s.wants_prompt_logprobs for s, _ in pieces)
        ends = torch.tensor([count for _, count in pieces]).cumsum(0) - 1
        ends = ends.to(self._model.loaded.device)
        logits = self._model.forward(self._ids(tokens), where, None if everywhere else ends)
        last = logits[ends] if everywhere else logits
        if self._learning:
            self._learn_prompts(pieces, logits if recycling else None)
        if everywhere:
            record_prompt(pieces, logits)
        advance(pieces, self._prefixes)
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
        for lesson in lessons_of(pieces, candidates, self._prefixes):
            sequence = lesson.sequence
            drafting.learn_prompt(
                self._matrix, self._ids(sequence.tokens[: lesson.end + 1]), lesson.first,
                lesson.rows, sequence.slot, sequence.task,
            )  # fmt: skip
            self._tasks.touch(sequence.task)

    def _first_tokens(
        self, sequences: list[Sequence], logits: Tensor
    ) -> list[tuple[Sequence, int]]:
        """The token after each wholly prefilled prompt."""
        ready = [i for i, s in enumerate(sequences) if s.prefilled and not s.generated]
        if not ready:
            return []
        who = [sequences[i] for i in ready]
        chosen = choose_tokens(who, logits[ready], [[]] * len(ready))
        return list(zip(who, chosen.tolist(), strict=True))

    def _ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._model.loaded.device)


@dataclass(frozen=True, slots=True)
class Lesson:
    """Part of a prompt that is to be recycled: the places from `first` on."""

    sequence: Sequence
    first: int
    rows: Tensor | int  # [n, k] the candidates of its n places; n alone where nobody knows them

    @property
    def end(self) -> int:
        """Behind its last place."""
        return self.first + (self.rows if isinstance(self.rows, int) else len(self.rows))


def pieces_of(sequences: ListLike[Sequence], most: int, prefixes: Prefixes) -> list[Piece]:
    """What is prefilled next: `most` tokens of the prompts that are not in the cache yet.

    What others have prefilled is taken first; whoever has much in common with what another is about
    to prefill waits for it, as the samples of one row do for the first of them.
    """
    pieces: list[Piece] = []
    under_way: set[bytes] = set()
    for sequence in sequences:
        if most == 0:
            break
        prefixes.share(sequence)
        if prefixes.is_worth_waiting(sequence, under_way):
            continue
        left = sequence.goal - sequence.cached
        count = min(most, left)
        if count < left:
            # Up to the end of a page: from there on others' pages may be of use.
            whole = count - (sequence.cached + count) % prefixes.page_size
            if whole <= 0 and pieces:
                break
            count = whole if whole > 0 else count
        under_way.update(prefixes.keys_of(sequence, count))
        pieces.append((sequence, count))
        most -= count
    return pieces


def lessons_of(
    pieces: ListLike[Piece], candidates: Tensor | None, prefixes: Prefixes
) -> list[Lesson]:
    """What is to be learned from pieces that are about to be counted as cached.

    What a sequence took from others is learned with the first piece of its own, as if it had been
    run with it. The later row of the input comes last and wins, whatever the slots.

    Args:
        candidates: [N, k] of all pieces, one after the other; None: the texts alone.
    """
    if candidates is not None:
        prefixes.keep(pieces, candidates)
    lessons, start = [], 0
    for sequence, count in pieces:
        first, cached = sequence.learned, sequence.cached
        sequence.learned = cached + count
        if candidates is None:
            lessons.append(Lesson(sequence, first, cached + count - first))
            continue
        if sequence.recalled < cached and first < cached:
            lessons.append(Lesson(sequence, first, cached - first))
            first = cached
        for begin in range(first, cached, _LESSON):
            end = min(begin + _LESSON, cached)
            lessons.append(Lesson(sequence, begin, prefixes.recall(sequence, begin, end)))
        for begin in range(0, count, _LESSON):
            part = candidates[start + begin : start + min(begin + _LESSON, count)]
            lessons.append(Lesson(sequence, cached + begin, part))
        start += count
    return sorted(lessons, key=lambda lesson: lesson.sequence.turn)


def advance(pieces: ListLike[Piece], prefixes: Prefixes) -> None:
    """Count pieces that were run as cached."""
    for sequence, count in pieces:
        sequence.cached += count
        prefixes.publish(sequence, count)


def tokens_of(pieces: ListLike[Piece]) -> list[int]:
    """The tokens of pieces, one after the other."""
    return [
        token
        for sequence, count in pieces
        for token in sequence.tokens[sequence.cached : sequence.cached + count]
    ]
