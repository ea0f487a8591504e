"""A small disk that can be filled, freed and closed: a mounted one where we may, else a fake."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest


class Disk(Protocol):
    """A folder whose disk may be full (`No space left`) or closed (`Read-only file system`)."""

    path: Path

    def fill(self) -> None: ...

    def free(self) -> None: ...

    def close(self) -> None: ...

    def reopen(self) -> None: ...


@contextmanager
def small_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk at `path`, of 16 MiB if it is a real one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        yield FakeDisk(path, monkeypatch)
        return
    try:
        yield Mounted(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


class Mounted:
    """A memory disk of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / ".filler"

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def free(self) -> None:
        self._filler.unlink()

    def close(self) -> None:
        self._remount("ro")

    def reopen(self) -> None:
        self._remount("rw")

    def _remount(self, how: str) -> None:
        for _ in range(100):  # refused while a file is open for writing
            command = ["mount", "-o", f"remount,{how}", str(self.path)]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return
        raise AssertionError(f"{self.path} cannot be remounted {how}")


class FakeDisk:
    """An ordinary folder in which every file that is opened for writing fails on demand."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._error = 0
        monkeypatch.setattr("trbatch.storage.open", self._open, raising=False)

    def fill(self) -> None:
        self._error = errno.ENOSPC

    def free(self) -> None:
        self._error = 0

    def close(self) -> None:
        self._error = errno.EROFS

    def reopen(self) -> None:
        self._error = 0

    def _open(self, name: str, *arguments: Any, **settings: Any) -> Any:
        if self._error and Path(name).is_relative_to(self.path):
            raise OSError(self._error, os.strerror(self._error), name)
        return open(name, *arguments, **settings)


# How a disk fails: what makes it so, what cures it, what it says.
FAILURES = {
    "full": ("fill", "free", "No space left on device"),
    "closed": ("close", "reopen", "Read-only file system"),
}
