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
from trbatch.engine.prefill import Piece, pieces_of, tokens_of
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
        config: EngineConfig,
        *,
        recycling: bool,
    ) -> None:
        self._stepper, self._decoder, self._tasks = stepper, decoder, tasks
        self._chunk = config.prefill_chunk
        self._learning = recycling and config.recycle_prompts

    @torch.inference_mode()
    def run(self, sequences: list[Sequence]) -> int:
        """Start a forward over pieces of prompts, `prefill_chunk` tokens in all.

        Returns:
            How many tokens those took whose first token the host has to choose.
        """
        state, device = self._stepper.state, self._stepper.device
        model = state.model
        pieces = pieces_of(sequences, self._chunk)
        where = [spans.of_prompt(sequence, count) for sequence, count in pieces]
        tokens = to_device(tokens_of(pieces), device, torch.int64)
        ends = torch.tensor([count for _, count in pieces]).cumsum(0) - 1
        keep = None if self._learning else to_device(ends.tolist(), device, torch.int64)
        logits = model.project(tokens, where, keep)
        if self._learning:
            self._learn(pieces, logits)
            logits = logits[to_device(ends.tolist(), device, torch.int64)]
        for sequence, count in pieces:
            sequence.cached += count
        ready = [at for at, (sequence, _) in enumerate(pieces) if sequence.prefilled]
        late = [at for at in ready if pieces[at][0].lagged]
        members = [pieces[at][0] for at in late]
        at = to_device(late, device, torch.int64)
        handle = self._stepper.first(members, logits[at])
        self._decoder.after_prompts(pieces, members, handle)
        return self._choose_now([at for at in ready if at not in late], pieces, logits)

    def _learn(self, pieces: list[Piece], logits: torch.Tensor) -> None:
        """Recycle prompts. The later row of the input wins, whatever the slots."""
        starts, start = {}, 0
        for sequence, count in pieces:
            starts[sequence.slot] = start
            start += count
        for sequence, count in sorted(pieces, key=lambda piece: piece[0].turn):
            start = starts[sequence.slot]
            part = logits[start : start + count]
            self._stepper.operations.learn_prompt(self._stepper.state, sequence, count, part)
            self._tasks.touch(sequence.task)

    def _choose_now(self, which: list[int], pieces: list[Piece], logits: torch.Tensor) -> int:
        """Rows whose sampling needs the host: these wait for the device."""
        if not which:
            return 0
        who = [pieces[at][0] for at in which]
        chosen = choose_tokens(who, logits[which].float(), [[]] * len(who))
        for sequence, token in zip(who, chosen.tolist(), strict=True):
            sequence.take([token])
        return len(who)
