"""The noise of rows that sample, for kernels: see `trbatch.engine.noise`, its slow twin."""

from __future__ import annotations

import triton
import triton.language as tl

from trbatch.engine import noise

_STEP = tl.constexpr(noise.STEP - (1 << 64))
_FIRST = tl.constexpr(noise.FIRST - (1 << 64))
_SECOND = tl.constexpr(noise.SECOND - (1 << 64))
_ROUND_0, _ROUND_1, _ROUND_2 = (tl.constexpr(number) for number in noise.ROUNDS)
_BELOW_ONE = tl.constexpr(noise.BELOW_ONE)


@triton.jit
def _shifted(x: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """int64 x >> BITS, zeros coming in."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _mix(state: tl.tensor, part: tl.tensor) -> tl.tensor:
    """One more argument into the state."""
    z = state + part + _STEP
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


@triton.jit
def place_key(seed: tl.tensor, sample: tl.tensor, position: tl.tensor) -> tl.tensor:
    """int64: the key of a place. seed: int64."""
    state = _mix(seed * 0, seed)
    state = _mix(state, sample.to(tl.int64))
    return _mix(state, position.to(tl.int64))


@triton.jit
def hashes(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """uint32: the bits of tokens of a place. key: int64; token: int32."""
    x = token.to(tl.uint32, bitcast=True) ^ key.to(tl.uint32)
    x = ((x ^ (x >> 17)) * _ROUND_0) ^ (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 11)) * _ROUND_1
    x = (x ^ (x >> 15)) * _ROUND_2
    return x ^ (x >> 14)


@triton.jit
def uniforms(hashed: tl.tensor) -> tl.tensor:
    """float32 in (0, 1) of uint32."""
    return tl.minimum((hashed.to(tl.float32) + 0.5) * (1.0 / (1 << 32)), _BELOW_ONE)


@triton.jit
def gumbel(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """float32 noise of tokens of a place. key: int64; token: int32."""
    u = uniforms(hashes(key, token))
    # -log(1 - u), for which Triton has no log1p. 1 - u forgets the last bits of a small u, so
    # there it is the begin of the series: below 1/16 what is left out is 2e-7 of it.
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return -tl.log(tl.where(u < 1 / 16, series, -tl.log(1 - u)))
