"""Linear layers that cost little more for eight tokens than for one, on a CPU.

A decode step multiplies a few tokens by every weight. The usual float32 path of torch on x86 costs
twice as much for 2 to 16 tokens as for 1, which would eat the whole gain of a small draft tree;
oneDNN with weights packed once keeps it flat (figures in `docs/performance.md`). On other devices
and types nothing is packed. The slow twin is `torch.nn.Linear` itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """`y = x Wᵀ + b` with W in oneDNN's own layout. Same function as the `nn.Linear` it replaces.

    Args:
        linear: float32, on the CPU; its weight may be shared with an embedding and is not changed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: [..., in_features]. Returns: [..., out_features]."""
        y = torch.ops.mkldnn._linear_pointwise(
            x.reshape(-1, self.in_features), self.packed, self.bias, "none", [], ""
        )
        shaped: Tensor = y.view(*x.shape[:-1], self.out_features)
        return shaped


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and processor have the packed path for this type."""
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack_linears(module: nn.Module) -> int:
    """Replace each plain `nn.Linear` below `module` by its packed twin. Returns how many."""
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count
