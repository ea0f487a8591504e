"""Keys of contexts and their places in hash tables, as `engine.matrix` makes them."""

from __future__ import annotations

import triton
import triton.language as tl

from trbatch.engine.matrix import MIX

_MIX = tl.constexpr(MIX)


@triton.jit
def longer_key(key: tl.tensor, older: tl.tensor, vocab: tl.tensor) -> tl.tensor:
    """The key of a context with one more token before it; -1 where the text is too short.

    key: int64, of the shorter context; older: the token before it, negative where there is none.
    """
    longer = key * vocab + older.to(tl.int64)
    return tl.where((older < 0) | (key < 0), -1, longer)


@triton.jit
def place_of(key: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Where a key lies in a table of `size` places, a power of two."""
    return ((key * _MIX) >> 32) & (size - 1)
