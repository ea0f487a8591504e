"""Files of a job folder in an object store (`s3://`, `gs://`, …), through fsspec.

An object appears only when its upload has ended, so that every one is whole.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, BinaryIO, cast

from trbatch.errors import TrbatchError, UsageError
from trbatch.masking import mask_url
from trbatch.storage import Folder, Stat

_PACKAGES = {
    "s3": "pip install 'trbatch[s3]'",
    "gs": "pip install gcsfs",
    "gcs": "pip install gcsfs",
    "hf": "pip install 'trbatch[hub]'",
}


class RemoteFolder(Folder):
    """A folder of an object store, through the fsspec filesystem of its URL."""

    def __init__(self, url: str) -> None:
        import fsspec  # here: it takes longer to import than a local job needs

        self.path = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.path, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"cannot use {mask_url(url)}: {error}",
                hint=_PACKAGES.get(url.partition("://")[0]),
            ) from error

    @contextmanager
    def _errors(self, verb: str, name: str, *, absent: bool = False) -> Iterator[None]:
        """The same for what the library of a store raises, which need not be an OSError."""
        try:
            with super()._errors(verb, name, absent=absent):
                yield
        except (TrbatchError, FileNotFoundError):
            raise
        except Exception as error:
            raise self._failure(verb, name, error) from error

    def read(self, name: str) -> bytes:
        with self._errors("read", name):
            return cast(bytes, self._files.cat_file(self._at(name)))

    def tail(self, name: str, size: int) -> bytes:
        with self._errors("read", name):
            # Not by a negative start: some libraries ask for what lies before a short file then.
            start = max(0, int(self._files.info(self._at(name))["size"] or 0) - size)
            return cast(bytes, self._files.cat_file(self._at(name), start=start))

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        # By way of a local file: some stores keep what was sent when an upload is cut short.
        with self._scratch(name) as file:
            yield cast(BinaryIO, file)
            with super()._errors("write", name, absent=True):
                file.flush()
            with self._errors("write", name, absent=True):
                self._put(file.name, self._at(name))

    @contextmanager
    def _scratch(self, name: str) -> Iterator[Any]:
        """A local file that is gone afterwards; a full disk is told as such."""
        with super()._errors("write", name), tempfile.NamedTemporaryFile() as file:
            yield file

    def write(self, name: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        with self._errors("write", name, absent=True):
            self._pipe(bytes(data), self._at(name))

    def create(self, name: str, data: bytes) -> bool:
        with self._errors("write", name, absent=True):
            try:
                self._files.pipe_file(self._at(name), data, mode="create")
            except Exception:  # libraries differ in what they raise for an object that is there
                if not self.exists(name):
                    raise
                # Ours, perhaps: where the answer to a put is lost, it is sent a second time.
                return self.read(name) == data
        return True

    def prune(self, below: str) -> None:
        """Object stores have no folders."""

    def names(self, below: str) -> list[str]:
        return self._entries(below, "file")

    def folders(self, below: str) -> list[str]:
        return self._entries(below, "directory")

    def _entries(self, below: str, kind: str) -> list[str]:
        with self._errors("list", below):
            try:
                entries = self._files.ls(self._at(below), detail=True)
            except FileNotFoundError:
                return []
            found = (entry["name"] for entry in entries if entry["type"] == kind)
            return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def usage(self, name: str) -> tuple[int, int]:
        with self._errors("list", name):
            found = self._files.find(self._at(name), detail=True)
            sizes = [int(entry.get("size") or 0) for entry in found.values()]
            return len(sizes), sum(sizes)

    def sync(self, below: str) -> None:
        """An object is safe once it is there."""

    def last_change(self, name: str) -> float:
        with self._errors("list", name):
            found = self._files.find(self._at(name), detail=True)
            return max(map(_time_of, found.values()), default=0.0)

    def abandoned(self, below: str, base: str = "") -> list[str]:
        """None: an object appears only when its upload has ended."""
        return []

    def remove(self, name: str) -> None:
        with self._errors("remove", name), contextlib.suppress(FileNotFoundError):
            self._files.rm(self._at(name), recursive=True)

    def exists(self, name: str) -> bool:
        # Not `isfile`: it takes every failure for an absence.
        with self._errors("read", name), contextlib.suppress(FileNotFoundError):
            return bool(self._files.info(self._at(name))["type"] == "file")
        return False

    def stat(self, name: str) -> Stat:
        with self._errors("read", name):
            found = self._files.info(self._at(name))
            try:
                modified = self._files.modified(self._at(name)).timestamp()
            except NotImplementedError:  # a store that keeps no times
                modified = 0.0
            return Stat(int(found["size"] or 0), modified)

    def _put(self, source: str, at: str) -> None:
        """A local file as an object."""
        self._files.put_file(source, at)

    def _pipe(self, data: bytes, at: str) -> None:
        self._files.pipe_file(at, data)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")


def _time_of(entry: Mapping[str, Any]) -> float:
    """When an object was written by a store's listing, Unix seconds; now if it does not say."""
    for key in ("LastModified", "last_modified", "updated", "mtime", "created"):
        found = entry.get(key)
        with contextlib.suppress(ValueError):
            found = datetime.fromisoformat(found) if isinstance(found, str) else found
        if isinstance(found, datetime):
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        if isinstance(found, int | float):
            return float(found)
    return time.time()
