"""Weights that were quantised: which kinds are loaded, and how; the others are refused by name.

A row's tokens must not depend on who is decoded beside it, or speculation would change them. So a
layer may not derive a number from all tokens of a forward at once, and no code may be fetched from
a hub to run it. What keeps to this:

- FP8, in blocks or by compressed-tensors: the weights become dense when they are loaded, in the
  type that the engine computes with. They take the memory of 16 bits and are as quick as these.
- compressed-tensors of other kinds, e.g. four bits packed: the same.
- bitsandbytes with four bits: stays in four bits, by its own layers.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

from trbatch.errors import ModelError, WorkerError

_DENSE = ("fp8", "mxfp8", "compressed-tensors")
_PACKAGES = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}
_EXTRA = "pip install 'trbatch[quantised]'"
_OTHER_WEIGHTS = "take the model's original weights, FP8 ones, or bitsandbytes with four bits"
_REASONS = {
    "awq": "its layers come from the package gptqmodel, which was not tried here",
    "gptq": "its layers come from the package gptqmodel, which was not tried here",
    "fbgemm_fp8": "its layers come from the package fbgemm-gpu, which was not tried here",
    "mxfp4": "its layers are code that is fetched from a hub when the model is loaded",
}


def kind_of(config: Any) -> str:
    """How a model's weights are quantised, as its config names it; "" if they are not."""
    how = _settings(config)
    return str(how.get("quant_method") or "unknown").lower() if how else ""


def prepare(config: Any) -> None:
    """Refuse what cannot be run, and say in the config how the rest is to be loaded.

    Args:
        config: a model's, before its weights are loaded. It may be changed.

    Raises:
        ModelError: weights of this kind are not supported; says why and what to do.
        WorkerError: a package is missing here that reads them.
    """
    kind, how = kind_of(config), _settings(config)
    if not kind:
        return
    if kind == "bitsandbytes":
        quiet_bitsandbytes()
        _refuse_eight_bits(how)
    elif kind not in _DENSE:
        why = _REASONS.get(kind, "nobody has tried its layers with this engine")
        raise ModelError(
            f"weights quantised by {kind!r} are not supported: {why}", hint=_OTHER_WEIGHTS
        )
    package = _PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise WorkerError(f"weights quantised by {kind!r} need the package {kind}", hint=_EXTRA)
    if kind in _DENSE:
        config.quantization_config = {**how, "dequantize": True}


def quiet_bitsandbytes() -> None:
    """It warns of kernels in a hub that it would rather have, and does without them."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _refuse_eight_bits(how: Mapping[str, Any]) -> None:
    """Its outliers are columns of the whole batch, unless it looks for none."""
    if how.get("load_in_8bit") and how.get("llm_int8_threshold", 6.0) != 0.0:
        raise ModelError(
            "weights quantised by 'bitsandbytes' to eight bits are not supported: which columns "
            "count as outliers depends on all rows that are decoded together, and so would the "
            "tokens of each",
            hint=f"{_OTHER_WEIGHTS}; or quantise with llm_int8_threshold=0.0",
        )


def _settings(config: Any) -> dict[str, Any]:
    how = getattr(config, "quantization_config", None)
    if how is None:
        return {}
    return dict(how) if isinstance(how, Mapping) else dict(how.to_dict())
