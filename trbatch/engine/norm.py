"""Norm layers in one operation instead of six.

Every architecture of transformers writes its own RMSNorm, of small operations that cost more in
being called than in arithmetic when a step has few tokens. A layer is replaced only after torch's
`rms_norm`, or on a GPU our kernel, has given the same on random input; the layer itself is the slow
twin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trbatch.engine.alike import COMPARED, random_like, same

_EPS_NAMES = ("variance_epsilon", "eps")
_Kernel = Callable[[Tensor, Tensor, float], Tensor]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight`.

    Args:
        weight: [d].
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps, self._shape = weight, eps, weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: [..., d]. Returns: the same shape."""
        return torch.rms_norm(x, self._shape, self.weight, self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """No hooks, as in `joined.Product`."""
        return torch.rms_norm(x, self._shape, self.weight, self.eps)


class KernelRMSNorm(RMSNorm):
    """The same by our kernel, for rows of any strides and a weight of any type.

    torch's would copy the heads of a joined projection first, and would take its slow path for a
    float32 weight in a network of 16 bits.
    """

    def __init__(self, weight: Tensor, eps: float, kernel: _Kernel) -> None:
        super().__init__(weight, eps)
        self._kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """See `RMSNorm.forward`."""
        return self._kernel(x, self.weight, self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """The same again, without a frame."""
        return self._kernel(x, self.weight, self.eps)


def replace_norms(network: nn.Module, *, kernels: bool = False) -> int:
    """Replace those RMSNorms of a network that are plain ones.

    Args:
        kernels: use our kernel, which also serves 16 bits; else only float32 is looked at.

    Returns:
        How many were replaced.
    """
    kernel: _Kernel | None = None
    if kernels:
        from trbatch.engine.kernels.norm import rms_norm as kernel
    count = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and (plain := _plain_twin(child, kernel)):
                setattr(parent, name, plain)
                count += 1
    return count


@torch.no_grad()
def _plain_twin(norm: nn.Module, kernel: _Kernel | None) -> RMSNorm | None:
    """A plain RMSNorm that gives the same as this layer, None if none does."""
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, name) for name in _EPS_NAMES if hasattr(norm, name)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.dtype not in (COMPARED if kernel else {torch.float32}):
        return None
    # Small rows too, where eps shows.
    sizes = torch.tensor([[1.0], [100.0], [1e-2], [1e-4]])
    x = random_like(weight, 4, weight.shape[0]) * sizes.to(weight.device, weight.dtype)
    wanted = norm(x)
    # Gemma's weights are what is added to 1, in float32, which 16 bits would round.
    for factor in (weight.detach(), 1.0 + weight.detach().float()):
        twin = KernelRMSNorm(factor, eps, kernel) if kernel else RMSNorm(factor, eps)
        if same(twin(x), wanted):
            return twin
    return None
