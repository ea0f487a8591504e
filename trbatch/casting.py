"""Whether one file's columns can be cast to another's as `datasets` casts them, `table_cast`.

It takes fields by name, a dictionary's values for the dictionary, no list for a plain value, and of
plain values whatever Arrow casts without a loss. That depends on the types, and for some on each
value: 2.0 is a whole number and 2.5 is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

LONGEST_TYPE = 80  # characters
_LONGEST_REASON = 200  # characters
_EXACT_BITS = {16: 11, 32: 24, 64: 53}  # of whole numbers as floats, by the float's width


class Misfit(NamedTuple):
    """A column that cannot be cast."""

    column: str  # of a field inside it: `column.field`
    type: str
    wanted: str  # "": the column should not be there
    reason: str = ""  # which value cannot be cast; "": none of this type can


def misfit_of_types(schema: pa.Schema, first: pa.Schema) -> Misfit | None:
    """What keeps any file of a schema from being cast to a first one's; None: nothing does."""
    columns = ((field.name, pa.nulls(0, field.type)) for field in schema)
    return _misfit_of(columns, _types(first))


def misfit_of_values(batch: pa.RecordBatch, first: pa.Schema) -> Misfit | None:
    """What keeps these rows from being cast; None: nothing does."""
    return _misfit_of(zip(batch.schema.names, batch.columns, strict=True), _types(first))


def doubtful(schema: pa.Schema, first: pa.Schema) -> list[str]:
    """The columns for which it depends on their values, where the types can be cast."""
    wanted = _types(first)
    return [field.name for field in schema if not _is_lossless(field.type, wanted[field.name])]


def _misfit_of(
    columns: Iterable[tuple[str, pa.Array]], wanted: dict[str, pa.DataType], above: str = ""
) -> Misfit | None:
    for base, array in columns:
        name = f"{above}{base}"
        if base not in wanted:
            return Misfit(name, _spelled(array.type), "")
        if found := _misfit(name, array, wanted[base]):
            return found
    return None


def _misfit(name: str, array: pa.Array, wanted: pa.DataType) -> Misfit | None:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind, wanted = array.type, _stored(wanted)
    if kind == wanted or pa.types.is_null(kind):
        return None
    cannot = Misfit(name, _spelled(kind), _spelled(wanted))
    if pa.types.is_struct(kind) and pa.types.is_struct(wanted):
        fields = zip([field.name for field in kind], array.flatten(), strict=True)
        return _misfit_of(fields, _types(wanted), f"{name}.")
    if _is_list(kind) and _is_list(wanted):
        if reason := _wrong_length(array, wanted):
            return cannot._replace(reason=reason if len(array) else "")
        return _misfit(f"{name}[]", array.flatten(), wanted.value_type)
    if pa.types.is_nested(kind) or pa.types.is_nested(wanted) or pa.types.is_null(wanted):
        return cannot
    try:
        array.cast(wanted)
    except pa.ArrowException as error:
        return cannot._replace(reason=_cut(str(error), _LONGEST_REASON) if len(array) else "")
    return None


def _wrong_length(array: pa.Array, wanted: pa.DataType) -> str:
    """Why lists do not have the length that a type gives them; "" where they do."""
    if not pa.types.is_fixed_size_list(wanted):
        return ""
    size = wanted.list_size
    if pa.types.is_fixed_size_list(array.type):
        return f"{array.type.list_size} elements" if array.type.list_size != size else ""
    lengths = pc.list_value_length(array)
    wrong = lengths.filter(pc.not_equal(lengths, size))
    return f"a list has {wrong[0].as_py()} elements" if len(wrong) else ""


def _is_lossless(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether any value of a type can be cast to another one that it can be cast to at all."""
    types = pa.types
    kind, wanted = _stored(kind), _stored(wanted)
    if kind == wanted or types.is_null(kind):
        return True
    if types.is_struct(kind):
        inner = _types(wanted)
        return all(_is_lossless(field.type, inner[field.name]) for field in kind)
    if _is_list(kind):
        if types.is_fixed_size_list(wanted) and not types.is_fixed_size_list(kind):
            return False
        return _is_lossless(kind.value_type, wanted.value_type)
    plain = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    if _is_text(wanted):
        return bool(plain) or _is_text(kind)
    if types.is_floating(wanted):
        if types.is_integer(kind):
            return _bits(kind) <= _EXACT_BITS[wanted.bit_width]
        return bool(types.is_floating(kind) and kind.bit_width <= wanted.bit_width)
    if types.is_integer(wanted) and types.is_integer(kind):
        signs = types.is_signed_integer(wanted) or types.is_unsigned_integer(kind)
        return bool(signs and _bits(kind) <= _bits(wanted))
    return False


def _bits(kind: pa.DataType) -> int:
    """The bits of a whole number's type that are not its sign."""
    return int(kind.bit_width) - bool(pa.types.is_signed_integer(kind))


def _types(fields: pa.Schema | pa.StructType) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in fields}


def _stored(kind: pa.DataType) -> pa.DataType:
    """The type that `datasets` makes of one."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _spelled(kind: pa.DataType) -> str:
    return _cut(str(kind), LONGEST_TYPE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
