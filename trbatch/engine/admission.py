"""Who takes slots on the device, all in one piece of numbers: one copy, however many they are.

A header for each, then what has no fixed length, one sequence after the other: end tokens, pages,
text. `kernels.admit` takes it apart on the device, `unpack` on the host.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from struct import Struct

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trbatch.engine.device_state import Noise, Slots

# Slot, place of what has no fixed length, how many end tokens and pages; then the slot's columns of
# `Slots.whole`, `real` and `wide`. As the device has them: 32 bits, or 64 in two halves.
_HEADER = Struct("=4i9i3f2q")
WHOLE, REAL, WIDE, HEADER = 4, 13, 16, 20  # where they begin; numbers of 32 bits
assert _HEADER.size == 4 * HEADER


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A sequence that takes a slot. See `Slots.put`."""

    slot: int
    tokens: Sequence[int]
    left: int
    stops: Sequence[int]
    pages: Sequence[int]
    task: int
    turn: int
    noise: Noise = field(default_factory=Noise)


def pack(newcomers: Sequence[Newcomer], slots: Slots) -> npt.NDArray[np.int32]:
    """Newcomers as numbers of 32 bits.

    Args:
        slots: those that they are for; not two for one.
    """
    headers, rest = bytearray(), array("i")
    assert len({one.slot for one in newcomers}) == len(newcomers), "a slot is given away twice"
    for one in newcomers:
        slots.check(one.tokens, left=one.left, stops=one.stops, pages=one.pages, turn=one.turn)
        noise, at = one.noise, HEADER * len(newcomers) + len(rest)
        headers += _HEADER.pack(
            one.slot, at, len(one.stops), len(one.pages),
            len(one.tokens), one.left, 0, -1, 0, one.task, noise.begin, noise.top_k, noise.sample,
            noise.temperature, noise.min_p, noise.top_p,
            one.turn, noise.seed,
        )  # fmt: skip
        for values in (one.stops, one.pages, one.tokens):
            rest += array("i", values)
    return np.frombuffer(headers + rest.tobytes(), np.int32)


def unpack(packed: Tensor, count: int) -> list[Newcomer]:
    """The newcomers of `pack`; waits for the device.

    Args:
        packed: [N] int32.
        count: how many they are.
    """
    numbers = packed.cpu().numpy()
    newcomers = []
    for header in _HEADER.iter_unpack(numbers[: HEADER * count].tobytes()):
        slot, at, stops, pages, length, left, _, _, _, task, begin, top_k, sample = header[:REAL]
        temperature, min_p, top_p, turn, seed = header[REAL:]
        ends = np.cumsum([at, stops, pages, length])
        stop_ids, page_ids, tokens = (numbers[a:b].tolist() for a, b in pairwise(ends))
        noise = Noise(begin, temperature, min_p, seed, sample, top_k, top_p)
        newcomers.append(Newcomer(slot, tokens, left, stop_ids, page_ids, task, turn, noise))
    return newcomers
