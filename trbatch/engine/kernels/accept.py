"""Accepting a verified tree, cutting it at the end of the text and bringing the slots up to date.

One program, of one warp, takes one row of the batch. Which nodes agree with the model is known for
all at once; the walk then looks for the agreeing child, one level after the other. The slow twin is
`reference.accept`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine.device_state import (
    FULL,
    GOES_ON,
    NO_RANK,
    REPORT_NUMBERS,
    STOPPED,
    Accepted,
    Slots,
)

_GOES_ON, _STOPPED, _FULL = (tl.constexpr(end) for end in (GOES_ON, STOPPED, FULL))
_NO_RANK = tl.constexpr(NO_RANK)
_NODES_A_WARP = 128


@triton.jit
def _walk(
    tokens: tl.tensor, parents: tl.tensor, chosen: tl.tensor, ran: tl.tensor, size: tl.tensor,
    deepest: tl.tensor, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """From the root along agreeing children: path [BLOCK_D], -1 behind it; on_path [BLOCK_T].

    tokens, parents, chosen: [size] of one row.
    """
    node, level = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    below = (node > 0) & (node < size)
    token = tl.load(tokens + node, mask=below, other=-1)
    parent = tl.load(parents + node, mask=below, other=-1).to(tl.int32)
    wanted = tl.load(chosen + parent, mask=below & ran, other=-1)
    agrees = (token >= 0) & (token == wanted)
    path = tl.where((level == 0) & ran, 0, -1)
    on_path = (node == 0) & ran
    depth = 0
    child = tl.min(tl.where(agrees & (parent == 0), node, BLOCK_T), 0)
    while (child < BLOCK_T) & (depth < deepest):
        depth += 1
        path = tl.where(level == depth, child, path)
        on_path = on_path | (node == child)
        child = tl.min(tl.where(agrees & (parent == child), node, BLOCK_T), 0)
    return path, on_path


@triton.jit
def _cut(after: tl.tensor, stops: tl.tensor, left: tl.tensor, BLOCK_D: tl.constexpr) -> tl.tensor:
    """How many of the proposed tokens a text takes, how it goes on, and how many were proposed.

    after: [BLOCK_D] proposed tokens, -1 behind them; stops: [M] ids that end the text, or -1.
    """
    level, stops = tl.arange(0, BLOCK_D), stops[None, :]
    ends = tl.max(((after[:, None] == stops) & (stops >= 0)).to(tl.int32), 1)
    first = tl.min(tl.where(ends > 0, level, BLOCK_D), 0) + 1  # tokens up to it, it included
    proposed = tl.sum((after >= 0).to(tl.int32), 0)
    count = tl.minimum(tl.minimum(proposed, tl.maximum(left, 1)), first)
    finished = tl.where((count > 0) & (count >= left), _FULL, _GOES_ON)
    return count, tl.where(count == first, _STOPPED, finished), proposed


@triton.jit
def _moves(
    sources: tl.tensor, targets: tl.tensor, path: tl.tensor, kept: tl.tensor, root: tl.tensor,
    pages: tl.tensor, deepest: tl.tensor, page_size: tl.tensor, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """sources, targets [deepest]: the first `kept` nodes of a path to behind their root.

    root: its place in the sequence; pages: of the sequence.
    """
    level = tl.arange(0, BLOCK_D)
    moves = (level > 0) & (level < kept) & (path != level)
    source, target = root + path, root + level
    from_page = tl.load(pages + source // page_size, mask=moves, other=0)
    to_page = tl.load(pages + target // page_size, mask=moves, other=0)
    source = tl.where(moves, from_page * page_size + source % page_size, -1)
    target = tl.where(moves, to_page * page_size + target % page_size, -1)
    there = (level > 0) & (level <= deepest)
    tl.store(sources + level - 1, source, mask=there)
    tl.store(targets + level - 1, target, mask=there)


@triton.jit(
    do_not_specialize=[
        "parents_apart", "size", "deepest", "most_stops", "most_pages", "longest", "page_size",
    ]
)  # fmt: skip
def _accept(
    tokens: tl.tensor, parents: tl.tensor, chosen: tl.tensor, rows: tl.tensor,
    lengths: tl.tensor, last: tl.tensor, left: tl.tensor, stops: tl.tensor, active: tl.tensor,
    pages: tl.tensor, texts: tl.tensor, report: tl.tensor, nodes: tl.tensor, on_path: tl.tensor,
    sources: tl.tensor, targets: tl.tensor, parents_apart: tl.tensor, size: tl.tensor,
    deepest: tl.tensor, most_stops: tl.tensor, most_pages: tl.tensor, longest: tl.tensor,
    page_size: tl.tensor, ORDERS: tl.constexpr,
    NUMBERS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """See `accept`. A row that does not run proposes nothing and so comes out empty."""
    row = tl.program_id(0).to(tl.int64)
    node, level, place = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, 4)
    slot = tl.load(rows + row).to(tl.int64)
    # What does not depend on the walk is asked for first, so that it is there behind it.
    ran = tl.load(active + slot, mask=slot >= 0, other=0) != 0
    room = tl.load(left + slot, mask=slot >= 0, other=0)
    length = tl.load(lengths + slot, mask=slot >= 0, other=0)
    stop = tl.arange(0, BLOCK_M)
    stop = tl.load(
        stops + slot * most_stops + stop, mask=(stop < most_stops) & (slot >= 0), other=-1
    )
    chosen += row * size
    path, agreed = _walk(
        tokens + row * size, parents + row * parents_apart, chosen, ran, size, deepest,
        BLOCK_T, BLOCK_D,
    )  # fmt: skip
    after = tl.load(chosen + path, mask=path >= 0, other=-1).to(tl.int32)
    count, finished, proposed = _cut(after, stop, room, BLOCK_D)
    _moves(
        sources + row * deepest, targets + row * deepest, path,
        tl.where(finished == _GOES_ON, count, 0), length - 1, pages + slot * most_pages,
        deepest, page_size, BLOCK_D,
    )  # fmt: skip
    tl.store(on_path + row * size + node, agreed, mask=node < size)
    taken, there = level < count, level <= deepest
    tl.store(nodes + row * (deepest + 1) + level, tl.where(taken, path, -1), mask=there)
    report += row * (NUMBERS + 2 * (deepest + 1))
    tl.store(report, count)
    tl.store(report + 1, finished)
    tl.store(report + 2, tl.minimum(count, tl.maximum(proposed - 1, 0)))
    tl.store(report + NUMBERS + level, tl.where(taken, after, -1), mask=there)
    tl.store(report + NUMBERS + deepest + 1 + level, _NO_RANK, mask=there)
    text = texts + slot * longest + length
    tl.store(text + level, after, mask=taken & (length + level < longest))
    # The newest of the tokens taken, and behind them those that were newest before.
    newest = tl.sum(tl.where(level[None, :] == (count - 1 - place)[:, None], after[None, :], 0), 1)
    last += slot * ORDERS + place
    inside = (place < ORDERS) & ran
    before = tl.load(last - count, mask=inside & (place >= count), other=-1)
    tl.debug_barrier()  # all has been read of the slot that is now written
    tl.store(last, tl.where(place < count, newest, before), mask=inside)
    tl.store(lengths + slot, length + count, mask=ran)
    tl.store(left + slot, room - count, mask=ran)
    tl.store(active + slot, finished == _GOES_ON, mask=ran)


def accept(
    slots: Slots,
    rows: Tensor,
    tokens: Tensor,
    parents: Tensor,
    chosen: Tensor,
    *,
    deepest: int,
    page_size: int,
) -> Accepted:
    """Accept what agrees, cut it at the end of the text, and bring the slots up to date.

    Args:
        slots: changed.
        rows: [B] the slot of each row, -1 for padding; no slot twice.
        tokens: [B, T] drafted, the root first and parents before children, -1 where there is none.
        parents: [B, T] of each node; the rows may be one and the same, expanded.
        chosen: [B, T] the model's own next token at each node.
        deepest: D, at most so many drafted tokens are accepted.
        page_size: slots of the cache in a page.
    """
    batch, size = tokens.shape
    device = tokens.device
    assert tokens.is_contiguous() and chosen.is_contiguous()
    assert size == 1 or parents.stride(1) == 1, "a row's parents must be adjacent"
    assert slots.last.shape[1] <= 4, "the kernel's tile of last tokens"

    def numbers(width: int) -> Tensor:
        return torch.empty(batch, width, dtype=torch.int32, device=device)

    out = Accepted(
        report=numbers(REPORT_NUMBERS + 2 * (deepest + 1)),
        nodes=numbers(deepest + 1),
        on_path=torch.empty(batch, size, dtype=torch.bool, device=device),
        sources=numbers(deepest),
        targets=numbers(deepest),
    )
    block = triton.next_power_of_2(size)
    most_stops, most_pages = slots.stops.shape[1], slots.pages.shape[1]
    _accept[(batch,)](
        tokens, parents, chosen, rows, slots.lengths, slots.last, slots.left, slots.stops,
        slots.active, slots.pages, slots.texts, out.report, out.nodes, out.on_path, out.sources,
        out.targets, parents.stride(0), size, deepest, most_stops, most_pages,
        slots.texts.shape[1], page_size,
        ORDERS=slots.last.shape[1], NUMBERS=REPORT_NUMBERS, BLOCK_T=block,
        BLOCK_D=triton.next_power_of_2(deepest + 1), BLOCK_M=triton.next_power_of_2(most_stops),
        num_warps=min(4, max(1, block // _NODES_A_WARP)),
    )  # fmt: skip
    return out
