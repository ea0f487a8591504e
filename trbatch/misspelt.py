"""Columns that pass through and look like a misspelt sampling field: a warning, once for each.

They are no error: a column may be called anything, and only its owner knows.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable

from trbatch.config import SAMPLING_FIELDS, JobSpec
from trbatch.schema import SCHEMA

_ALIKE = 0.83  # `max_new_tokens` is that near to `max_tokens`, `reasoning` to nothing
_SHORTEST = 6  # letters; below, ordinary words are as near as slips are: speed, seeds, stops

logger = logging.getLogger(__name__)


def warn_of_misspelt(spec: JobSpec, columns: Iterable[str]) -> None:
    """Log a warning of each column that was probably meant as a sampling field.

    Args:
        spec: of the job; what its template reads is no such column.
        columns: of the input, those that pass through.
    """
    read: Iterable[str] = ()
    if spec.template:
        from trbatch.templates import RowTemplate  # here: few jobs need Jinja

        read = RowTemplate(spec.template).columns
    for column, field in meant(set(columns).difference(read)).items():
        logger.warning(
            "%s: the column %r passes through and changes no text; did you mean %r?",
            spec.input, column, field,
            extra={"event": "misspelt", "column": column, "field": field},
        )  # fmt: skip


def meant(columns: Iterable[str]) -> dict[str, str]:
    """The sampling fields that columns were probably meant as, by column."""
    plain = {_plain(field): field for field in SAMPLING_FIELDS}
    found = {}
    for column in sorted(columns):
        name = _plain(column)
        if column in SCHEMA.names:  # of an earlier job's dataset
            continue
        if name in plain:
            found[column] = plain[name]
        elif len(name) >= _SHORTEST and (
            near := difflib.get_close_matches(column.lower(), SAMPLING_FIELDS, 1, _ALIKE)
        ):
            found[column] = near[0]
    return found


def _plain(name: str) -> str:
    """A name as it is heard: `top-P` as `topp`."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
