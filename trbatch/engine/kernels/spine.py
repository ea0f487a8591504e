"""Following repeated passages on the device: what each text should say next if it repeats itself.

One program takes one row of the batch. As long as a text keeps to the passage that it was found to
repeat, the pointer moves on with it; when it leaves it, the text is searched from its end for the
last four tokens. The slow twin is `reference.look_ahead`; `engine.spine` is the host's own form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine import spine
from trbatch.engine.device_state import Slots

_MATCH, _LONG = tl.constexpr(spine.MATCH), tl.constexpr(spine.LONG)
_BLOCK = tl.constexpr(512)  # places of a text that are searched at a time
assert spine.LONG & (spine.LONG - 1) == 0, "a tile of that many tokens"


@triton.jit
def _search(text: tl.tensor, length: tl.tensor) -> tl.tensor:
    """The last place behind an earlier occurrence of the last tokens, -1 for none; and how many
    tokens before it agree, `_LONG` at most."""
    place, behind = tl.arange(0, _BLOCK), tl.arange(0, _LONG)
    found, at = -1, length - 1
    while (found < 0) & (at >= _MATCH):
        end = at - place
        same = end >= _MATCH
        for nth in tl.static_range(_MATCH):
            newest = tl.load(text + length - 1 - nth)
            same = same & (tl.load(text + end - 1 - nth, mask=same, other=-1) == newest)
        found = tl.max(tl.where(same, end, -1), 0)
        at -= _BLOCK
    there = found - 1 - behind >= 0
    said = tl.load(text + found - 1 - behind, mask=there, other=-1)
    newest = tl.load(text + length - 1 - behind, mask=there, other=-2)
    matched = tl.min(tl.where(said == newest, _LONG, behind), 0)
    return found, tl.where(found < 0, 0, matched)


@triton.jit
def _look_ahead(
    rows: tl.tensor, lengths: tl.tensor, texts: tl.tensor, read: tl.tensor, source: tl.tensor,
    matched: tl.tensor, ahead: tl.tensor, matches: tl.tensor, longest: tl.tensor,
    depth: tl.tensor, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """See `look_ahead`."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_D)
    slot = tl.load(rows + row).to(tl.int64)
    ahead += row * depth + place
    if slot < 0:
        tl.store(ahead, -1, mask=place < depth)
        tl.store(matches + row, 0)
        return
    text = texts + slot * longest
    length = tl.load(lengths + slot)
    seen = tl.load(read + slot)
    at = tl.load(source + slot)
    match = tl.load(matched + slot)
    fresh = length - seen
    inside = (place < fresh) & (at >= 0)
    new = tl.load(text + seen + place, mask=inside, other=-1)
    expected = tl.load(text + at + place, mask=inside, other=-1)
    keeps = (at >= 0) & (fresh <= BLOCK_D) & (tl.max((new != expected).to(tl.int32), 0) == 0)
    if keeps:
        at += fresh
        match += fresh
    else:
        at, match = _search(text, length)
    tl.debug_barrier()  # all warps have read the slot that is now written
    tl.store(read + slot, length)
    tl.store(source + slot, at)
    tl.store(matched + slot, match)
    known = (at >= 0) & (at + place < length)
    token = tl.load(text + at + place, mask=known, other=-1)
    tl.store(ahead, token.to(tl.int64), mask=place < depth)
    tl.store(matches + row, match.to(tl.int64))


def look_ahead(slots: Slots, rows: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """What the texts of a batch should say next.

    Args:
        slots: `read`, `source` and `matched` are brought up to date.
        rows: [B] the slot of each row, -1 for padding; no slot twice.
        depth: D.

    Returns:
        [B, D] int64 the next tokens, -1 where nothing is known, and [B] int64 how many tokens of
        the text before them agree.
    """
    ahead = torch.empty(len(rows), depth, dtype=torch.int64, device=rows.device)
    matches = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    _look_ahead[(len(rows),)](
        rows, slots.lengths, slots.texts, slots.read, slots.source, slots.matched, ahead, matches,
        slots.texts.shape[1], depth, BLOCK_D=triton.next_power_of_2(depth), num_warps=4,
    )  # fmt: skip
    return ahead, matches
