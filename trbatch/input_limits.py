"""What an input may not do to the machine that reads it: rows without end, nesting, file bombs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

from trbatch.errors import InputError

MAX_COLUMNS = 10_000  # that pass through to the dataset, of all rows together
MAX_NESTING = 64  # levels of objects and lists in a row
# Bytes out of a compressed file for each byte in it. Rows that share a long prompt reach 1,300,
# but what is in no row, overlong and empty lines, should be little.
MAX_EXPANSION = 5_000
MAX_EMPTY_EXPANSION = 100
_EXPANSION_FROM = 64 << 20  # bytes out before which nobody asks
_SKIP = 1 << 20  # bytes of an overlong line at a time


class Positioned(Protocol):
    """A file that knows how much of it was read."""

    def tell(self) -> int: ...


class Expansion:
    """Watches how much comes out of a compressed file for what went in.

    Args:
        name: of the file, for the message.
        compressed: the file as it lies there; None if what is read is not compressed.
    """

    def __init__(self, name: str, compressed: Positioned | None) -> None:
        self._name = name
        self._compressed = compressed
        self._out = 0
        self._empty = 0  # of these: in no row
        self._next = _EXPANSION_FROM

    def count(self, out: int, line: int, *, empty: bool) -> None:
        """Count `out` more bytes, of this line; `empty`: they are in no row.

        Raises:
            InputError: the file is a bomb.
        """
        self._out += out
        self._empty += out if empty else 0
        if self._compressed is None or self._out < self._next:
            return
        self._next += _EXPANSION_FROM
        size = max(self._compressed.tell(), 1)
        wasted = self._empty > _EXPANSION_FROM // 2 and self._empty / size > MAX_EMPTY_EXPANSION
        if wasted or self._out / size > MAX_EXPANSION:
            rows = "without a row" if wasted else "of rows"
            raise InputError(
                f"{self._name}:{line}: the file expands to {self._out / size:,.0f} times its size, "
                f"{self._out >> 20:,} MiB so far, {rows}",
                hint="if it is no mistake, decompress it first and give the plain file",
            )


def read_lines(
    file: BinaryIO, most: int, expansion: Expansion
) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their numbers from 1; None for a line of more than `most` bytes.

    Never holds more of a line than that.
    """
    number = 0
    while text := file.readline(most + 1):
        number += 1
        if len(text) <= most or text.endswith(b"\n"):
            expansion.count(len(text), number, empty=text.isspace())
            yield number, text
            continue
        while not text.endswith(b"\n") and (text := file.readline(_SKIP)):
            expansion.count(len(text), number, empty=True)
        yield number, None


def too_large(what: str, most: int) -> str:
    """What an error row says of a row or a value of more than `most` bytes."""
    return f"{what} has more than {most:,} bytes; shorten it, or raise --max-row-bytes"


def is_too_deep(text: bytes, value: Any) -> bool:
    """Whether a parsed row is nested more than `MAX_NESTING` levels deep.

    Args:
        text: that it was parsed from; most rows have too few brackets to be worth a closer look.
    """
    return text.count(b"{") + text.count(b"[") > MAX_NESTING and _depth(value) > MAX_NESTING


def _depth(value: Any) -> int:
    """Levels of objects and lists, counted no further than one beyond the limit."""
    level, depth = [value], 0
    while level and depth <= MAX_NESTING:
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        depth += any(isinstance(one, dict | list) for one in level)
        level = [one for one in inner if isinstance(one, dict | list)]
    return depth


def check_rereadable(path: str) -> None:
    """Refuse a local input that cannot be read more than once, as a submit does.

    Raises:
        InputError: it is a pipe, a device or the like.
        OSError: there is no such file, or it cannot be looked at.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # of a folder the reader tells
        return
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) else "special"
    raise InputError(
        f"{path} is no file but {kind}",
        hint="the input is read more than once: write it to a file first, and give that",
    )


def unreadable(name: str, error: Exception) -> InputError:
    """What to raise when the input cannot be opened or read, without the system's own numbers."""
    if isinstance(error, IsADirectoryError):
        hint = "give one file; several become one with: cat part-*.jsonl > all.jsonl"
        return InputError(f"{name} is a folder, not a file", hint=hint)
    words = isinstance(error, OSError) and error.filename == name and error.strerror
    return InputError(f"cannot read {name}: {words or error}")
