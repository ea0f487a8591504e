"""Linear layers that are given the same input (Q, K and V; gate and up), as one product.

Which layers these are is seen by running the network once, so that no architecture is named. The
product itself is the caller's: `JoinedLinear` for a GPU, where one launch reads the weights of
three, and `linear.PackedLinear` for a CPU. The slow twins are the `torch.nn.Linear` layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional

from trbatch.engine.alike import COMPARED, random_like, same


class Product(nn.Module):
    """`y = x Wᵀ + b` of one or several linear layers of the same input size.

    Args:
        linears: their weights may be shared with an embedding and are not changed.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.widths = [linear.out_features for linear in linears]
        self.bias = _joined_bias(linears)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: [..., in_features]. Returns: [..., sum of widths]."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """No hooks: a step makes hundreds of these calls, and each of Python's frames costs."""
        return self.forward(x)


class JoinedLinear(Product):
    """The product by torch's own operation; a single layer's weight is not copied.

    `product`: what takes it, given the input, the weight and the bias; see `libraries`.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__(linears)
        self.weight = joined_weight(linears)
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = functional.linear

    def forward(self, x: Tensor) -> Tensor:
        """See `Product.forward`."""
        return self.product(x, self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """The same again, without a frame."""
        return self.product(x, self.weight, self.bias)


class Shared(threading.local):
    """One product whose parts are asked for one by one, with the same input, in each thread."""

    def __init__(self, whole: Product) -> None:
        self.whole = whole
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._left = 0

    def part(self, x: Tensor, index: int) -> Tensor:
        """[..., in_features] -> [..., widths[index]], a view of the whole product."""
        if x is not self._input:
            self._input, self._left = x, len(self.whole.widths)
            self._parts = self.whole(x).split_with_sizes(self.whole.widths, -1)
        part = self._parts[index]
        self._left -= 1
        if self._left == 0:
            self._input, self._parts = None, ()
        return part


class Part(nn.Module):
    """One of the layers that a shared product stands for."""

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.shared.part(x, self.index)

    def __call__(self, x: Tensor) -> Tensor:
        """As in `Product`."""
        return self.shared.part(x, self.index)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a linear layer hangs in its network. Holds no weights, so that they can be freed."""

    parent: nn.Module
    name: str

    @property
    def linear(self) -> nn.Linear:
        """The layer, until it is replaced."""
        layer: nn.Linear = getattr(self.parent, self.name)
        return layer


def places_of(network: nn.Module) -> list[Place]:
    """Where the plain `nn.Linear` layers hang; a subclass may compute something else."""
    return [
        Place(parent, name)
        for parent in network.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]


def replace_linears(
    network: nn.Module,
    make: Callable[[Sequence[nn.Linear]], Product | None],
    run: Callable[[], object] | None = None,
) -> list[Product]:
    """Put products in the places of plain linear layers, group after group.

    A group's own layers are free to go before the next product is made, so that no more than one
    group's weights are there twice.

    Args:
        make: the product of a group; None leaves the group as it is.
        run: runs the network once, on anything: layers that are then given the same tensor, one
            after the other and in the same module, are a group. None: each is one.
    """
    places = places_of(network)
    groups = [[place] for place in places] if run is None else _sharing_input(places, run)
    products = []
    for group in groups:
        whole = make([place.linear for place in group])
        if whole is None:
            continue
        products.append(whole)
        shared = Shared(whole)
        for index, place in enumerate(group):
            layer = whole if len(group) == 1 else Part(shared, index)
            setattr(place.parent, place.name, layer)
    return products


def join_linears(network: nn.Module, run: Callable[[], object]) -> int:
    """Join layers of one input on any device, in any floating type; see `replace_linears`.

    Layers that stay alone lose only what `nn.Module` does around a call.

    Returns:
        How many products stand for more than one layer.
    """
    products = replace_linears(network, _joined, run)
    if any(product.weight.is_cuda for product in products if isinstance(product, JoinedLinear)):
        # What is left of the single weights is too small for anything else to come.
        torch.cuda.empty_cache()
    return sum(len(product.widths) > 1 for product in products)


def products_of(network: nn.Module) -> list[JoinedLinear]:
    """The products that `join_linears` made of a network's layers, each once."""
    wholes = [m.shared.whole if isinstance(m, Part) else m for m in network.modules()]
    found = {id(whole): whole for whole in wholes if isinstance(whole, JoinedLinear)}
    return list(found.values())


@torch.no_grad()
def _joined(linears: Sequence[nn.Linear]) -> JoinedLinear | None:
    """One product for these layers, if it says the same as they do."""
    kinds = {(type(w.data), w.dtype, w.device) for w in (linear.weight for linear in linears)}
    tensor, dtype, _ = next(iter(kinds))
    # One way to write all weights: quantized ones are tensors of another class.
    if len(kinds) > 1 or tensor is not Tensor or dtype not in COMPARED:
        return None
    whole = JoinedLinear(linears)
    if len(linears) == 1:
        return whole
    x = random_like(whole.weight, 3, whole.in_features)
    parts = whole(x).split_with_sizes(whole.widths, -1)
    agree = all(same(part, one(x)) for part, one in zip(parts, linears, strict=True))
    return whole if agree else None


def joined_weight(linears: Sequence[nn.Linear]) -> Tensor:
    """[sum of out_features, in_features]; of a single layer its own."""
    weights = [linear.weight.detach() for linear in linears]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts: list[Tensor] = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        for linear in linears
    ]
    return torch.cat(parts).detach()


def _sharing_input(places: list[Place], run: Callable[[], object]) -> list[list[Place]]:
    """The places in groups that get the same tensor; those that did not run, or twice, alone."""
    calls: list[tuple[Place, Tensor]] = []
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
        [place for place, _ in alike]
        for _, alike in groupby(calls, lambda call: (id(call[0].parent), id(call[1])))
    ]
    times = {id(place.linear): 0 for place in places}
    for place, _ in calls:
        times[id(place.linear)] += 1
    groups = [group for group in runs if all(times[id(place.linear)] == 1 for place in group)]
    grouped = {id(place.linear) for group in groups for place in group}
    return groups + [[place] for place in places if id(place.linear) not in grouped]
