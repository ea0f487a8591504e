"""Whose fault it is when a model cannot be loaded: the model's, or the machine's that tries."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import torch

from trbatch.config import cache_folder
from trbatch.errors import ModelError, TrbatchError, WorkerError

KINDS_OF_MODELS = "a hub name, a folder with config.json and *.safetensors, or a .gguf file"

_FULL = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip
# Of httpx (under whatever name) and huggingface_hub: transformers depends on these, we do not.
_NOT_FETCHED = {"TransportError", "LocalEntryNotFoundError"}


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn whatever is raised inside, our own errors apart, into an error of loading this model.

    Raises:
        WorkerError: memory, disk, device or network failed, or a package is missing: elsewhere or
            later it may be loaded.
        ModelError: everything else, since model files can make anything raise anything.
    """
    try:
        yield
    except TrbatchError:
        raise
    except Exception as error:
        said = f"cannot load model {name!r}: {_first_line(error)}"
        if hint := _worker_lacks(error):
            raise WorkerError(said, hint=hint) from error
        raise ModelError(said, hint=KINDS_OF_MODELS) from error


def _worker_lacks(error: BaseException) -> str:
    """What to do about it if it is no fault of the model, else ""."""
    for one in _chain(error):
        if isinstance(one, ImportError):
            return "install the package that it lacks on this machine"
        if _is_memory(one):
            return "needs more memory, or a lower --max-num-seqs or --max-model-len"
        if isinstance(one, torch.AcceleratorError):
            return "the device failed; try another with --device"
        if _is_network(one):
            return "a hub name needs the network, or a copy in the cache; see `hf download`"
        full = isinstance(one, OSError) and (one.errno in _FULL or _is_our_cache(one))
        if full or _has_no_temporary_folder(one):
            return "needs room on the disk and a cache folder to write to, see TRBATCH_CACHE"
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it: transformers wraps everything in OSError."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_memory(error: BaseException) -> bool:
    # A CPU's allocator has no class of its own for it.
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _is_network(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status:  # an answer: the server's own trouble, or that there is no such model
        return status == 429 or status >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & _NOT_FETCHED) or isinstance(error, ConnectionError | TimeoutError)


def _is_our_cache(error: OSError) -> bool:
    where = error.filename
    return isinstance(where, str) and Path(where).is_relative_to(cache_folder())


def _has_no_temporary_folder(error: BaseException) -> bool:
    """Whether Python's tempfile could write nowhere: it speaks of a missing file then."""
    return isinstance(error, FileNotFoundError) and "temporary directory" in str(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n", 1)[0]
    # A KeyError's text is only the key.
    return text if isinstance(error, OSError | ValueError) and text else _named(error, text)


def _named(error: BaseException, text: str) -> str:
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
