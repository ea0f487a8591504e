"""The sizes of models whose cost a small model can be given. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from trbatch.errors import UsageError


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama that decide its cost. Input embedding and output projection differ."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int  # rows of the output projection, unless the small model has more


SHAPES = {
    shape.name: shape
    for shape in (
        # Llama-3-8B, Vicuna-7B and Qwen2.5-14B (without its biases, which cost nothing).
        Shape("llama-8b", 4096, 32, 32, 8, 128, 14336, 128256),
        Shape("vicuna-7b", 4096, 32, 32, 32, 128, 11008, 32000),
        Shape("qwen-14b", 5120, 48, 40, 8, 128, 13824, 152064),
    )
}


def shape_of(name: str) -> Shape:
    """The shape of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in SHAPES:
        raise UsageError(f"no shape is named {name!r}", hint=", ".join(SHAPES))
    return SHAPES[name]
