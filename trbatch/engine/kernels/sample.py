"""Choosing tokens of rows that sample, with noise that belongs to the row.

The token with the highest sum of its logit over the temperature and its noise is taken. The noise
(`kernels.noise`) is made of the row's seed, its sample, the token's place in the output and the
token, so a node of a tree gets what it would get in plain decoding. Logits are read once: a first
kernel finds the highest sum of each part of the vocabulary, a second the highest of these. What
top-k and top-p leave out (`kernels.floors`), and min-p, does not take part. The slow twin is
`sampling.choose`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine.device_state import Slots
from trbatch.engine.kernels.floors import bits_of, floors, key_of
from trbatch.engine.kernels.likeliest import LOWEST, index_of, packed
from trbatch.engine.kernels.noise import gumbel, place_key

_PART = 2048  # tokens of the vocabulary in one program


@triton.jit
def _slot(rows: tl.tensor, temperatures: tl.tensor, node: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Of a node: its slot, and its temperature (0: it takes the likeliest)."""
    slot = tl.load(rows + node // size).to(tl.int64)
    return slot, tl.load(temperatures + slot, mask=slot >= 0, other=0.0)


@triton.jit(do_not_specialize=["size"])
def _race(
    logits: tl.tensor, likeliest: tl.tensor, depths: tl.tensor, rows: tl.tensor,
    temperatures: tl.tensor, min_ps: tl.tensor, seeds: tl.tensor, samples: tl.tensor,
    begins: tl.tensor, lengths: tl.tensor, least: tl.tensor, best: tl.tensor, stride: tl.tensor,
    size: tl.tensor, vocab: tl.tensor, parts: tl.tensor, BITS: tl.constexpr, PART: tl.constexpr,
) -> None:  # fmt: skip
    """best [N, parts] int64: of each part of the vocabulary the highest sum, with its token.

    least: [N] the least keys that are left in; BITS: of a key, 0 where all are.
    """
    node, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, temperature = _slot(rows, temperatures, node, size)
    if temperature > 0:
        place = tl.load(lengths + slot) - tl.load(begins + slot) + tl.load(depths + node)
        key = place_key(tl.load(seeds + slot), tl.load(samples + slot), place)
        logits += node * stride
        highest = tl.load(logits + tl.load(likeliest + node)).to(tl.float32)
        token = part * PART + tl.arange(0, PART)
        there = token < vocab
        logit = tl.load(logits + token, mask=there, other=float("-inf")).to(tl.float32)
        weight = (logit - highest) / temperature
        # Not `>=`: of logits that are no numbers some token has to come out.
        there &= ~(tl.exp(weight) < tl.load(min_ps + slot))
        if BITS:
            there &= key_of(logit, BITS) >= tl.load(least + node)
        sums = packed(weight + gumbel(key, token), token)
        tl.store(best + node * parts + part, tl.max(tl.where(there, sums, LOWEST), 0))


@triton.jit(do_not_specialize=["size"])
def _win(
    likeliest: tl.tensor, rows: tl.tensor, temperatures: tl.tensor, best: tl.tensor,
    chosen: tl.tensor, size: tl.tensor, parts: tl.tensor, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """chosen [N]: the token of the highest of all parts' sums."""
    node = tl.program_id(0).to(tl.int64)
    _, temperature = _slot(rows, temperatures, node, size)
    token = tl.load(likeliest + node)
    if temperature > 0:
        at = tl.arange(0, PARTS)
        token = index_of(
            tl.max(tl.load(best + node * parts + at, mask=at < parts, other=LOWEST), 0)
        )
    tl.store(chosen + node, token)


def sample(
    slots: Slots,
    rows: Tensor,
    logits: Tensor,
    likeliest: Tensor,
    depths: Tensor,
    *,
    filtering: bool = True,
) -> Tensor:
    """The model's own next token at each node.

    Args:
        rows: [B] the slot of each row, -1 for padding.
        logits: [N, V] raw, of B times T nodes, each row adjacent.
        likeliest: [N] int64 the likeliest token of each.
        depths: [N] of each node.
        filtering: whether any row has top-k or top-p.

    Returns:
        [N] int64; of rows whose temperature is 0 the likeliest.
    """
    count, vocab = logits.shape
    parts = triton.cdiv(vocab, _PART)
    best = torch.empty(count, parts, dtype=torch.int64, device=logits.device)
    chosen = torch.empty(count, dtype=torch.int64, device=logits.device)
    size, stride = count // len(rows), logits.stride(0)
    likeliest, depths = likeliest.contiguous(), depths.contiguous()
    least = floors(slots, rows, logits, likeliest) if filtering else chosen
    _race[count, parts](
        logits, likeliest, depths, rows, slots.temperatures, slots.min_ps, slots.seeds,
        slots.samples, slots.begins, slots.lengths, least, best, stride, size, vocab, parts,
        BITS=bits_of(logits) if filtering else 0, PART=_PART, num_warps=4,
    )  # fmt: skip
    _win[(count,)](
        likeliest, rows, slots.temperatures, best, chosen, size, parts,
        PARTS=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    return chosen
