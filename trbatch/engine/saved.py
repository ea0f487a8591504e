"""A matrix written to and read from its file. What the file says of itself: `trbatch.matrices`."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor

from trbatch.errors import InputError, ModelError
from trbatch.matrices import Facts, Place, before, is_there, locked, read
from trbatch.storage import place


def save(file: Place, tensors: dict[str, Tensor], facts: Facts, *, anew: bool = False) -> bool:
    """Write a matrix whole, unless another worker has saved a later state of it.

    Args:
        facts: with what was counted since this worker last saved; what the file holds is added.
        anew: forget what the file holds.

    Returns:
        Whether it was written.

    Raises:
        Unreachable: it cannot be written; what was there is there still.
    """
    parent, name = place(file)
    with locked(file):
        kept = None if anew else _facts_of(file)
        if kept is not None:
            both = facts.position and kept.position
            if both and before(facts.position, kept.position):
                return False
            facts = facts.after(kept)
        # Not `save_file`: what it raises when a disk is full is no OSError, and half a file stays.
        held = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        parent.write(name, save_bytes(held, metadata=facts.to_metadata()))
    return True


def load(file: Place) -> dict[str, Tensor]:
    """The tensors of a matrix by name.

    Raises:
        ModelError: it cannot be read.
        Unreachable: the object store does not answer.
    """
    try:
        if isinstance(file, str):
            parent, name = place(file)
            return load_bytes(parent.read(name))
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"cannot read the matrix {file}: {error}", hint="delete it, or use --cold"
        ) from error


def _facts_of(file: Place) -> Facts | None:
    if not is_there(file):
        return None
    try:
        return read(file).facts
    except InputError:  # whoever asked for `--cold` over a damaged file gets a sound one
        return None
