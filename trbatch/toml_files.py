"""TOML files that people write: what they say, and in which line.

A key that nobody knows and a value of the wrong type are errors that name file and line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trbatch.checks import refuse_unknown
from trbatch.errors import UsageError

_TABLE = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?")
_KEY = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|([A-Za-z0-9_-]+))\s*[=.]""")


@dataclass(frozen=True, slots=True)
class TomlFile:
    """One file: its values, and the line in which each key stands."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[tuple[str, str], int]  # (table, key) -> line, from 1; table "": none

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and parse.

        Raises:
            UsageError: there is no such file, or it is no TOML.
        """
        try:
            text = path.read_text(encoding="utf-8")
            return cls(path, tomllib.loads(text), _lines(text))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not valid TOML: {error}") from error

    def place(self, key: str, table: str = "") -> str:
        """`FILE:LINE` of a key; of a table if only that is known, else the file alone."""
        line = self.lines.get((table, key)) or self.lines.get(("", table))
        return f"{self.path}:{line}" if line else str(self.path)

    def refuse_unknown(self, names: Sequence[str], table: str = "") -> None:
        """Refuse a key (of a table) that is none of the names.

        Raises:
            UsageError: names file, line and the nearest valid key.
        """
        for key in self.table(table) if table else self.values:
            try:
                refuse_unknown([key], names)
            except UsageError as error:
                raise self.wrong(key, error.message, table=table, hint=error.hint) from None

    def table(self, name: str) -> Mapping[str, Any]:
        """The values of a table; {} if it is absent.

        Raises:
            UsageError: there is a single value of that name.
        """
        found = self.values.get(name, {})
        if not isinstance(found, Mapping):
            raise self.wrong(name, f"{name} must be a table: [{name}]")
        return found

    def wrong(
        self, key: str, message: str, *, table: str = "", hint: str | None = None
    ) -> UsageError:
        """An error about a key."""
        return UsageError(f"{self.place(key, table)}: {message}", hint=hint)

    def check_type(self, key: str, value: Any, like: Any, table: str = "") -> None:
        """Refuse a value whose type is not that of a setting's default.

        Args:
            like: the default: a flag, a text, a number, or a tuple of what may come several times;
                anything is like None.

        Raises:
            UsageError: names file, line and key.
        """
        if isinstance(like, bool) and not isinstance(value, bool):
            raise self.wrong(key, f"{key} must be true or false, not {value!r}", table=table)
        if isinstance(like, str) and not isinstance(value, str):
            hint = f'write {key} = "{value}"' if isinstance(value, int | float) else None
            raise self.wrong(key, f"{key} must be a text, not {value!r}", table=table, hint=hint)
        if isinstance(like, tuple) and not isinstance(value, str | list):
            raise self.wrong(key, f"{key} must be a list, not {value!r}", table=table)
        if isinstance(like, float | int) and not isinstance(like, bool):
            whole = isinstance(like, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                what = "a whole number" if whole else "a number"
                raise self.wrong(key, f"{key} must be {what}, not {value!r}", table=table)


def _lines(text: str) -> dict[tuple[str, str], int]:
    """Where keys and tables begin. What looks like one inside a long text comes too late to count.

    Dotted keys and tables count by their first part.
    """
    found: dict[tuple[str, str], int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TABLE.fullmatch(line):
            table = header[1].partition(".")[0].strip("\"' ")
            found.setdefault(("", table), number)
        elif key := _KEY.match(line):
            found.setdefault((table, key[1] or key[2] or key[3]), number)
    return found
