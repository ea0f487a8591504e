"""Digests of large files, read once: kept in the cache folder until a file changes.

A file counts as unchanged while path, size, inode and both its times are what they were. One that
was written a moment ago could change again without any of these telling, so it is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trbatch import storage
from trbatch.config import cache_folder
from trbatch.errors import Unreachable

logger = logging.getLogger("trbatch")

_SETTLED_S = 2.0  # after which a change would show in a file's times on any file system
_THREADS = 4
_WORTH_SAYING = 2 << 30  # bytes that take seconds to read


def file_digests(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file's whole content, in hexadecimal. Several are read at once."""
    known = [_remembered(file) for file in files]
    unread = sum(f.stat().st_size for f, digest in zip(files, known, strict=True) if not digest)
    if unread >= _WORTH_SAYING:
        logger.info("reading %.1f GB of weights to tell the model, once …", unread / 1e9)
    with ThreadPoolExecutor(_THREADS) as threads:
        read = threads.map(lambda pair: pair[1] or _read(pair[0]), zip(files, known, strict=True))
        return list(read)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's whole content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(file: Path) -> str:
    before = _state(file)
    digest = sha256_of(file)
    stat = file.stat()
    settled = time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_S
    if settled and _state(file) == before:
        kept = _kept(file)
        try:
            storage.folder(kept.parent).write(
                kept.name, json.dumps(before | {"digest": digest}).encode()
            )
        except (OSError, Unreachable) as error:  # only time is lost
            logger.warning("%s will be read again the next time: %s", file, error)
    return digest


def _remembered(file: Path) -> str:
    """The digest that the file had if it is still the same file, else ""."""
    try:
        kept = json.loads(_kept(file).read_text(encoding="utf-8"))
        digest = kept.pop("digest")
        return str(digest) if kept == _state(file) else ""
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return ""  # whatever is wrong with it: it is made again


def _state(file: Path) -> dict[str, int | str]:
    stat = file.stat()
    return {
        "path": str(file.resolve()),
        "size": stat.st_size,
        "inode": stat.st_ino,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _kept(file: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(file.resolve()), digest_size=12).hexdigest()
    return cache_folder() / "digests" / f"{name}.json"
