"""What a worker may read of what Redis names: job folders and models below the allowed roots.

Whoever can write to Redis can name any path. Without roots of its own a worker reads anything for
the embedded server, which is its own user's alone, and only the default store for any other.
"""

from __future__ import annotations

import re
from pathlib import Path

from trbatch import adapters
from trbatch.chunk_lease import BadChunk
from trbatch.config import default_store
from trbatch.masking import printable
from trbatch.naming import is_local_path

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Confinement:
    """The folders and URLs below which a worker reads.

    Args:
        roots: as the operator gave them; () takes the default store.
        anywhere: whether () allows everything instead.
    """

    def __init__(self, roots: tuple[str, ...], *, anywhere: bool = False) -> None:
        self._everything = anywhere and not roots
        self._roots = [_plain(root) for root in roots or (str(default_store()),)]

    def check_folder(self, folder: str) -> None:
        """Let a job folder pass.

        Raises:
            BadChunk: it does not lie below a root.
        """
        if not self._allows(folder):
            raise BadChunk(self._refusal(f"the job folder {folder}"))

    def check_model(self, model: str) -> None:
        """Let a model pass: a hub name, or a path below a root, and so its adapter, if any.

        Raises:
            BadChunk: it is a path that does not lie below a root.
        """
        base, adapter = adapters.split(model)
        parts = (base, adapter) if adapter else (base,)
        if any(_is_local(part) and not self._allows(part) for part in parts):
            raise BadChunk(self._refusal(f"the model {model}") + ", or with --model for it alone")

    def _allows(self, place: str) -> bool:
        return self._everything or any(_is_below(_plain(place), root) for root in self._roots)

    def _refusal(self, what: str) -> str:
        return (
            f"{printable(what)} lies outside what this worker may read: "
            f"{', '.join(self._roots)}; start the worker with --root for its store"
        )


def _is_local(model: str) -> bool:
    """Whether anything on this machine could be meant."""
    named = is_local_path(model) or model.endswith(".gguf") or not _HUB_NAME.fullmatch(model)
    return named or Path(model).exists()


def _plain(place: str) -> str:
    return place.removeprefix("file://")


def _is_below(place: str, root: str) -> bool:
    if "\0" in place:
        return False
    if "://" in place or "://" in root:
        # `a::b` is fsspec's way to reach one store through another.
        climbs = ".." in place.split("/") or "::" in place
        return place.startswith(root.rstrip("/") + "/") and not climbs
    resolved, top = Path(place).expanduser().resolve(), Path(root).expanduser().resolve()
    return resolved != top and resolved.is_relative_to(top)
