"""Linear layers that cost little more for eight tokens than for one, on a CPU.

A decode step multiplies a few tokens by every weight. The usual float32 path of torch on x86 costs
up to twice as much for 4 to 16 tokens as for 1, which would eat the whole gain of a small draft
tree; oneDNN with weights packed once keeps it flat. For one to three tokens the usual path is the
quicker one on some processors, so where memory allows both forms are kept and the border is timed.
Layers that are given the same input become one product (`joined`).
Figures are in `docs/performance.md`. On other devices and types nothing is packed. The slow twin is
`torch.nn.Linear` itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from trbatch.engine.joined import Product, joined_weight, places_of, replace_linears

_MOST_FEW = 4  # tokens up to which the usual path is tried
_SAMPLE_BYTES = 256 << 20  # of weights are timed: more than a processor's caches hold
_GAIN = 0.98  # of the packed product's time: what the usual path must undercut
_SHARE = 8  # both forms are kept while one takes at most this part of the machine's memory


class PackedLinear(Product):
    """The product of one or several linear layers, W in oneDNN's own layout.

    Args:
        linears: float32, on the CPU, of the same input size.
        keep: keep W in its usual form too, for products of `few` tokens.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, keep: bool = False) -> None:
        super().__init__(linears)
        weight = joined_weight(linears)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight = weight if keep else None
        self.few = 0  # tokens up to which the usual path is taken

    def forward(self, x: Tensor) -> Tensor:
        """See `Product.forward`."""
        return self.usual(x) if x.numel() <= self.few * self.in_features else self.quick(x)

    def usual(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., sum of widths] by torch's own product."""
        assert self.weight is not None, "kept in oneDNN's layout only"
        return functional.linear(x, self.weight, self.bias)

    def quick(self, x: Tensor) -> Tensor:
        """The same by oneDNN's product with packed weights."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and processor have the packed path for this type."""
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack_linears(network: nn.Module, run: Callable[[], object] | None = None) -> int:
    """Replace the plain `nn.Linear` layers of a network by packed ones.

    Args:
        run: see `joined.replace_linears`.

    Returns:
        How many layers were replaced.
    """
    keep = _fits_twice(place.linear.weight for place in places_of(network))
    packed: list[PackedLinear] = []

    def pack(linears: Sequence[nn.Linear]) -> PackedLinear:
        packed.append(PackedLinear(linears, keep=keep))
        return packed[-1]

    replace_linears(network, pack, run)
    if keep and packed:
        border = _time_border(packed)
        for whole in packed:
            whole.few = border
    return sum(len(whole.widths) for whole in packed)


def _fits_twice(weights: Iterable[Tensor]) -> bool:
    """Whether the machine has room for a second form of these weights."""
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    return needed <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _SHARE


@torch.inference_mode()
def _time_border(packed: Sequence[PackedLinear]) -> int:
    """The most tokens for which the usual path is the quicker one here."""
    sample, size = [], 0
    for layer in packed:
        sample.append(layer)
        size += 4 * layer.in_features * sum(layer.widths)
        if size >= _SAMPLE_BYTES:
            break
    for count in range(1, _MOST_FEW + 1):
        inputs = {layer.in_features: torch.randn(count, layer.in_features) for layer in sample}
        usual = quick = float("inf")
        for _ in range(3):  # taking turns, so that whatever disturbs one disturbs the other
            usual = min(usual, _seconds(PackedLinear.usual, sample, inputs))
            quick = min(quick, _seconds(PackedLinear.quick, sample, inputs))
        if usual >= _GAIN * quick:
            return count - 1
    return _MOST_FEW


def _seconds(
    product: Callable[[PackedLinear, Tensor], Tensor],
    layers: Sequence[PackedLinear],
    inputs: dict[int, Tensor],
) -> float:
    start = time.perf_counter()
    for layer in layers:
        product(layer, inputs[layer.in_features])
    return time.perf_counter() - start
