"""Which columns a template reads, and its refusal where an input has one of them in no row.

A misspelt column would make every row an error row. It is told before there is a job instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, meta, nodes

from trbatch.errors import UsageError
from trbatch.merging import BadRow

if TYPE_CHECKING:
    from trbatch.templates import RowTemplate

_MOST_NAMES = 200  # of an input's columns that are kept, to find the nearest
_SHOWN_NAMES = 20
_SHOWN_CHARACTERS = 80  # of a template's line
_TAKE_ABSENT = frozenset({"d", "default", "items", "pprint"})  # filters that do
# Expressions and statements that look at some of their parts whatever the others are.
_LOOKS_AT = {
    nodes.CondExpr: "test",
    nodes.If: "test",
    nodes.For: "iter",
    nodes.And: "left",
    nodes.Or: "left",
    nodes.Compare: "expr",
    nodes.Not: "node",
    nodes.Neg: "node",
    nodes.Getattr: "node",
    nodes.Getitem: "node",
}
_LOOKS_AT_ALL = (nodes.Template, nodes.Output, nodes.Concat, nodes.Add, nodes.Sub, nodes.Mul)


def columns_read(environment: Environment, source: str) -> tuple[dict[str, int], frozenset[str]]:
    """The columns that a valid template reads.

    Returns:
        each with the line on which it first stands, and those of them without which no row can be
        rendered: they stand in no branch, and nothing like `is defined` or `default` guards them.
    """
    tree = environment.parse(source)
    free = meta.find_undeclared_variables(environment.parse(source))
    places = list(tree.find_all(nodes.Name))
    lines = {one.name: one.lineno for one in reversed(places) if one.name in free}
    own = {one.name for one in places if one.ctx != "load"}  # maybe set, in some branch
    return lines, frozenset(_surely_read(tree) & free - own)


def _surely_read(node: nodes.Node) -> set[str]:
    if isinstance(node, nodes.Name):
        return {node.name}
    if isinstance(node, nodes.Filter):
        guarded = node.name in _TAKE_ABSENT and isinstance(node.node, nodes.Name)
        return set() if guarded or node.node is None else _surely_read(node.node)
    if isinstance(node, _LOOKS_AT_ALL):
        return {name for child in node.iter_child_nodes() for name in _surely_read(child)}
    part = _LOOKS_AT.get(type(node))
    return _surely_read(getattr(node, part)) if part else set()


class ColumnCheck:
    """Renders the rows of an input, and knows whether they have the columns that it takes."""

    def __init__(self, template: RowTemplate) -> None:
        self._template = template
        self._unseen = set(template.columns)
        self._names: dict[str, None] = {}
        self._blamed: set[str] = set()  # columns that some row lacked
        self._rendered = False  # some row

    def render(self, columns: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            BadRow: as the template's.
        """
        if self._unseen:
            self._unseen.difference_update(columns)
            if len(self._names) < _MOST_NAMES:
                self._names.update(dict.fromkeys(columns))
        try:
            prompt = self._template.render(columns)
        except BadRow as error:
            self._blamed |= {
                name for name in self._unseen if f"{name!r} is undefined" in error.text
            }
            raise
        self._rendered = True
        return prompt

    def check_table(self, names: Iterable[str], path: str) -> None:
        """Refuse a table, before it is read, that lacks a column which every row needs.

        Raises:
            UsageError: as `check_rows`.
        """
        self._names = dict.fromkeys(names)
        self._refuse(self._template.needed - self._names.keys(), path)

    def check_rows(self, path: str) -> None:
        """Refuse an input, all of whose rows are read, if a column is why none can be rendered.

        Raises:
            UsageError: names the column, the nearest one that there is, and the template.
        """
        if not self._rendered:
            self._refuse(self._blamed & self._unseen, path)

    def _refuse(self, missing: Iterable[str], path: str) -> None:
        lines = self._template.columns
        for column in sorted(missing, key=lambda name: (lines[name], name)):
            names = list(self._names)
            close = difflib.get_close_matches(column, names, n=1)
            listed = ", ".join(names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else "")
            cure = f"did you mean {close[0]!r}?" if close else f"there are: {listed or 'none'}."
            raise UsageError(
                f"{self._template.name}:{lines[column]}: {path} has no column {column!r}, which "
                f"the template reads: {self._template.line(lines[column])[:_SHOWN_CHARACTERS]}",
                hint=f"{cure} Where one may be absent write {{{{ {column} | default('') }}}}",
            )
