"""Norm layers in one operation instead of six.

Every architecture of transformers writes its own RMSNorm, of small operations that cost more in
being called than in arithmetic when a step has few tokens. A layer is replaced only after torch's
`rms_norm` has given the same on random input; the layer itself is the slow twin.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EPS_NAMES = ("variance_epsilon", "eps")


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
        """No hooks, as in `linear.PackedLinear`."""
        return torch.rms_norm(x, self._shape, self.weight, self.eps)


def replace_norms(network: nn.Module) -> int:
    """Replace those RMSNorms of a float32 network that are plain ones. Returns how many."""
    count = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and (plain := _plain_twin(child)):
                setattr(parent, name, plain)
                count += 1
    return count


@torch.inference_mode()
def _plain_twin(norm: nn.Module) -> RMSNorm | None:
    """A plain RMSNorm that gives the same as this layer, None if none does."""
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, name) for name in _EPS_NAMES if hasattr(norm, name)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.dtype != torch.float32:
        return None
    if not isinstance(eps, float):
        return None
    twin = RMSNorm(weight.detach(), eps)
    # Small numbers too, where eps shows.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[0], generator=generator).to(weight.device)
    x *= torch.tensor([[1.0], [100.0], [1e-2], [1e-4]], device=weight.device)
    same = torch.allclose(norm(x), twin(x), rtol=1e-5, atol=1e-6)
    return twin if same else None
