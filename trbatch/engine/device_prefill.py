"""Prompts into the cache without waiting: the token after a prompt is chosen on the device.

The other form of `prefill`, for engines whose steps are read one late.
"""

from __future__ import annotations

import torch

from trbatch.config import EngineConfig
from trbatch.engine import spans
from trbatch.engine.choosing import choose_tokens
from trbatch.engine.device_step import DeviceStep
from trbatch.engine.lagged import LaggedDecoder
from trbatch.engine.prefill import advance, lessons_of, pieces_of, tokens_of
from trbatch.engine.prefix import Piece, Prefixes
from trbatch.engine.sequence import Sequence
from trbatch.engine.tasks import Tasks
from trbatch.engine.transfer import to_device


class DevicePrefiller:
    """Runs prompts through the model.

    Args:
        recycling: whether anything is drafted, so that prompts are worth learning from.
    """

    def __init__(
        self,
        stepper: DeviceStep,
        decoder: LaggedDecoder,
        tasks: Tasks,
        prefixes: Prefixes,
        config: EngineConfig,
        *,
        recycling: bool,
    ) -> None:
        self._stepper, self._decoder, self._tasks = stepper, decoder, tasks
        self._prefixes = prefixes
        self._learning = recycling and config.recycle_prompts

    @torch.inference_mode()
    def run(self, sequences: list[Sequence], most: int) -> int:
        """Start a forward over pieces of prompts, `most` tokens in all.

        Returns:
            How many tokens those took whose first token the host has to choose.
        """
        state, device = self._stepper.state, self._stepper.device
        model = state.model
        pieces = pieces_of(sequences, most, self._prefixes)
        where = [spans.of_prompt(sequence, count) for sequence, count in pieces]
        tokens = to_device(tokens_of(pieces), device, torch.int64)
        ends = torch.tensor([count for _, count in pieces]).cumsum(0) - 1
        keep = None if self._learning else to_device(ends.tolist(), device, torch.int64)
        logits = model.project(tokens, where, keep)
        if self._learning:
            self._learn(pieces, logits)
            logits = logits[to_device(ends.tolist(), device, torch.int64)]
        advance(pieces, self._prefixes)
        ready = [at for at, (s, _) in enumerate(pieces) if s.prefilled and not s.generated]
        late = [at for at in ready if pieces[at][0].lagged]
        members = [pieces[at][0] for at in late]
        at = to_device(late, device, torch.int64)
        handle = self._stepper.first(members, logits[at])
        self._decoder.after_prompts(pieces, members, handle)
        return self._choose_now([at for at in ready if at not in late], pieces, logits)

    def _learn(self, pieces: list[Piece], logits: torch.Tensor) -> None:
        operations, state = self._stepper.operations, self._stepper.state
        candidates = operations.candidates(state, logits)
        for lesson in lessons_of(pieces, candidates, self._prefixes):
            operations.learn_prompt(state, lesson)
            self._tasks.touch(lesson.sequence.task)

    def _choose_now(self, which: list[int], pieces: list[Piece], logits: torch.Tensor) -> int:
        """Rows whose sampling needs the host: these wait for the device."""
        if not which:
            return 0
        who = [pieces[at][0] for at in which]
        chosen = choose_tokens(who, logits[which].float(), [[]] * len(who))
        for sequence, token in zip(who, chosen.tolist(), strict=True):
            sequence.take([token])
        return len(who)
