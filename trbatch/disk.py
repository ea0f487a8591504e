"""What files on a disk need beyond writing: to survive a power cut, and to be found when forgotten.

A writer that is killed leaves its hidden temporary file behind; `abandoned` finds those that are
surely nobody's any more.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

ABANDONED_S = 86_400.0  # what nobody has touched for so long is nobody's
_SYNCERS = 8  # threads: a disk takes many files that come together nearly as fast as one
_TOKEN = 4  # random bytes in a temporary file's name
# How some shared filesystems refuse to sync a folder, and any one that this user may not read.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}


def temporary_name(base: str) -> str:
    """The hidden name under which a file is written before it appears as `base`."""
    return f".{base}.{secrets.token_hex(_TOKEN)}"


def abandoned(folder: str, base: str = "") -> list[str]:
    """Temporary files in a folder that killed writers have left, `ABANDONED_S` ago or earlier.

    Args:
        folder: that may not be there.
        base: the file that they would have become; "": any.
    """
    # Twice where a temporary file was itself written under a temporary name.
    pattern = rf"\.{{1,2}}{re.escape(base) or '.+'}(\.[0-9a-f]{{{2 * _TOKEN}}}){{1,2}}"
    found = []
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in entries:
        if re.fullmatch(pattern, entry.name, re.DOTALL) and entry.is_file(follow_symlinks=False):
            try:
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            except FileNotFoundError:  # its writer has just ended
                continue
            if age > ABANDONED_S:
                found.append(entry.name)
    return sorted(found)


def last_change(path: str) -> float:
    """When a file, or anything in a folder, was changed last, Unix seconds; 0.0 without one."""
    newest = 0.0
    paths = [path]
    for folder, folders, files in os.walk(path):
        paths += [os.path.join(folder, name) for name in (*folders, *files)]
    for one in paths:
        try:
            newest = max(newest, os.lstat(one).st_mtime)
        except FileNotFoundError:
            continue
    return newest


def make_folder(path: str) -> list[str]:
    """Make a folder with those above it. Returns the folders that have got a new entry."""
    missing = []
    place = path
    while not os.path.isdir(place) and place != os.path.dirname(place):
        missing.append(place)
        place = os.path.dirname(place)
    os.makedirs(path, exist_ok=True)
    return [os.path.dirname(place) for place in missing]


def sync_folders(paths: Iterable[str]) -> None:
    """Let the names in these folders survive a power cut, where the filesystem can."""
    for path in dict.fromkeys(paths):
        try:
            _sync(path)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise


def sync_files(paths: Iterable[str]) -> None:
    """Let the contents of many files survive a power cut."""
    with ThreadPoolExecutor(_SYNCERS, thread_name_prefix="sync") as threads:
        for _ in threads.map(_sync, paths):
            pass


def _sync(path: str) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
