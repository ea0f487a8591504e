"""Files of a job folder, on a local disk or in an object store, each written whole.

A reader never meets half a file: on a local disk a file is written under a hidden temporary name
and renamed, in an object store (`s3://`, `gs://`, … through fsspec) an object appears only when its
upload has ended. Nothing is ever appended to, and no caller needs a rename.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trbatch import disk
from trbatch.errors import Unreachable
from trbatch.masking import mask_text, mask_url

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Stat:
    """What a file is: bytes, and when it was written (seconds since 1970; 0.0 if not known)."""

    size: int
    modified: float


class Folder(ABC):
    """A folder by its absolute path or URL; names below it use `/` and may not exist yet.

    Every method raises `Unreachable` when the storage fails for another reason than a missing file.
    """

    path: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError when there is none."""

    @abstractmethod
    def tail(self, name: str, size: int) -> bytes:
        """The last bytes of a file, `size` at most. Raises FileNotFoundError when there is none."""

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

        Of several that do so at once, one writes: on a disk by a hard link, in S3 and Google Cloud
        Storage by a put that the store refuses where there is an object. A store that knows no
        such put is asked first and written to then.
        """

    @abstractmethod
    def stat(self, name: str) -> Stat:
        """Size and time of a file. Raises FileNotFoundError when there is none."""

    @abstractmethod
    def folders(self, below: str) -> list[str]:
        """Sorted names of the folders directly in the folder `below`; [] when there is none."""

    @abstractmethod
    def prune(self, below: str) -> None:
        """Remove folders that hold nothing: the folder `below` and this one."""

    @abstractmethod
    def usage(self, name: str) -> tuple[int, int]:
        """How many files a file or a whole folder is, and their bytes."""

    @abstractmethod
    def sync(self, below: str) -> None:
        """Let all files in the folder `below`, and itself, survive a power cut from now on.

        Much quicker for many files than a durable `write` of each.
        """

    @abstractmethod
    def last_change(self, name: str) -> float:
        """When a file, or anything in a folder, was written last, Unix seconds.

        0.0 if there is none; now, if the storage keeps no times.
        """

    @abstractmethod
    def abandoned(self, below: str, base: str = "") -> list[str]:
        """Names of hidden files that writers killed in the folder `below` have left long ago.

        Args:
            base: only of this file; "": of any.
        """

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
            raise self._failure(verb, name, error) from error

    def _failure(self, verb: str, name: str, error: Exception) -> Unreachable:
        number = getattr(error, "errno", None)
        hint = None
        if number in _FULL:
            hint = "make room there; what is written already stays, and a worker goes on by itself"
        elif number in _CLOSED or isinstance(error, PermissionError):
            right = "read" if verb in ("read", "list") else "write"
            hint = f"this user must be allowed to {right} there; --store names another place"
        said = getattr(error, "strerror", None) or str(error)  # without numbers and hidden names
        words = mask_text(said) or type(error).__name__
        return Unreachable(f"cannot {verb} {mask_url(self.join(name))}: {words}", hint=hint)


def folder(path: str | os.PathLike[str]) -> Folder:
    """The folder of a local path or of a URL that fsspec knows, e.g. `s3://bucket/jobs`."""
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return LocalFolder(Path(text))
    # Here: most jobs lie on a disk.
    if text.startswith("hf://"):
        from trbatch.hub_folder import HubFolder

        return HubFolder(text)
    from trbatch.object_storage import RemoteFolder

    return RemoteFolder(text)


def place(path: str | os.PathLike[str]) -> tuple[Folder, str]:
    """The folder and the name in it of a file by its path or URL."""
    text = os.fspath(path)
    parent, _, name = text.rpartition("/")
    if "://" not in text:
        parent, name = os.path.split(os.path.abspath(text))
    return folder(parent), name


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file at any path or URL that appears there only on success."""
    parent, name = place(path)
    with parent.writing(name) as file:
        yield file


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove what killed writers of a file at any path or URL have left beside it, long ago."""
    parent, name = place(path)
    with contextlib.suppress(Unreachable):  # it lies in nobody's way
        for left in parent.abandoned("", name):
            parent.remove(left)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file at a path or URL."""
    parent, name = place(path)
    return parent.exists(name)


class LocalFolder(Folder):
    """A folder on a disk of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = str(path.expanduser().absolute())

    def read(self, name: str) -> bytes:
        with self._errors("read", name):
            return Path(self.path, name).read_bytes()

    def tail(self, name: str, size: int) -> bytes:
        with self._errors("read", name), Path(self.path, name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read()

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
        temporary = os.path.join(parent, disk.temporary_name(base))
        with self._errors("write", name, absent=True):
            changed = disk.make_folder(parent)
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
                if durable:
                    disk.sync_folders([parent, *changed])
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def create(self, name: str, data: bytes) -> bool:
        parent, base = os.path.split(name)
        draft = os.path.join(parent, disk.temporary_name(base))
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
            disk.sync_folders([os.path.dirname(target)])
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

    def folders(self, below: str) -> list[str]:
        with self._errors("list", below):
            try:
                entries = os.scandir(os.path.join(self.path, below))
                return sorted(entry.name for entry in entries if entry.is_dir())
            except FileNotFoundError:
                return []

    def usage(self, name: str) -> tuple[int, int]:
        with self._errors("list", name):
            found = [Path(self.path, name), *Path(self.path, name).rglob("*")]
            sizes = [path.stat().st_size for path in found if path.is_file()]
            return len(sizes), sum(sizes)

    def sync(self, below: str) -> None:
        folder = os.path.join(self.path, below)
        with self._errors("write", below, absent=True):
            disk.sync_files(entry.path for entry in os.scandir(folder))
            disk.sync_folders([folder, *map(str, Path(folder).parents)])

    def last_change(self, name: str) -> float:
        with self._errors("list", name):
            return disk.last_change(os.path.join(self.path, name))

    def abandoned(self, below: str, base: str = "") -> list[str]:
        with self._errors("list", below):
            found = disk.abandoned(os.path.join(self.path, below), base)
        return [f"{below}/{name}" if below else name for name in found]

    def remove(self, name: str) -> None:
        target = Path(self.path, name)
        with self._errors("remove", name):
            while target.is_dir():
                # Another command may remove the same.
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(target)
            target.unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        return Path(self.path, name).is_file()

    def stat(self, name: str) -> Stat:
        with self._errors("read", name):
            found = os.stat(os.path.join(self.path, name))
            return Stat(found.st_size, found.st_mtime)
