"""Choosing tokens of rows that sample, with noise that belongs to the row.

The noise of a token is one number made of the row's seed, its sample and the token's place in the
output, so a node of a tree gets what the token would get in plain decoding. A first kernel adds up
what each part of the vocabulary weighs, a second looks into the one part where the noise falls.
What top-k and top-p leave out (`kernels.floors`), and min-p, weighs nothing. The slow twin is
`sampling.choose`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trbatch.engine.device_state import Slots
from trbatch.engine.kernels.floors import bits_of, floors, key_of

_PART = 2048  # tokens of the vocabulary in one program
_STEP = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_SECOND = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def _shifted(x: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """x >> BITS, zeros coming in."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _mix(state: tl.tensor, part: tl.tensor) -> tl.tensor:
    """One more argument into the state: see `sampling.uniform`."""
    z = state + part + _STEP
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


@triton.jit
def _weights(
    logits: tl.tensor, token: tl.tensor, vocab: tl.tensor, highest: tl.tensor,
    temperature: tl.tensor, min_p: tl.tensor, least: tl.tensor, BITS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Float64 weights of some tokens of a row, the likeliest of all weighs 1.

    least: points to the least key that is left in; BITS: of a key, 0 where all are.
    """
    there = token < vocab
    logit = tl.load(logits + token, mask=there, other=float("-inf")).to(tl.float32)
    weight = tl.exp(logit / temperature - highest / temperature)
    if BITS:
        there &= key_of(logit, BITS) >= tl.load(least)
    return tl.where(there & (weight >= min_p), weight, 0.0).to(tl.float64)


@triton.jit
def _settings(
    rows: tl.tensor, temperatures: tl.tensor, min_ps: tl.tensor, node: tl.tensor, size: tl.tensor
) -> tl.tensor:
    """Of a node: its slot, its temperature (0: it takes the likeliest) and its min-p."""
    slot = tl.load(rows + node // size).to(tl.int64)
    temperature = tl.load(temperatures + slot, mask=slot >= 0, other=0.0)
    min_p = tl.load(min_ps + slot, mask=slot >= 0, other=0.0)
    return slot, temperature, min_p


@triton.jit(do_not_specialize=["size"])
def _weigh(
    logits: tl.tensor, likeliest: tl.tensor, rows: tl.tensor, temperatures: tl.tensor,
    min_ps: tl.tensor, least: tl.tensor, sums: tl.tensor, stride: tl.tensor, size: tl.tensor,
    vocab: tl.tensor, parts: tl.tensor, BITS: tl.constexpr, PART: tl.constexpr,
) -> None:  # fmt: skip
    """sums [N, parts] float64: what each part of the vocabulary weighs."""
    node, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, temperature, min_p = _settings(rows, temperatures, min_ps, node, size)
    if temperature > 0:
        highest = tl.load(logits + node * stride + tl.load(likeliest + node)).to(tl.float32)
        token = part * PART + tl.arange(0, PART)
        weight = _weights(
            logits + node * stride, token, vocab, highest, temperature, min_p, least + node, BITS
        )
        tl.store(sums + node * parts + part, tl.sum(weight, 0))


@triton.jit(do_not_specialize=["size"])
def _draw(
    logits: tl.tensor, likeliest: tl.tensor, depths: tl.tensor, rows: tl.tensor,
    temperatures: tl.tensor, min_ps: tl.tensor, seeds: tl.tensor, samples: tl.tensor,
    begins: tl.tensor, lengths: tl.tensor, least: tl.tensor, sums: tl.tensor, chosen: tl.tensor,
    stride: tl.tensor, size: tl.tensor, vocab: tl.tensor, parts: tl.tensor,
    BITS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """chosen [N]: the token at which the noise falls."""
    node = tl.program_id(0).to(tl.int64)
    slot, temperature, min_p = _settings(rows, temperatures, min_ps, node, size)
    top = tl.load(likeliest + node)
    if temperature > 0:
        place = tl.load(lengths + slot) - tl.load(begins + slot) + tl.load(depths + node)
        state = _mix(tl.load(seeds + slot) * 0, tl.load(seeds + slot))
        state = _mix(state, tl.load(samples + slot).to(tl.int64))
        state = _mix(state, place.to(tl.int64))
        noise = _shifted(state, 11).to(tl.float64) * (1.0 / (1 << 53))
        at = tl.arange(0, PARTS)
        weighs = tl.load(sums + node * parts + at, mask=at < parts, other=0.0)
        behind = tl.cumsum(weighs, 0)
        target = noise * tl.sum(weighs, 0)
        # The first part whose end lies beyond the target; rounding may leave none.
        part = tl.min(tl.where((behind > target) & (at < parts), at, PARTS), 0)
        last = tl.max(tl.where(weighs > 0, at, 0), 0)
        part = tl.minimum(part, last)
        before = tl.sum(tl.where(at < part, weighs, 0.0), 0)
        highest = tl.load(logits + node * stride + top).to(tl.float32)
        token = part * PART + tl.arange(0, PART)
        weight = _weights(
            logits + node * stride, token, vocab, highest, temperature, min_p, least + node, BITS
        )
        reached = before + tl.cumsum(weight, 0)
        first = tl.min(tl.where((reached > target) & (weight > 0), token, vocab), 0)
        heavy = tl.max(tl.where(weight > 0, token, 0), 0)
        tl.store(chosen + node, tl.minimum(first, heavy).to(tl.int64))
    else:
        tl.store(chosen + node, top)


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
    sums = torch.empty(count, parts, dtype=torch.float64, device=logits.device)
    chosen = torch.empty(count, dtype=torch.int64, device=logits.device)
    size, stride = count // len(rows), logits.stride(0)
    whose = (rows, slots.temperatures, slots.min_ps)
    likeliest, depths = likeliest.contiguous(), depths.contiguous()
    least = floors(slots, rows, logits, likeliest) if filtering else chosen
    bits = bits_of(logits) if filtering else 0
    _weigh[count, parts](
        logits, likeliest, *whose, least, sums, stride, size, vocab, parts,
        BITS=bits, PART=_PART, num_warps=4,
    )  # fmt: skip
    _draw[(count,)](
        logits, likeliest, depths, *whose, slots.seeds, slots.samples, slots.begins,
        slots.lengths, least, sums, chosen, stride, size, vocab, parts,
        BITS=bits, PART=_PART, PARTS=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    return chosen
