"""The slow, plain twin of each fast path. Never changed for speed; the tests compare with it."""

from __future__ import annotations

import torch
from torch import Tensor

from trbatch.engine.device_state import FULL, GOES_ON, STOPPED, Accepted, Slots
from trbatch.engine.spine import LONG, MATCH


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention as the textbook has it, in float32.

    Args:
        query: [heads, length, dim].
        keys, values: [kv_heads, total, dim]; each serves heads / kv_heads query heads in a row.
        bias: [length, total], added to the scores; None for zero.
        scale: what the scores are multiplied by.
        softcap: c in c·tanh(score / c), as Gemma 2 has it.

    Returns:
        [heads, length, dim] in the query's type.
    """
    group = query.shape[0] // keys.shape[0]
    k = keys.float().repeat_interleave(group, dim=0)
    v = values.float().repeat_interleave(group, dim=0)
    scores = query.float() @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.float()
    return (torch.softmax(scores, dim=-1) @ v).to(query.dtype)


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
        rows: [B] the slot of each row, -1 for padding.
        tokens: [B, T] drafted, the root first and parents before children, -1 where there is none.
        parents: [B, T] of each node.
        chosen: [B, T] the model's own next token at each node.
        deepest: D, at most so many drafted tokens are accepted.
        page_size: slots of the cache in a page.
    """
    batch, size = tokens.shape
    out = Accepted.nothing(batch, size, deepest, tokens.device)
    lists = zip(rows.tolist(), tokens.tolist(), parents.tolist(), chosen.tolist(), strict=True)
    for row, (slot, drafted, above, picks) in enumerate(lists):
        if slot < 0 or not slots.active[slot]:
            continue
        path = [0]
        for node in range(1, len(drafted)):
            agrees = drafted[node] >= 0 and drafted[node] == picks[path[-1]]
            if above[node] == path[-1] and agrees and len(path) <= deepest:
                path.append(node)
        out.on_path[row, path] = True
        proposed = [picks[node] for node in path if picks[node] >= 0]
        taken, finished = _cut(proposed, slots.stops[slot].tolist(), int(slots.left[slot]))
        count = len(taken)
        numbers = (count, finished, min(count, max(len(proposed) - 1, 0)))
        out.report[row, : 3 + count] = torch.tensor([*numbers, *taken])
        out.nodes[row, :count] = torch.tensor(path[:count])
        root = int(slots.lengths[slot]) - 1
        for place in range(1, 1 if finished else count):
            if path[place] != place:
                out.sources[row, place - 1] = _slot_of(slots, slot, root + path[place], page_size)
                out.targets[row, place - 1] = _slot_of(slots, slot, root + place, page_size)
        length, longest = int(slots.lengths[slot]), slots.texts.shape[1]
        kept = taken[: max(0, longest - length)]
        slots.texts[slot, length : length + len(kept)] = torch.tensor(kept, dtype=torch.int32)
        last = [*taken[::-1], *slots.last[slot].tolist()][: slots.last.shape[1]]
        slots.last[slot] = torch.tensor(last)
        slots.lengths[slot] += count
        slots.left[slot] -= count
        slots.active[slot] = not finished
    return out


def _cut(proposed: list[int], stops: list[int], left: int) -> tuple[list[int], int]:
    """The tokens that a text takes, up to the first that ends it, and how that one does."""
    for count, token in enumerate(proposed, 1):
        if token in stops:
            return proposed[:count], STOPPED
        if count >= left:
            return proposed[:count], FULL
    return proposed, GOES_ON


def _slot_of(slots: Slots, slot: int, place: int, page_size: int) -> int:
    return int(slots.pages[slot, place // page_size]) * page_size + place % page_size


def look_ahead(slots: Slots, rows: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """What the texts of a batch should say next. See `kernels.spine.look_ahead`."""
    ahead = torch.full((len(rows), depth), -1, dtype=torch.int64, device=rows.device)
    matches = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    most = 1 << (depth - 1).bit_length()  # a longer piece than the kernel's tile is searched anew
    for row, slot in enumerate(rows.tolist()):
        if slot < 0:
            continue
        text = slots.texts[slot, : int(slots.lengths[slot])].tolist()
        read, at = int(slots.read[slot]), int(slots.source[slot])
        fresh = text[read:]
        if at >= 0 and len(fresh) <= most and text[at : at + len(fresh)] == fresh:
            at, matched = at + len(fresh), int(slots.matched[slot]) + len(fresh)
        else:
            at, matched = _search(text)
        slots.read[slot], slots.source[slot], slots.matched[slot] = len(text), at, matched
        expected = text[at : at + depth] if at >= 0 else []
        ahead[row, : len(expected)] = torch.tensor(expected)
        matches[row] = matched
    return ahead, matches


def _search(text: list[int]) -> tuple[int, int]:
    """The last place behind an earlier occurrence of the last tokens, and how many agree there."""
    for end in range(len(text) - 1, MATCH - 1, -1):
        if text[end - MATCH : end] == text[-MATCH:]:
            backwards = zip(text[end - 1 :: -1][:LONG], text[::-1], strict=False)
            return end, next((i for i, (a, b) in enumerate(backwards) if a != b), min(end, LONG))
    return -1, 0
