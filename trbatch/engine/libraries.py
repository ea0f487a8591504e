"""Which of NVIDIA's two libraries multiplies few tokens by a large weight the quicker: timed.

cuBLAS and cuBLASLt have much the same kernels and choose among them by rules of their own. For the
tokens of a decode step either may be a tenth slower than the other, for some weights and numbers of
tokens the one and for some the other (`docs/performance.md`). Nothing but the time decides, so each
number of tokens has its library from when the model is loaded. The slow twin is `torch.nn.Linear`.

torch's setting TORCH_BLAS_PREFER_CUBLASLT decides for all products instead: 0 keeps cuBLAS, 1 takes
cuBLASLt, and nothing is timed.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from trbatch.engine.alike import random_like, same
from trbatch.engine.joined import JoinedLinear, products_of

logger = logging.getLogger(__name__)

# Tokens that are timed; any number up to the last counts as the next of them.
SIZES = (1, 8, 16, 32, 48, 64, 80, 96, 128)
_LARGE = 32 << 20  # bytes of a weight: below it the launch takes as long as the product
_SAMPLE = 256 << 20  # bytes: more than a GPU's caches hold
_GAIN = 0.98  # of the usual library's time: what the other one must undercut
_ROUNDS = 3
_USUAL, _OTHER = "cublas", "cublaslt"
_SETTING = "TORCH_BLAS_PREFER_CUBLASLT"


class ByTokens:
    """A product that is taken of `others` many tokens by cuBLASLt, else by torch's usual library.

    Args:
        others: of `SIZES`.
    """

    def __init__(self, others: frozenset[int]) -> None:
        self.others = others

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        place = bisect_left(SIZES, x.numel() // weight.shape[1])
        if place == len(SIZES) or SIZES[place] not in self.others:
            return functional.linear(x, weight, bias)
        with _library(_OTHER):
            return functional.linear(x, weight, bias)


@torch.inference_mode()
def choose_libraries(network: nn.Module) -> int:
    """Time the large products of a network on a GPU, in 16 bits, and give each its library.

    Returns:
        How many products have the other library for some number of tokens.
    """
    alike: dict[Hashable, list[JoinedLinear]] = {}
    for product in products_of(network):
        if _concerned(product):
            weight = product.weight
            alike.setdefault((weight.shape, weight.dtype, weight.device), []).append(product)
    changed = 0
    for products in alike.values():
        if others := _others(products):
            for product in products:
                product.product = ByTokens(others)
            changed += len(products)
    if alike:
        torch.cuda.empty_cache()  # what timing took is room for keys and values
    return changed


def _concerned(product: JoinedLinear) -> bool:
    """Whether its library is ours to choose. In float32, rounding is not left to a clock."""
    weight = product.weight
    if not weight.is_cuda or weight.dtype.itemsize != 2 or product.bias is not None:
        return False
    usual = torch.backends.cuda.preferred_blas_library() == torch._C._BlasBackend.Cublas
    return usual and _SETTING not in os.environ and weight.nbytes >= _LARGE


def _others(products: Sequence[JoinedLinear]) -> frozenset[int]:
    """For which of `SIZES` these products, all alike, are quicker by the other library."""
    weights = _sample([product.weight for product in products])
    try:
        with torch.cuda.device_of(weights[0]):
            found = frozenset(size for size in SIZES if _other_is_quicker(weights, size))
    except RuntimeError as error:  # such as no memory for it, or a build without cuBLASLt
        logger.warning("products keep torch's usual library, the other was not timed: %s", error)
        return frozenset()
    logger.debug("%s by %s for tokens %s", tuple(weights[0].shape), _OTHER, sorted(found))
    return found


def _other_is_quicker(weights: Sequence[Tensor], size: int) -> bool:
    x = random_like(weights[0], size, weights[0].shape[1])
    seconds = dict.fromkeys((_USUAL, _OTHER), float("inf"))
    for _ in range(1 + _ROUNDS):  # in turn: whatever disturbs one disturbs the other
        for library in seconds:
            seconds[library] = min(seconds[library], _seconds(library, weights, x))
    if seconds[_OTHER] >= _GAIN * seconds[_USUAL]:
        return False
    with _library(_OTHER):
        found = functional.linear(x, weights[0])
    return same(found, functional.linear(x, weights[0]))


def _sample(weights: Sequence[Tensor]) -> list[Tensor]:
    """The first of these that are as large as `_SAMPLE` together, else all."""
    sizes = accumulate(weight.nbytes for weight in weights)
    enough = next((i for i, size in enumerate(sizes, 1) if size >= _SAMPLE), len(weights))
    return list(weights[:enough])


def _seconds(library: str, weights: Sequence[Tensor], x: Tensor) -> float:
    """What one product with each of the weights takes the device, together."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Its caches hold something else then, and the host is ahead when it begins.
    torch.empty(_SAMPLE, dtype=torch.int8, device=x.device).zero_().zero_()
    with _library(library):
        begin.record()
        for weight in weights:
            functional.linear(x, weight)
        end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3


@contextmanager
def _library(name: str) -> Iterator[None]:
    """Let torch prefer this library, then the usual one again.

    The preference is the process's. Threads may at most take a product by the other's library.
    """
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(_USUAL)
