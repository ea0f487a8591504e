"""HTML that cannot be broken by what it shows: every text is escaped unless it was made here."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence

_EMPTY = frozenset({"br", "meta", "rect", "path", "line"})


class Markup(str):
    """HTML that was made by `tag`; every other text is escaped."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An element. Attributes that are None or False are left out; `_` in names becomes `-`.

    A trailing `_` is dropped: `class_="note"`.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{_attribute(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inner = joined(*children)
    if name in _EMPTY and not inner:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{inner}</{name}>")


def joined(*children: Child) -> Markup:
    """Children one after the other."""
    return Markup("".join(_written(child) for child in children))


def table(
    head: Sequence[Child], rows: Iterable[Sequence[Child]], *, text: int = 1, class_: str = ""
) -> Markup:
    """A table that scrolls by itself where it is too wide.

    Args:
        text: so many first columns are text; the others are numbers and stand at the right.
    """

    def line(cells: Sequence[Child], name: str) -> Markup:
        made = []
        for index, cell in enumerate(cells):
            kind = None if index < text else "num"
            made.append(tag(name, cell, class_=kind, scope="col" if name == "th" else None))
        return tag("tr", made)

    body = [line(row, "td") for row in rows]
    inner = tag("table", tag("thead", line(head, "th")), tag("tbody", body), class_=class_ or None)
    return tag("div", inner, class_="scroll")


def number(value: float | None, digits: int = 0, unit: str = "") -> str:
    """A number with thousands separated; a dash for none."""
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def brief(value: float) -> str:
    """A number for an axis: `0`, `0.5`, `12`, `1,500`, `25k`, `1.2M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:,g}"


def _written(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return html.escape(visible(child))
    if isinstance(child, int | float):
        return html.escape(str(child))
    return "".join(_written(one) for one in child)


def _attribute(value: str | float) -> str:
    return html.escape(visible(f"{value:g}" if isinstance(value, float) else str(value)))


def visible(text: str) -> str:
    """A text without what changes the reading of its surroundings, or is no text at all.

    Control characters, marks that turn the direction of writing, and halves of characters become �.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn") and c not in "\n\t\u200d"
        else c
        for c in text
    )  # fmt: skip
