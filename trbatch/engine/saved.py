"""A matrix written to and read from its file. What the file says of itself: `trbatch.matrices`."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trbatch.errors import InputError, ModelError
from trbatch.matrices import Facts, before, locked, read


def save(file: Path, tensors: dict[str, Tensor], facts: Facts, *, anew: bool = False) -> bool:
    """Write a matrix whole, unless another worker has saved a later state of it.

    Args:
        facts: with what was counted since this worker last saved; what the file holds is added.
        anew: forget what the file holds.

    Returns:
        Whether it was written.
    """
    with locked(file):
        kept = None if anew else _facts_of(file)
        if kept is not None:
            both = facts.position and kept.position
            if both and before(facts.position, kept.position):
                return False
            facts = facts.after(kept)
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            scratch,
            metadata=facts.to_metadata(),
        )
        scratch.replace(file)
    return True


def load(file: Path) -> dict[str, Tensor]:
    """The tensors of a matrix by name.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"cannot read the matrix {file}: {error}", hint="delete it, or use --cold"
        ) from error


def _facts_of(file: Path) -> Facts | None:
    if not file.is_file():
        return None
    try:
        return read(file).facts
    except InputError:  # whoever asked for `--cold` over a damaged file gets a sound one
        return None
