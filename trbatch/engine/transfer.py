"""Numbers of the host on their way to the device, and back, without anybody waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of these numbers. torch keeps pinned memory until the copies from it are done."""
    numbers = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return numbers.to(device, non_blocking=True)


class OnItsWay:
    """A small tensor that is being copied to the host."""

    def __init__(self, tensor: Tensor) -> None:
        on_gpu = tensor.device.type == "cuda"
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._copy.copy_(tensor, non_blocking=True)
        self._there = torch.cuda.Event() if on_gpu else None
        if self._there is not None:
            self._there.record()

    def wait(self) -> list[Any]:
        """Its numbers, when they are there."""
        if self._there is not None:
            self._there.synchronize()
        numbers: list[Any] = self._copy.tolist()
        return numbers
