"""Sequences take their slots: all that one step admits in one launch.

A few programs take one sequence, each a share of what is long. How many numbers there are of what
is no constant, so a text of another length is no other kernel. The slow twin is
`step_plain.PlainOperations.admit`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine import admission, matrix
from trbatch.engine.device_state import Slots
from trbatch.engine.matrix import Matrix

_WHOLE, _REAL, _WIDE = (
    tl.constexpr(at) for at in (admission.WHOLE, admission.REAL, admission.WIDE)
)
_HEADER, _NO_KEY = tl.constexpr(admission.HEADER), tl.constexpr(matrix.NO_KEY)
_PARTS, _BLOCK = tl.constexpr(4), tl.constexpr(1024)  # programs of a sequence; numbers at a time


@triton.jit
def _columns(
    header: tl.tensor, whole: tl.tensor, real: tl.tensor, wide: tl.tensor, width: tl.tensor
) -> None:
    """What has a fixed length. whole, real, wide: of the slot, `width` apart."""
    number = tl.arange(0, 16)
    known = number < _REAL - _WHOLE
    value = tl.load(header + _WHOLE + number, mask=known)
    tl.store(whole + number * width, value, mask=known)
    number = tl.arange(0, 4)
    known = number < _WIDE - _REAL
    bits = tl.load(header + _REAL + number, mask=known)
    tl.store(real + number * width, bits.to(tl.float32, bitcast=True), mask=known)
    number = tl.arange(0, 2)
    low = tl.load(header + _WIDE + 2 * number).to(tl.uint32, bitcast=True)
    high = tl.load(header + _WIDE + 2 * number + 1)
    tl.store(wide + number * width, (high.to(tl.int64) << 32) | low.to(tl.int64))


@triton.jit
def _fill(
    target: tl.tensor, source: tl.tensor, count: tl.tensor, width: tl.tensor, part: tl.tensor
) -> None:
    """target [width]: `count` numbers and -1 behind them; a part's share of it."""
    at = part * _BLOCK
    while at < width:
        place = at + tl.arange(0, _BLOCK)
        number = tl.load(source + place, mask=place < count, other=-1)
        tl.store(target + place, number, mask=place < width)
        at += _PARTS * _BLOCK


@triton.jit(do_not_specialize=["width", "most_stops", "most_pages", "longest", "own"])
def _admit(
    packed: tl.tensor, whole: tl.tensor, real: tl.tensor, wide: tl.tensor, last: tl.tensor,
    stops: tl.tensor, active: tl.tensor, pages: tl.tensor, texts: tl.tensor, keys: tl.tensor,
    width: tl.tensor, most_stops: tl.tensor, most_pages: tl.tensor, longest: tl.tensor,
    own: tl.tensor, ORDERS: tl.constexpr,
) -> None:  # fmt: skip
    """See `admit`."""
    header, part = packed + tl.program_id(0) * _HEADER, tl.program_id(1)
    slot = tl.load(header).to(tl.int64)
    rest = packed + tl.load(header + 1)
    stop_count, page_count = tl.load(header + 2), tl.load(header + 3)
    length = tl.load(header + _WHOLE)
    text = rest + stop_count + page_count
    if part == 0:
        _columns(header, whole + slot, real + slot, wide + slot, width)
        place = tl.arange(0, 4)
        newest = tl.load(text + length - 1 - place, mask=place < length, other=-1)
        tl.store(last + slot * ORDERS + place, newest, mask=place < ORDERS)
        tl.store(active + slot, True)
    _fill(stops + slot * most_stops, rest, stop_count, most_stops, part)
    _fill(pages + slot * most_pages, rest + stop_count, page_count, most_pages, part)
    _fill(texts + slot * longest, text, length, length, part)
    keys += slot * own
    at = part * _BLOCK
    while at < own:
        place = at + tl.arange(0, _BLOCK)
        tl.store(keys + place, _NO_KEY, mask=place < own)
        at += _PARTS * _BLOCK


def admit(slots: Slots, rows: Matrix, packed: Tensor, count: int) -> None:
    """Give slots to sequences, which have no rows of their own yet.

    Args:
        slots: changed.
        rows: changed, too.
        packed: [N] int32, as `admission.pack` has it.
        count: how many sequences.
    """
    assert slots.last.shape[1] <= 4, "the kernel's tile of last tokens"
    assert packed.is_contiguous() and rows.keys.is_contiguous()
    _admit[(count, _PARTS.value)](
        packed, slots.whole, slots.real, slots.wide, slots.last, slots.stops, slots.active,
        slots.pages, slots.texts, rows.keys, slots.whole.shape[1], slots.stops.shape[1],
        slots.pages.shape[1], slots.texts.shape[1], rows.keys[0].numel(),
        ORDERS=slots.last.shape[1], num_warps=4,
    )  # fmt: skip
