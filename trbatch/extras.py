"""What is needed beside the client, and how to get it."""

from __future__ import annotations

import importlib.util

from trbatch.errors import MissingExtra

_OF_A_WORKER = ("torch", "transformers", "safetensors")


def require_worker(what: str) -> None:
    """See to it, before anything is begun, that prompts can be decoded here.

    Args:
        what: asks for it, e.g. "`trbatch run`".

    Raises:
        MissingExtra: this is a client's installation.
    """
    missing = [name for name in _OF_A_WORKER if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtra(
            f"{what} needs {' and '.join(missing)}, which {verb} not installed here",
            hint="pip install 'trbatch[worker]'",
        )
