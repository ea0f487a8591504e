"""Rotary positions by one kernel in the attention layers of a loaded network, and only in these.

A modeling file of transformers calls its own module's `apply_rotary_pos_emb`. Replacing that
function would reach every other network of the architecture in this process. Here instead the
attention layers of one network get a class of their own, a subclass whose `forward` is the same
code over a copy of its module's names, in which this one name means the kernel. Nothing global is
touched, nothing has to be put back, and no flag has to be looked at in each call.

Which types and sizes the kernel serves is what gave the same on random input; whatever else comes
goes to the original, which is the slow twin.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from itertools import product
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from trbatch.engine.alike import random_like, same
from trbatch.engine.kernels.rotary import rotate

NAME = "apply_rotary_pos_emb"
_DIM = 16  # of a head, when the two are compared

_Rotary = Callable[..., tuple[Tensor, Tensor]]
_Form = tuple[torch.dtype, bool]  # the angles' type; whether all of a head turns
_Forms = dict[_Form, bool]  # those that the kernel serves, and with which pairs: see `rotate`


class _Rotation:
    """The kernel for what it serves, the original for the rest.

    Args:
        dtype: of queries and keys.
        forms: see `_agreeing`.
    """

    def __init__(self, original: _Rotary, dtype: torch.dtype, forms: _Forms) -> None:
        self.original, self._dtype, self._forms = original, dtype, forms

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """q [1, heads, N, D], k [1, kv_heads, N, D], cos and sin [1, N, R] -> q, k turned."""
        plain = not more and not named and cos.dim() == 3 and q.dim() == 4 and q.shape[0] == 1
        neighbours = self._forms.get((cos.dtype, cos.shape[-1] == q.shape[-1]))
        if neighbours is None or not plain or not q.dtype == k.dtype == self._dtype:
            return self.original(q, k, cos, sin, *more, **named)
        return rotate(q, k, cos, sin, neighbours=neighbours)


def replace_rotary(network: nn.Module, weight: Tensor) -> int:
    """Give layers whose `forward` rotates queries and keys one that does it by the kernel.

    Args:
        weight: any of the network's, of its type and on its device.

    Returns:
        How many layers.
    """
    twins: dict[type[nn.Module], type[nn.Module] | None] = {}
    count = 0
    for module in network.modules():
        kind = type(module)
        if kind not in twins:
            twins[kind] = _rotating(kind, weight)
        if (twin := twins[kind]) is not None:
            module.__class__ = twin
            count += 1
    return count


def _rotating(kind: type[nn.Module], weight: Tensor) -> type[nn.Module] | None:
    """A class like this one but for the function that rotates; None where there is none."""
    forward: Any = kind.forward
    # A decorated `forward` has another's code and is left alone.
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(NAME)
    if not callable(original) or isinstance(original, _Rotation):
        return None
    forms = _agreeing(original, weight)
    if not forms:
        return None
    names = {**forward.__globals__, NAME: _Rotation(original, weight.dtype, forms)}
    fused = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    update_wrapper(fused, forward)
    return type(kind.__name__, (kind,), {"forward": fused, "__module__": kind.__module__})


@torch.no_grad()
def _agreeing(original: _Rotary, weight: Tensor) -> _Forms:
    """In which forms a file's function and the kernel say the same.

    The files differ in which values are a pair, in what they round, and in whether they serve
    heads that turn in part; one that does not raises an error on these.
    """
    q, k = (random_like(weight, 1, 6, heads, _DIM).transpose(1, 2) for heads in (5, 3))
    forms: _Forms = {}
    for dtype, size in product({weight.dtype, torch.float32}, (_DIM, _DIM // 2)):
        cos, sin = random_like(weight, 2, 1, 6, size).to(dtype)
        try:
            wanted = original(q, k, cos, sin)
        except (RuntimeError, TypeError, ValueError):
            continue
        if wanted[0].dtype != weight.dtype:
            continue  # the kernel keeps the type; nothing to compile for
        for neighbours in (False, True):
            found = rotate(q, k, cos, sin, neighbours=neighbours)
            if all(same(one, other) for one, other in zip(found, wanted, strict=True)):
                forms[dtype, size == _DIM] = neighbours
                break
    return forms
