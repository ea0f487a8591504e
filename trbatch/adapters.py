"""A model with a LoRA adapter, under one name: `BASE + ADAPTER`. Knows nothing of torch.

The two are one model for everybody else: its own queues, request fingerprints and matrices. The
adapter is merged into the weights when a worker loads them (`engine.merging`).
"""

from __future__ import annotations

import os
from pathlib import Path

from trbatch.errors import ModelError, UsageError

JOINT = " + "
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def joined(model: str, adapter: str) -> str:
    """The name of a model with an adapter; the model's own where there is none.

    Raises:
        UsageError: the model has one already.
    """
    if not adapter:
        return model
    if JOINT in model:
        raise UsageError(f"--adapter {adapter}: the model has an adapter already: {model}")
    return f"{model}{JOINT}{adapter}"


def split(name: str) -> tuple[str, str]:
    """Model and adapter of a name; the adapter is "" where there is none."""
    model, _, adapter = name.partition(JOINT)
    return model, adapter


def adapter_name(given: str) -> str:
    """A local adapter by its absolute path, so that it is found from any folder; else a hub name.

    Raises:
        UsageError: it can only be a folder, and there is none with an adapter.
    """
    path = Path(os.path.expanduser(given))
    if (path / CONFIG).is_file():
        return str(path.absolute())
    if path.exists() or given.startswith(("/", "./", "../", "~")):
        raise UsageError(
            f"there is no adapter at {path}",
            hint=f"give a folder that holds {CONFIG} and {WEIGHTS}, or a hub name",
        )
    return given


def adapter_folder(name: str) -> Path:
    """The folder of an adapter; one from a hub is fetched, its config and safetensors alone.

    Raises:
        ModelError: it has no weights in safetensors.
    """
    folder = Path(os.path.expanduser(name))
    if not (folder / CONFIG).is_file():
        from transformers.utils.hub import cached_file

        cached_file(name, WEIGHTS)
        folder = Path(str(cached_file(name, CONFIG))).parent
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(
                f"adapter {name!r} has no {file}",
                hint="save it with safetensors: other files can run code when they are read",
            )
    return folder
