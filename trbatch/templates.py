"""`--template`: a row's columns into its prompt, by a sandboxed Jinja2 template.

Strict: a column that a row lacks, or that is null where it would be written, makes an error row and
not a prompt with a hole in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import (
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
    Undefined,
    UndefinedError,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trbatch.errors import UsageError
from trbatch.merging import BadRow
from trbatch.template_columns import columns_read

OPTION = "--template"
_MARKS = ("{{", "{%")
_LINE_END = re.compile(r"\r\n|\r|\n")  # as Jinja counts lines
_LONGEST_NAME = 1024  # characters of a file's name that has such marks in it
# What the expressions of a template can raise, ours or a model's chat template.
FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _WritesNull(Exception):
    """An expression of the template is null."""


def _not_null(value: Any) -> Any:
    if value is None:
        raise _WritesNull
    return value


def _tojson(
    value: Any, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = False
) -> str:
    """A value as JSON, as chat templates have it. Jinja's own filter escapes it for HTML."""
    if isinstance(value, Undefined):
        str(value)  # raises, naming it
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def read_template(given: str) -> str:
    """The source of a template that is given as a file's path or as the text itself, checked.

    Raises:
        UsageError: there is no such file, or it is no valid template; names its line.
    """
    source = given
    if path := template_file(given):
        source = _read_file(given, path)
        if not any(mark in source for mark in _MARKS):
            raise UsageError(
                f"{given} has no {{{{ column }}}}: every row would get the same prompt",
                hint="write the names of columns in double braces, e.g. {{ question }}",
            )
    RowTemplate(source, template_name(given))
    return source


def template_file(given: str, folder: str | Path = "") -> str:
    """The path of the file that a template is given by; "" where it is the text itself.

    Args:
        given: what stands in the place of the template.
        folder: where a relative path starts from; "" is the working directory.
    """
    path = os.path.join(folder, os.path.expanduser(given))
    if not any(mark in given for mark in _MARKS):
        return path
    may_be_name = len(given) < _LONGEST_NAME and "\n" not in given
    return path if may_be_name and os.path.isfile(path) else ""


def template_name(given: str) -> str:
    """What messages call a template: its file, or the option that gave its text.

    Args:
        given: what stands in the place of the template.
    """
    return given if template_file(given) else OPTION


def _read_file(given: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no template file {given}",
            hint="give a file, or the text itself with columns in braces, e.g. '{{ question }}'",
        ) from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"cannot read the template {given}: {error}") from error


class RowTemplate:
    """A template over the columns of a row.

    Args:
        source: its text.
        name: what messages call it: its file, or the option that gave its text.

    Attributes:
        columns: what it reads, each with the line on which it first stands.
        needed: those of them without which no row can be rendered.

    Raises:
        UsageError: the text is no template; names the line.
    """

    def __init__(self, source: str, name: str = OPTION) -> None:
        self.name = name
        self._lines = _LINE_END.split(source)
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=_not_null, autoescape=False
        )
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise UsageError(
                f"{name}:{error.lineno}: not a valid Jinja template: {error.message}",
                hint="columns are written {{ column }}, conditions {% if column %} … {% endif %}",
            ) from error
        self.columns, self.needed = columns_read(environment, source)

    def line(self, number: int) -> str:
        """A line of its text, from 1."""
        return self._lines[number - 1].strip()

    def render(self, columns: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            BadRow: it lacks a column, has a null in it, or the template fails on it.
        """
        try:
            return self._template.render(columns)
        except _WritesNull as error:
            nulls = ", ".join(name for name, value in columns.items() if value is None)
            text = f"the template writes a value that is null (null here: {nulls or 'no column'})"
            cure = "write {{ column or '' }} or {% if column %} where one may be null"
            raise BadRow("template_failed", f"{text}; {cure}") from error
        except UndefinedError as error:
            has = ", ".join(list(columns)[:20])
            text = f"the template does not fit this row: {error.message}; it has {has or 'nothing'}"
            raise BadRow("template_failed", text) from error
        except FAILURES as error:
            text = f"the template fails on this row: {type(error).__name__}: {error}"
            raise BadRow("template_failed", text) from error
