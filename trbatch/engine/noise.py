"""The noise of rows that sample: a number of its own for every (row seed, sample, position, token).

Sampling is the Gumbel-max trick (Gumbel, 1954; Maddison, Tarlow and Minka, 2014): Gumbel noise is
added to the logits over the temperature, and the highest is taken. That is the same as a race of
exponentials, the first of which wins as often as it is likely. A rounding error of the logits only
changes the choice where the two best are closer than it. With one number for a place, looked up
among the sums of all shares, the error moves the bounds of every token, most of which are no
further apart in the tail of the vocabulary.

Noise is counter-based (Salmon, Moraes, Dror and Shaw, 2011): nothing is drawn before it is needed
and nothing depends on what was drawn before. A place has a key of 64 bits, SplitMix64's finaliser
(Steele, Lea and Flood, 2014) over seed, sample and position. A token's 32 bits are triple32
(Wellons, "Hash function prospecting", 2018) of the key's lower half and the token; the upper half
comes in after the first of its three products, so that places of equal lower halves differ, too.
With one key that is a bijection: no two tokens of a place have the same bits.

The twin for kernels is `kernels.noise`: keys, bits and uniform numbers are the same, logarithms
may differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64
ROUNDS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)  # what triple32 multiplies by
BELOW_ONE = 1 - 2.0**-24  # the last float32 before 1, whose logarithm there is
_MASK = (1 << 64) - 1


def place_key(seed: int, sample: int, position: int) -> int:
    """The key of a place, below 2**64, that depends on nothing but its arguments.

    Args:
        seed: of the row.
        sample: which of the row's.
        position: of the token in the output, from 0.
    """
    state = 0
    for part in (seed, sample, position):
        state = _mix((state + part + STEP) & _MASK)
    return state


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * FIRST) & _MASK
    z = ((z ^ (z >> 27)) * SECOND) & _MASK
    return z ^ (z >> 31)


def gumbel(keys: Sequence[int], vocab: int, device: torch.device | None = None) -> Tensor:
    """[n, V] float32 standard Gumbel noise, -log(E) of exponential E: from -2.9 to 22.9.

    Args:
        keys: n of them, as `place_key` makes them.
        vocab: V.
    """
    exponential = uniforms(hashes(keys, vocab, device)).neg_().log1p_().neg_()
    return exponential.log_().neg_()


def uniforms(hashed: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float32: (h + 1/2) / 2**32 of 32 bits h.

    Small ones, of which unlikely tokens need one to be taken, keep all 24 bits of a float32: the
    least is 2**-33, so that whatever is 1e-9 as likely as the likeliest still comes as often as
    it should. Numbers near 1 only say how late a token comes, and are cut.
    """
    numbers = hashed.view(torch.uint32).to(torch.float32)
    return numbers.add_(0.5).mul_(2.0**-32).clamp_(max=BELOW_ONE)


def hashes(keys: Sequence[int], vocab: int, device: torch.device | None = None) -> Tensor:
    """[n, V] int32: the 32 bits of each token of each place."""
    low, high = (
        torch.tensor([_signed(key >> shift) for key in keys], dtype=torch.int32, device=device)
        for shift in (0, 32)
    )
    x = torch.arange(vocab, dtype=torch.int32, device=device) ^ low[:, None]
    spare = torch.empty_like(x)
    _fold(x, 17, spare).mul_(_signed(ROUNDS[0])).bitwise_xor_(high[:, None])
    _fold(x, 11, spare).mul_(_signed(ROUNDS[1]))
    _fold(x, 15, spare).mul_(_signed(ROUNDS[2]))
    return _fold(x, 14, spare)


def _fold(x: Tensor, bits: int, spare: Tensor) -> Tensor:
    """x ^= x >> bits, zeros coming in. `spare`: of the same shape, overwritten."""
    torch.bitwise_right_shift(x, bits, out=spare)
    return x.bitwise_xor_(spare.bitwise_and_((1 << (32 - bits)) - 1))


def _signed(number: int) -> int:
    """The int32 of the lower 32 bits: torch shifts no unsigned numbers on a CPU."""
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
