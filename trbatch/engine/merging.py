"""A LoRA adapter's weights into a network's own, by peft, before anything else is done with it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from trbatch.adapters import CONFIG, WEIGHTS
from trbatch.digests import file_digests
from trbatch.engine import quantised
from trbatch.errors import ModelError, WorkerError

_EMBEDDINGS = {"lm_head", "embed_tokens", "wte", "embed_in", "embed_out"}


def merge(network: nn.Module, folder: Path) -> nn.Module:
    """The network with the adapter's weights in its own; it is changed in place.

    Args:
        network: as transformers has loaded it.
        folder: see `adapters.adapter_folder`.

    Raises:
        ModelError: the adapter is not for this model, or cannot be merged into it.
        WorkerError: peft is not installed here.
    """
    settings = _settings(folder)
    _refuse(network, folder, settings)
    if importlib.util.find_spec("peft") is None:
        raise WorkerError("an adapter needs the package peft", hint="pip install 'trbatch[lora]'")
    quantised.quiet_bitsandbytes()  # peft imports it
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Weights that find no place are only warned of; the model would be another one.
            warnings.filterwarnings("error", message=".*adapter keys.*")
            wrapped = PeftModel.from_pretrained(network, str(folder))
            _check_all_found(wrapped, folder)
            merged: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, KeyError, RuntimeError, TypeError, UserWarning) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"adapter {folder} does not fit this model: {first}",
            hint=f"it was made for {settings.get('base_model_name_or_path') or 'another one'}",
        ) from error
    return merged


def fingerprint(model: str, folder: Path) -> str:
    """The identity of a model with an adapter, from the model's own."""
    digest = hashlib.blake2b(model.encode(), digest_size=12)
    settings = _settings(folder)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(file_digests([folder / WEIGHTS])[0].encode())
    return digest.hexdigest()


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / CONFIG} must be an object")
    return settings


def _refuse(network: Any, folder: Path, settings: dict[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"adapter {folder} is of type {kind}: only LORA can be merged into a model",
            hint="merge it with its own tools and give the whole model",
        )
    if quantised.kind_of(network.config) == "bitsandbytes":
        raise ModelError(
            f"adapter {folder} cannot be merged into weights of four bits: they would be rounded "
            "again",
            hint="take the model's original weights, or FP8 ones",
        )
    targets = settings.get("target_modules") or ()
    targets = [targets] if isinstance(targets, str) else targets
    names = {str(one).rpartition(".")[2] for one in targets}
    if getattr(network.config, "tie_word_embeddings", False) and names & _EMBEDDINGS:
        raise ModelError(
            f"adapter {folder} changes {', '.join(sorted(names & _EMBEDDINGS))}, whose weights "
            "serve as input and output in this model: merging would change both",
            hint="merge it with its own tools and give the whole model",
        )


def _check_all_found(wrapped: nn.Module, folder: Path) -> None:
    """Every layer that the adapter has weights for is one of the model's.

    Raises:
        ValueError: names one that is not.
    """
    places = {name for name, _ in wrapped.named_modules()}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  it is no dictionary
            layer = key.partition(".lora_")[0]
            if ".lora_" in key and layer not in places:
                raise ValueError(
                    f"the model has no layer {layer.removeprefix('base_model.model.')}"
                )
