"""A matrix written to and read from its file. What the file says of itself: `trbatch.matrices`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor

from trbatch.errors import InputError, ModelError, Unreachable
from trbatch.matrices import PARTS, Facts, Place, before, is_there, locked, new_birth, read
from trbatch.storage import place

logger = logging.getLogger(__name__)

Node = tuple[list[int], float]  # of a tree: its path of ranks, and the chance that it comes true


class Evidence(Protocol):
    """What a worker has counted of a task, and how it is added to what others have saved of it."""

    def added_to(self, kept: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Node]]:
        """The counts of both by name, and the tree that they make.

        Args:
            kept: what the file holds; nothing if there is none, or none to be gone on from.
        """
        ...


def save(
    file: Place,
    tensors: Mapping[str, Tensor],
    facts: Facts,
    *,
    evidence: Evidence | None = None,
    anew: bool = False,
) -> Facts | None:
    """Write a matrix whole, unless it is out of date.

    It is if another worker has saved a later state of it, or if the file that it goes on from was
    reset, or replaced by an imported one or that of a cold job.

    Args:
        facts: with what was counted since this worker last saved; what the file holds is added.
            `born`: of the file that it goes on from; "" goes on from whatever is there.
        evidence: the same for what trees are made of. Workers hold equal rows, but each has counts
            of its own.
        anew: forget what the file holds, unless that was done for the same cold job.

    Returns:
        The facts as they were written; None if they were not.

    Raises:
        Unreachable: it cannot be written; what was there is there still.
    """
    parent, name = place(file)
    with locked(file):
        kept = _facts_of(file)
        anew = anew and not (kept and set(facts.cold_jobs) & set(kept.cold_jobs))
        if not anew and _is_outdated(facts, kept):
            logger.info("%s holds another or a later state: not saved", file)
            return None
        facts = replace(facts, born=(kept.born if kept and not anew else "") or new_birth())
        if kept is not None:
            facts = facts.known_cold(kept)
            facts = facts if anew else facts.after(kept)
        held = dict(tensors)
        if evidence is not None:
            counted = {} if kept is None or anew else _counts_of(file)
            counts, tree = evidence.added_to(counted)
            held, facts = held | counts, replace(facts, tree=tree)
        # Not `save_file`: what it raises when a disk is full is no OSError, and half a file stays.
        flat = {key: tensor.cpu().contiguous() for key, tensor in held.items()}
        parent.write(name, save_bytes(flat, metadata=facts.to_metadata()))
    return facts


def _is_outdated(facts: Facts, kept: Facts | None) -> bool:
    if _is_another(facts.born, kept):
        return True
    if kept is None or not (facts.position and kept.position):
        return False
    return before(facts.position, kept.position)


def _is_another(born: str, kept: Facts | None) -> bool:
    """Whether what lies there, if anything, is not what a matrix of this birth goes on from."""
    return bool(born) and (kept is None or kept.born != born)


def load(file: Place) -> dict[str, Tensor]:
    """The tensors of a matrix by name.

    Raises:
        ModelError: it is damaged.
        Unreachable: it cannot be read now.
    """
    try:
        if isinstance(file, str):
            parent, name = place(file)
            return load_bytes(parent.read(name))
        return load_file(file)
    except SafetensorError as error:
        raise ModelError(f"the matrix {file} is damaged: {error}") from error
    except OSError as error:
        raise Unreachable(f"cannot read the matrix {file}: {error}") from error


def _facts_of(file: Place) -> Facts | None:
    if not is_there(file):
        return None
    try:
        return read(file).facts
    except InputError:  # whoever asked for `--cold` over a damaged file gets a sound one
        return None


def is_replaced(file: Place, born: str) -> bool:
    """Whether the file that a matrix of this birth goes on from is gone, or another one's."""
    return _is_another(born, _facts_of(file))


def has_begun(file: Place | None, cold_job: str) -> bool:
    """Whether this job began cold before: its file goes on from there.

    Raises:
        Unreachable: the object store does not answer.
    """
    known = _facts_of(file) if file is not None and cold_job else None
    return known is not None and cold_job in known.cold_jobs


def _counts_of(file: Place) -> dict[str, Tensor]:
    try:
        return {name: tensor for name, tensor in load(file).items() if name not in PARTS}
    except ModelError as error:  # what is written now is sound
        logger.warning("what %s has counted is lost: %s", file, error)
        return {}
