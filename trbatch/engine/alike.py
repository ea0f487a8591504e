"""Whether a quicker form of a module says what the module itself says.

Nothing is swapped into a network because of its name: the swap and the original are given the same
random input first, and only one that says the same takes the place.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a row's largest value. In 16 bits the originals round after each small operation and the quick
# forms once: a few steps of the type (2^-10, 2^-7) apart.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
COMPARED = frozenset(_TOLERANCE)  # types for which "the same" has a meaning here


def random_like(like: Tensor, *shape: int) -> Tensor:
    """Standard normal values of this type and device, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results [..., rows, d] are equal in shape, type and, up to rounding, values."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    apart = (found.float() - wanted.float()).abs().amax(-1)
    # Not a number is never close.
    return bool((apart <= _TOLERANCE[wanted.dtype] * wanted.float().abs().amax(-1)).all())
