"""The least that a decode step can take: what it must read, over what this machine can move."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Self

import torch

from trbatch.engine.model import LoadedModel

_COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}  # bytes: more than any cache holds
_ROUNDS, _COPIES = 5, 8


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that a plain step cannot undercut: weights, keys and values, each read once.

    `bandwidth`: bytes a second. `kv`: bytes of one token's keys and values.
    """

    weights: int
    kv: int
    bandwidth: float

    @classmethod
    def of(cls, loaded: LoadedModel) -> Self:
        """Of a model on its device, whose bandwidth is measured now."""
        return cls(weight_bytes(loaded), kv_bytes(loaded), copy_bandwidth(loaded.device))

    def seconds(self, batch: int, context: float) -> float:
        """Of a step of `batch` sequences with so many committed tokens each."""
        return (self.weights + batch * context * self.kv) / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """What the floor was made of."""
        return {
            "weights_read_gb": round(self.weights / 1e9, 3),
            "kv_bytes_a_token": self.kv,
            "copy_gb_per_s": round(self.bandwidth / 1e9, 1),
        }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying memory on this device: the best of a few."""
    size = _COPIED.get(device.type, _COPIED["cpu"])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(_ROUNDS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(_COPIES):
            target.copy_(source)
        _wait(device)
        best = max(best, 2 * size * _COPIES / (time.perf_counter() - start))
    return best


def weight_bytes(loaded: LoadedModel) -> int:
    """Bytes of the weights that a step reads: all, but an input embedding that is nothing else."""
    # Of a network without weights, because those of fused modules are no parameters any more.
    with torch.device("meta"):
        plain = type(loaded.network)(loaded.network.config)
    count = sum(weight.numel() for weight in plain.parameters())
    embedding = plain.get_input_embeddings().weight  # type: ignore[operator]
    if embedding is not plain.get_output_embeddings().weight:  # type: ignore[operator]
        count -= embedding.numel()
    return count * loaded.dtype.itemsize


def kv_bytes(loaded: LoadedModel) -> int:
    """Bytes of keys and values of one token."""
    return sum(2 * heads * dim for heads, dim in loaded.layer_shapes) * loaded.dtype.itemsize


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
