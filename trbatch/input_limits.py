"""What an input may not do to the machine that reads it: rows without end, nesting, file bombs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

from trbatch.errors import InputError

MAX_NESTING = 64  # levels of objects and lists in a row
MAX_EXPANSION = 1000  # bytes out of a compressed file for each byte in it; texts reach some hundred
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
        self._next = _EXPANSION_FROM

    def count(self, out: int, line: int) -> None:
        """Count `out` more bytes, of this line.

        Raises:
            InputError: the file is a bomb.
        """
        self._out += out
        if self._compressed is None or self._out < self._next:
            return
        self._next += _EXPANSION_FROM
        ratio = self._out / max(self._compressed.tell(), 1)
        if ratio > MAX_EXPANSION:
            raise InputError(
                f"{self._name}:{line}: the file expands to {ratio:,.0f} times its size, "
                f"more than {MAX_EXPANSION:,} times",
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
        expansion.count(len(text), number)
        if len(text) <= most or text.endswith(b"\n"):
            yield number, text
            continue
        while not text.endswith(b"\n") and (text := file.readline(_SKIP)):
            expansion.count(len(text), number)
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
