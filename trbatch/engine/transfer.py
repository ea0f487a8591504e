"""Numbers of the host on their way to the device, and back, without anybody waiting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = Sequence[Any] | npt.NDArray[Any]


def to_device(values: Numbers, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of these numbers. torch keeps pinned memory until the copies from it are done."""
    return _on_host(values, device, dtype).to(device, non_blocking=True)


def send(values: Numbers, target: Tensor) -> None:
    """Write these numbers into a tensor of the device, in one copy where its places are neighbours.

    An assignment to a place of it would wait for the device.
    """
    target.copy_(_on_host(values, target.device, target.dtype), non_blocking=True)


def _on_host(values: Numbers, device: torch.device, dtype: torch.dtype) -> Tensor:
    """These numbers where the device can fetch them from while the host goes on."""
    pinned = device.type == "cuda"
    if not isinstance(values, np.ndarray):
        return torch.tensor(values, dtype=dtype, pin_memory=pinned)
    # torch pins nothing that it makes of an array.
    numbers = torch.empty(values.shape, dtype=dtype, pin_memory=pinned)
    numbers.numpy()[...] = values
    return numbers


class Clock:
    """How long the device is busy with what is started between `__init__` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._start: Any = _event(timing=True) if device.type == "cuda" else time.perf_counter()
        self._stop: Any = None

    def stop(self) -> None:
        """All has been started."""
        on_gpu = isinstance(self._start, torch.cuda.Event)
        self._stop = _event(timing=True) if on_gpu else time.perf_counter()

    @property
    def seconds(self) -> float:
        """Waits until the device is through with it."""
        if isinstance(self._start, float):
            return float(self._stop - self._start)
        # What was started may be known to be through, and not yet the event behind it.
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) / 1e3


class OnItsWay:
    """A small tensor that is being copied to the host."""

    def __init__(self, tensor: Tensor) -> None:
        on_gpu = tensor.device.type == "cuda"
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._copy.copy_(tensor, non_blocking=True)
        self._there = _event() if on_gpu else None

    def wait(self) -> list[Any]:
        """Its numbers, when they are there."""
        if self._there is not None:
            self._there.synchronize()
        numbers: list[Any] = self._copy.tolist()
        return numbers


def _event(*, timing: bool = False) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=timing)
    event.record()
    return event
