"""Linear layers that cost little more for eight tokens than for one, on a CPU.

A decode step multiplies a few tokens by every weight. The usual float32 path of torch on x86 costs
up to twice as much for 4 to 16 tokens as for 1, which would eat the whole gain of a small draft
tree; oneDNN with weights packed once keeps it flat. For one to three tokens the usual path is the
quicker one on some processors, so where memory allows both forms are kept and the border is timed.
Layers that are given the same input (Q, K and V; gate and up) become one product.
Figures are in `docs/performance.md`. On other devices and types nothing is packed. The slow twin is
`torch.nn.Linear` itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional

_MOST_FEW = 4  # tokens up to which the usual path is tried
_SAMPLE_BYTES = 256 << 20  # of weights are timed: more than a processor's caches hold
_GAIN = 0.98  # of the packed product's time: what the usual path must undercut
_SHARE = 8  # both forms are kept while one takes at most this part of the machine's memory


class PackedLinear(nn.Module):
    """`y = x Wᵀ + b` of one or several linear layers in one product, W in oneDNN's own layout.

    Args:
        linears: float32, on the CPU, of the same input size; a weight may be shared with an
            embedding and is not changed.
        keep: keep W in its usual form too, for products of `few` tokens.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, keep: bool = False) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.widths = [linear.out_features for linear in linears]
        weights = [linear.weight.detach() for linear in linears]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias = _joined_bias(linears)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight = weight if keep else None
        self.few = 0  # tokens up to which the usual path is taken

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: [..., in_features]. Returns: [..., sum of widths]."""
        return self.usual(x) if x.numel() <= self.few * self.in_features else self.quick(x)

    def __call__(self, x: Tensor) -> Tensor:
        """No hooks: a step makes hundreds of these calls, and each of Python's frames costs."""
        return self.forward(x)

    def usual(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., sum of widths] by torch's own product."""
        assert self.weight is not None, "kept in oneDNN's layout only"
        return functional.linear(x, self.weight, self.bias)

    def quick(self, x: Tensor) -> Tensor:
        """The same by oneDNN's product with packed weights."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class _Shared(threading.local):
    """One product whose parts are asked for one by one, with the same input, in each thread."""

    def __init__(self, whole: PackedLinear) -> None:
        self.whole = whole
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._left = 0

    def part(self, x: Tensor, index: int) -> Tensor:
        if x is not self._input:
            self._input, self._left = x, len(self.whole.widths)
            self._parts = self.whole(x).split_with_sizes(self.whole.widths, -1)
        part = self._parts[index]
        self._left -= 1
        if self._left == 0:
            self._input, self._parts = None, ()
        return part


class _Part(nn.Module):
    """One of the layers that a shared product stands for."""

    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()
        self.shared, self._index = shared, index

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.part(x, self._index)

    def __call__(self, x: Tensor) -> Tensor:
        """As in `PackedLinear`."""
        return self.shared.part(x, self._index)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a linear layer hangs in its network."""

    parent: nn.Module
    name: str
    linear: nn.Linear


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and processor have the packed path for this type."""
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack_linears(network: nn.Module, run: Callable[[], object] | None = None) -> int:
    """Replace the plain `nn.Linear` layers of a network by packed ones.

    Args:
        run: runs the network once, on anything: layers that are then given the same tensor, one
            after the other and in the same module, become one product. None: each stays alone.

    Returns:
        How many layers were replaced.
    """
    places = [
        _Place(parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    groups = [[place] for place in places] if run is None else _sharing_input(places, run)
    keep = _fits_twice(place.linear.weight for place in places)
    packed = []
    for group in groups:
        whole = PackedLinear([place.linear for place in group], keep=keep)
        packed.append(whole)
        shared = _Shared(whole)
        for index, place in enumerate(group):
            layer = whole if len(group) == 1 else _Part(shared, index)
            setattr(place.parent, place.name, layer)
    if keep and packed:
        border = _time_border(packed)
        for whole in packed:
            whole.few = border
    return len(places)


def _sharing_input(places: list[_Place], run: Callable[[], object]) -> list[list[_Place]]:
    """The places in groups that get the same tensor; those that did not run, or twice, alone."""
    calls: list[tuple[_Place, Tensor]] = []
    hooks = [
        place.linear.register_forward_pre_hook(
            lambda _, inputs, place=place: calls.append((place, inputs[0]))
        )
        for place in places
    ]
    run()
    for hook in hooks:
        hook.remove()
    # The calls hold their tensors, so no two of them share an identity by chance.
    runs = [
        [place for place, _ in same]
        for _, same in groupby(calls, lambda call: (id(call[0].parent), id(call[1])))
    ]
    times = {id(place.linear): 0 for place in places}
    for place, _ in calls:
        times[id(place.linear)] += 1
    groups = [group for group in runs if all(times[id(place.linear)] == 1 for place in group)]
    grouped = {id(place.linear) for group in groups for place in group}
    return groups + [[place] for place in places if id(place.linear) not in grouped]


def _joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts: list[Tensor] = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        for linear in linears
    ]
    return torch.cat(parts).detach()


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
