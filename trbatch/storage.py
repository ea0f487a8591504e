"""Files of a job folder, on a local disk or in an object store, each written whole.

A reader never meets half a file: on a local disk a file is written under a hidden temporary name
and renamed, in an object store (`s3://`, `gs://`, … through fsspec) an object appears only when its
upload has ended. Nothing is ever appended to, and no caller needs a rename.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from trbatch.errors import Unreachable, UsageError


class Folder(ABC):
    """A folder by its absolute path or URL; names below it use `/` and may not exist yet.

    Every method raises `Unreachable` when the storage fails for another reason than a missing file.
    """

    path: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError when there is none."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file for seeking and reading. Raises FileNotFoundError when there is none."""

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A binary file that appears under `name`, safe from a power cut, only on success."""

    @abstractmethod
    def names(self, below: str) -> list[str]:
        """Sorted names of the files directly in the folder `below`; [] when there is none."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; nothing happens when there is none."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    @abstractmethod
    def write(self, name: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        """Write a small file whole. `durable`: it must survive a power cut from now on."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a small file whole unless there is one. Returns whether it was written.

        Of several that do so at once on one local disk, one writes. An object store is asked first
        and written to then.
        """

    @abstractmethod
    def prune(self, below: str) -> None:
        """Remove folders that hold nothing: the folder `below` and this one."""

    def join(self, name: str) -> str:
        """The path or URL of a name below this folder."""
        return f"{self.path.rstrip('/')}/{name}"

    @contextmanager
    def _errors(self, verb: str, name: str, *, absent: bool = False) -> Iterator[None]:
        """Turn the system's errors into `Unreachable`; with `absent` that of a missing file too."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not absent:
                raise
            raise Unreachable(f"cannot {verb} {self.join(name)}: {error}") from error


def folder(path: str | os.PathLike[str]) -> Folder:
    """The folder of a local path or of a URL that fsspec knows, e.g. `s3://bucket/jobs`."""
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemoteFolder(text) if "://" in text else LocalFolder(Path(text))


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file at any path or URL that appears there only on success."""
    text = os.fspath(path)
    parent, _, name = text.rpartition("/")
    if "://" not in text:
        parent, name = os.path.split(os.path.abspath(text))
    with folder(parent).writing(name) as file:
        yield file


class LocalFolder(Folder):
    """A folder on a disk of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = str(path.expanduser().absolute())

    def read(self, name: str) -> bytes:
        with self._errors("read", name):
            return Path(self.path, name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        with self._errors("read", name):
            return Path(self.path, name).open("rb")

    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        return self._writing(name, durable=True)

    def write(self, name: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        with self._writing(name, durable=durable) as file:
            file.write(data)

    @contextmanager
    def _writing(self, name: str, *, durable: bool) -> Iterator[BinaryIO]:
        target = os.path.join(self.path, name)
        parent, base = os.path.split(target)
        temporary = os.path.join(parent, f".{base}.{secrets.token_hex(4)}")
        with self._errors("write", name, absent=True):
            os.makedirs(parent, exist_ok=True)
            file = open(temporary, "xb")
        try:
            # A missing file is the caller's own here: one that it reads while it writes.
            with self._errors("write", name), file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            with self._errors("write", name, absent=True):
                os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def create(self, name: str, data: bytes) -> bool:
        parent, base = os.path.split(name)
        draft = os.path.join(parent, f".{base}.{secrets.token_hex(4)}")
        self.write(draft, data)
        source, target = os.path.join(self.path, draft), os.path.join(self.path, name)
        with self._errors("write", name, absent=True):
            try:
                os.link(source, target)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if os.path.exists(target):
                    return False
                os.replace(source, target)
            finally:
                Path(source).unlink(missing_ok=True)
        return True

    def prune(self, below: str) -> None:
        for path in (os.path.join(self.path, below), self.path):
            try:
                os.rmdir(path)
            except FileNotFoundError:
                continue
            except OSError:  # something lies in it
                return

    def names(self, below: str) -> list[str]:
        with self._errors("list", below):
            try:
                entries = os.listdir(os.path.join(self.path, below))
            except FileNotFoundError:
                return []
            return sorted(name for name in entries if not name.startswith("."))

    def remove(self, name: str) -> None:
        target = Path(self.path, name)
        with self._errors("remove", name):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        return Path(self.path, name).is_file()


class RemoteFolder(Folder):
    """A folder of an object store, through the fsspec filesystem of its URL."""

    def __init__(self, url: str) -> None:
        import fsspec  # here: it takes longer to import than a local job needs

        self.path = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.path, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UsageError(f"cannot use {url}: {error}") from error

    def read(self, name: str) -> bytes:
        with self._errors("read", name):
            return cast(bytes, self._files.cat_file(self._at(name)))

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        # By way of a local file: some stores keep what was sent when an upload is cut short.
        with self._errors("write", name), tempfile.NamedTemporaryFile() as file:
            yield cast(BinaryIO, file)
            file.flush()
            with self._errors("write", name, absent=True):
                self._files.put_file(file.name, self._at(name))

    def write(self, name: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        with self._errors("write", name, absent=True):
            self._files.pipe_file(self._at(name), bytes(data))

    def create(self, name: str, data: bytes) -> bool:
        if self.exists(name):
            return False
        self.write(name, data)
        return True

    def prune(self, below: str) -> None:
        """Object stores have no folders."""

    def names(self, below: str) -> list[str]:
        with self._errors("list", below):
            try:
                entries = self._files.ls(self._at(below), detail=True)
            except FileNotFoundError:
                return []
            files = (entry["name"] for entry in entries if entry["type"] == "file")
            return sorted(name.rpartition("/")[2] for name in files)

    def remove(self, name: str) -> None:
        with self._errors("remove", name):
            if self._files.exists(self._at(name)):
                self._files.rm(self._at(name), recursive=True)

    def exists(self, name: str) -> bool:
        with self._errors("read", name):
            return bool(self._files.isfile(self._at(name)))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"
