"""Prompts into the cache without waiting: the token after a prompt is chosen on the device.

The other form of `prefill`, for engines whose steps are read one late. A prefill, too, has one of a
few shapes, so that it can be replayed: launched one by one, the kernels of a short prefill take the
host longer than the device.
"""

from __future__ import annotations

import logging
import time
from array import array
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine.captured import Replay
from trbatch.engine.choosing import choose_tokens
from trbatch.engine.device_step import DeviceStep, Prompts
from trbatch.engine.lagged import LaggedDecoder
from trbatch.engine.prefill import advance, pieces_of
from trbatch.engine.prefix import Piece, Prefixes
from trbatch.engine.sequence import Sequence
from trbatch.engine.tasks import Tasks
from trbatch.engine.transfer import send, to_device

logger = logging.getLogger(__name__)

_SHORTEST = 64  # tokens of the smallest shape; each next one has twice as many
_MOST_PIECES = 64  # prompts of one prefill
_ENOUGH_TOKENS = 512  # for which a prefill of its own is no waste: it reads all weights
_ENOUGH_SLOTS = 16  # one in so many waits no longer
_PATIENCE = 16  # steps that a prompt waits for others at most


_Part = tuple[Sequence, int, int]  # whose prompt, where in it, how many tokens


@dataclass(frozen=True, slots=True)
class _Shape:
    numbers: Tensor  # all inputs in one piece, for one copy
    sizes: list[int]  # how it is divided
    prompts: Prompts  # the parts
    replay: Replay[Tensor]
    recall: Replay[None]  # of prompts that others have run


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
        self._prefixes, self._chunk = prefixes, config.prefill_chunk
        self._learning = recycling and config.recycle_prompts
        self._pieces = min(_MOST_PIECES, stepper.capacity)
        self._shapes: dict[int, _Shape] = {}
        self._waited = 0

    def prepare(self) -> None:
        """Capture all shapes, before anything runs, as far as memory suffices."""
        if not self._stepper.graphs.wanted:
            return
        tokens = _SHORTEST
        try:
            while tokens < 2 * self._chunk:
                self._shape(tokens)
                tokens *= 2
        except torch.OutOfMemoryError as error:
            # Whoever needs it tries again, and if need be goes on with smaller pieces of prompts.
            logger.warning(
                "out of memory while prefills of %d tokens were captured, prompts may come in "
                "smaller pieces (--prefill-chunk): %s", tokens, error,
            )  # fmt: skip

    def is_worth_it(self, sequences: list[Sequence], *, decoding: bool) -> bool:
        """Whether to prefill these now, or to wait until there are more of them."""
        tokens = sum(sequence.goal - sequence.cached for sequence in sequences)
        slots = max(1, self._stepper.capacity // _ENOUGH_SLOTS)
        enough = tokens >= min(_ENOUGH_TOKENS, self._chunk) or len(sequences) >= slots
        begun = any(sequence.cached for sequence in sequences)
        self._waited += 1
        return not decoding or enough or begun or self._waited >= _PATIENCE

    @torch.inference_mode()
    def run(self, sequences: list[Sequence], most: int) -> int:
        """Start a forward over pieces of prompts, `most` tokens in all.

        Returns:
            How many tokens those took whose first token the host has to choose.
        """
        began = time.perf_counter()
        self._waited = 0
        pieces = pieces_of(sequences, most, self._prefixes)[: self._pieces]
        self._stepper.set_pages()
        if self._learning:
            self._prefixes.count_kept(pieces)
            self._recall([sequence for sequence, _ in pieces], most)
            for sequence, count in pieces:
                sequence.learned = sequence.cached + count
                self._tasks.touch(sequence.task)
        shape = self._filled([(sequence, sequence.cached, count) for sequence, count in pieces])
        logits = shape.replay.run()[: len(pieces)]
        advance(pieces, self._prefixes)
        ready = [at for at, (s, _) in enumerate(pieces) if s.prefilled and not s.generated]
        late = [at for at in ready if pieces[at][0].lagged]
        members = [pieces[at][0] for at in late]
        chosen = logits[to_device(late, logits.device, torch.int64)]
        handle = self._stepper.first(members, chosen)
        self._decoder.after_prompts(pieces, members, handle, began=began)
        return self._choose_now([at for at in ready if at not in late], pieces, logits)

    def _recall(self, sequences: list[Sequence], most: int) -> None:
        """Learn what others' prompts have kept of the pages that these took from them.

        Args:
            most: tokens at once: no more than a prefill has now, for which memory suffices.
        """
        group: list[_Part] = []
        room = most
        for sequence in sequences:
            first = sequence.learned
            while first < sequence.cached:
                if not room or len(group) == self._pieces:
                    self._filled(group).recall.run()
                    group, room = [], most
                count = min(room, sequence.cached - first)
                group.append((sequence, first, count))
                first, room = first + count, room - count
        if group:
            self._filled(group).recall.run()

    def _filled(self, parts: list[_Part]) -> _Shape:
        """The shape for these parts of prompts, told of them: where each begins, its tokens."""
        first, slots, counts = np.array([(at, s.slot, count) for s, at, count in parts]).T
        ends = counts.cumsum()
        total = int(ends[-1])
        shape = self._shape(max(_SHORTEST, 1 << (total - 1).bit_length()))
        text = array("i")
        for sequence, at, count in parts:
            text += array("i", sequence.tokens[at : at + count])
        starts = np.full(self._pieces + 1, total)
        starts[0], starts[1 : len(parts) + 1] = 0, ends
        columns = (
            np.frombuffer(text, np.int32),
            np.arange(total) + np.repeat(first + counts - ends, counts),
            starts, first, slots, ends - 1,
        )  # fmt: skip
        numbers, begin = np.zeros(len(shape.numbers), np.int32), 0
        for column, size in zip(columns, shape.sizes, strict=True):
            numbers[begin : begin + len(column)] = column
            begin += size
        send(numbers, shape.numbers)
        return shape

    def _shape(self, tokens: int) -> _Shape:
        """A prefill of so many tokens."""
        if tokens not in self._shapes:
            sizes = [tokens, tokens, self._pieces + 1, *[self._pieces] * 3]
            numbers = torch.zeros(sum(sizes), dtype=torch.int32, device=self._stepper.device)
            prompts = Prompts(*numbers.split(sizes))
            state, operations = self._stepper.state, self._stepper.operations
            run = partial(operations.prefill, state, prompts, learning=self._learning)
            recall: Replay[None] = Replay(partial(operations.recall, state, prompts))
            record = self._stepper.graphs.record
            replay = record(run, what=f"a prefill of {tokens} tokens")
            if self._learning and state.kept is not None:
                recall = record(recall.work, what=f"a look back at {tokens} tokens")
            self._shapes[tokens] = _Shape(numbers, sizes, prompts, replay, recall)
        return self._shapes[tokens]

    def _choose_now(self, which: list[int], pieces: list[Piece], logits: Tensor) -> int:
        """Rows whose sampling needs the host: these wait for the device."""
        if not which:
            return 0
        who = [pieces[at][0] for at in which]
        chosen = choose_tokens(who, logits[which].float(), [[]] * len(who))
        for sequence, token in zip(who, chosen.tolist(), strict=True):
            sequence.take([token])
        return len(who)
