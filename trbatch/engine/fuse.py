"""What is swapped into a network when it is loaded, so that a forward reads and launches less.

The network stays transformers' own. Each swap is found by what a module is made of and does, is
compared with the module on random input, and is left out where it differs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from trbatch.engine.alike import COMPARED
from trbatch.engine.joined import join_linears
from trbatch.engine.libraries import choose_libraries
from trbatch.engine.linear import can_pack, pack_linears
from trbatch.engine.norm import replace_norms


@dataclass(frozen=True, slots=True)
class Swaps:
    """How many modules of a network were swapped."""

    norms: int = 0
    products: int = 0  # that stand for several linear layers
    rotations: int = 0  # attention layers that rotate by the kernel
    gates: int = 0  # gated MLPs


def fuse(network: nn.Module, run: Callable[[], object], *, kernels: bool | None = None) -> Swaps:
    """Swap in what suits the network's device and type.

    Args:
        run: runs the network once, on anything; see `joined.replace_linears`.
        kernels: as on a GPU, by Triton's kernels; on a CPU these run in its interpreter, for tests.
            None: where there are a GPU and Triton.
    """
    weight = network.get_output_embeddings().weight  # type: ignore[operator]
    if kernels is None:
        found = importlib.util.find_spec("triton") is not None
        kernels = weight.is_cuda and found and weight.dtype in COMPARED
    if kernels:
        swaps = _by_kernels(network, run, weight)
    elif weight.is_cuda:
        swaps = Swaps(replace_norms(network), join_linears(network, run))
    else:
        swaps = Swaps(replace_norms(network))
        if can_pack(weight.device, weight.dtype):
            pack_linears(network, run)
    choose_libraries(network)
    return swaps


def _by_kernels(network: nn.Module, run: Callable[[], object], weight: torch.Tensor) -> Swaps:
    from trbatch.engine.gpu_gate import replace_gated
    from trbatch.engine.gpu_rotary import replace_rotary

    return Swaps(
        norms=replace_norms(network, kernels=True),
        products=join_linears(network, run),
        rotations=replace_rotary(network, weight),
        gates=replace_gated(network),  # of linear layers that are joined by now
    )
