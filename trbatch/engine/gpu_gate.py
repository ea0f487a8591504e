"""Gated MLPs, `down(activation(gate(x)) · up(x))`, around one kernel.

An MLP is replaced only where its gate and up come out of one product already, its activation is
one that the kernel has, and the whole gave the same on random input; it is the slow twin itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from trbatch.engine.alike import random_like, same
from trbatch.engine.joined import JoinedLinear, Part
from trbatch.engine.kernels.gate import gate

_ACTIVATION_NAMES = ("act_fn", "activation_fn")


class GatedMLP(nn.Module):
    """Three launches: gate and up, their gated product, down.

    Args:
        gate_up: [..., d] -> [..., 2 I], of each row the gate, then up.
        down: [..., I] -> [..., d].
        activation: see `kernels.gate.gate`.
    """

    def __init__(self, gate_up: JoinedLinear, down: nn.Module, activation: str) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        y: Tensor = self.down(gate(self.gate_up(x), self.activation))
        return y

    def __call__(self, x: Tensor) -> Tensor:
        """No hooks, as in `joined.Product`."""
        return self.forward(x)


def replace_gated(network: nn.Module) -> int:
    """Replace those gated MLPs of a network whose layers are joined. Returns how many."""
    count = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if fused := _fused_twin(child):
                setattr(parent, name, fused)
                count += 1
    return count


@torch.no_grad()
def _fused_twin(mlp: nn.Module) -> GatedMLP | None:
    """A fused MLP that gives the same as this module, None if none does."""
    gate_up, down = _gate_up(mlp), getattr(mlp, "down_proj", None)
    activation = _activation(mlp)
    if gate_up is None or activation is None or not isinstance(down, JoinedLinear):
        return None
    twin = GatedMLP(gate_up, down, activation)
    x = random_like(gate_up.weight, 1, 5, gate_up.in_features)
    return twin if same(twin(x), mlp(x)) else None


def _gate_up(mlp: nn.Module) -> JoinedLinear | None:
    """The product that is gate and up side by side: made of two layers, or always one."""
    first, second = getattr(mlp, "gate_proj", None), getattr(mlp, "up_proj", None)
    whole = getattr(mlp, "gate_up_proj", None)
    if isinstance(first, Part) and isinstance(second, Part) and first.shared is second.shared:
        if (first.index, second.index) != (0, 1) or len(first.shared.whole.widths) != 2:
            return None
        whole = first.shared.whole
    return whole if isinstance(whole, JoinedLinear) else None


def _activation(mlp: nn.Module) -> str | None:
    """Which activation of the kernel's an MLP has, None for another.

    Asked over the range where activations differ and in float32: behind random weights in 16 bits
    two of them could pass for each other.
    """
    function = next((getattr(mlp, n) for n in _ACTIVATION_NAMES if hasattr(mlp, n)), None)
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    x = torch.linspace(-8, 8, 641)
    for name, twin in known.items():
        if function is not None and torch.allclose(function(x), twin(x), rtol=1e-5, atol=1e-6):
            return name
    return None
