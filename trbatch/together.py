"""Whether Parquet files of one folder open as one dataset.

`datasets` takes the columns of the first file by name and casts all others to them: a column that a
later file lacks is null there, one that only a later file has is an error, and so is a type that
cannot be cast.
"""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from trbatch.errors import UsageError
from trbatch.masking import mask_url, printable
from trbatch.parquet_files import schema_of
from trbatch.storage import Folder

LONGEST_TYPE = 80  # characters


class Misfit(NamedTuple):
    """A column that cannot be cast."""

    column: str  # of a field inside it: `column.field`
    type: str
    wanted: str  # "": the column should not be there


def check_together(root: Folder, name: str, schema: pa.Schema) -> None:
    """Refuse a file with which the others in its folder would no longer open as one dataset.

    Reads footers: that of the first file, or of all where the new one comes first by name.

    Args:
        root: the place of the dataset.
        name: of the new file in it, e.g. `data/night.parquet`; what it replaces does not count.
        schema: its own.

    Raises:
        UsageError: they would not; or a file that is there already is no Parquet file.
        Unreachable: the storage fails.
    """
    below = name.rpartition("/")[0]
    found = (f"{below}/{base}" for base in root.names(below) if base.endswith(".parquet"))
    others = [other for other in found if other != name]
    if others and others[0] < name:
        _check(name, schema, others[0], _schema_of(root, others[0]))
        return
    for other in others:
        _check(other, _schema_of(root, other), name, schema)


def misfit(schema: pa.Schema, first: pa.Schema) -> Misfit | None:
    """What keeps a file from being opened behind a first one; None: nothing does."""
    return _misfit_of(list(schema), {field.name: field.type for field in first})


def _misfit_of(
    fields: list[pa.Field], wanted: dict[str, pa.DataType], above: str = ""
) -> Misfit | None:
    for field in fields:
        name = f"{above}{field.name}"
        if field.name not in wanted:
            return Misfit(name, _spelled(field.type), "")
        if found := _misfit(name, field.type, wanted[field.name]):
            return found
    return None


def _misfit(name: str, kind: pa.DataType, wanted: pa.DataType) -> Misfit | None:
    if kind == wanted or pa.types.is_null(kind):
        return None
    if _is_list(kind) and _is_list(wanted):
        return _misfit(f"{name}[]", kind.value_type, wanted.value_type)
    if pa.types.is_struct(kind) and pa.types.is_struct(wanted):
        return _misfit_of(list(kind), {field.name: field.type for field in wanted}, f"{name}.")
    return None if _widens(kind, wanted) else Misfit(name, _spelled(kind), _spelled(wanted))


def _widens(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a plain type's values have one in the other, but for huge integers as doubles."""
    types = pa.types
    if _is_text(wanted):
        plain = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        return bool(plain) or _is_text(kind)
    if types.is_floating(wanted):
        wide = types.is_floating(kind) and kind.bit_width <= wanted.bit_width
        return bool(wide or types.is_integer(kind))
    alike = (
        types.is_signed_integer if types.is_signed_integer(wanted) else types.is_unsigned_integer
    )
    return bool(alike(kind) and alike(wanted) and kind.bit_width <= wanted.bit_width)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _check(name: str, schema: pa.Schema, first: str, wanted: pa.Schema) -> None:
    found = misfit(schema, wanted)
    if found is None:
        return
    there = f"{found.wanted} in" if found.wanted else "not in"
    raise UsageError(
        f"{name} and {first} would not open as one dataset: the column {printable(found.column)!r} "
        f"is {found.type} in {name} and {there} {first}, the first file there",
        hint="push this job to a place of its own, e.g. a folder below this one",
    )


def _schema_of(root: Folder, name: str) -> pa.Schema:
    try:
        return schema_of(root, name)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UsageError(
            f"{mask_url(root.join(name))} is no whole Parquet file: no dataset opens with it",
            hint="remove it, or push to another place",
        ) from error


def _spelled(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= LONGEST_TYPE else f"{text[: LONGEST_TYPE - 1]}…"
