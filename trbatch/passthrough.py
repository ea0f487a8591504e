"""The input's other columns on their way to the output, typed as the input has them.

JSON has no column types, so each chunk infers its own and `unified` finds one that holds them all.
Values that no Arrow type holds are kept as JSON text.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

# What pyarrow raises of a value that Python has no form for.
UNREADABLE = (ValueError, OverflowError, pa.ArrowException)
_DEEPEST = 8  # nested levels kept as Arrow types; below, JSON text
_WIDEST = 256  # keys of an object kept as a struct; above, JSON text: its keys are data


@dataclass(frozen=True, slots=True)
class Columns:
    """Passed-through columns of some rows. `as_json` names those whose values are JSON text."""

    values: pa.StructArray
    as_json: frozenset[str] = frozenset()

    @property
    def schema(self) -> Schema:
        """Their names and types."""
        types = {field.name: field.type for field in self.values.type}
        return Schema(types, self.as_json)


@dataclass(frozen=True, slots=True)
class Schema:
    """Names and types of passed-through columns."""

    types: Mapping[str, pa.DataType]
    as_json: frozenset[str] = frozenset()


def columns_of(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """The columns of rows parsed from JSON, in order of first appearance."""
    try:
        values = pa.array(rows, pa.struct([])) if not any(rows) else pa.array(rows)
        if all(_is_storable(field.type) for field in values.type):
            return Columns(values)
    except (pa.ArrowException, OverflowError):
        pass  # some column mixes types: find out which
    names = dict.fromkeys(name for row in rows for name in row)
    arrays, as_json = [], set()
    for name in names:
        column, is_json = _column([row.get(name) for row in rows])
        arrays.append(column)
        if is_json:
            as_json.add(name)
    return Columns(pa.StructArray.from_arrays(arrays, names=list(names)), frozenset(as_json))


def unified(schemas: Iterable[Schema]) -> Schema:
    """One schema that holds the columns of all, in order of first appearance."""
    types: dict[str, pa.DataType] = {}
    as_json: set[str] = set()
    seen: list[Schema] = []
    for schema in schemas:
        if schema in seen:
            continue
        seen.append(schema)
        as_json |= schema.as_json
        for name, kind in schema.types.items():
            both = _common(types.get(name, kind), kind)
            if both is None or not _is_storable(both):
                as_json.add(name)
            types[name] = both or pa.string()
    return Schema(
        {
            name: pa.string() if name in as_json else _without_null_types(kind)
            for name, kind in types.items()
        },
        frozenset(as_json),
    )


def cast(columns: Columns, schema: Schema) -> list[pa.Array]:
    """One array a column of the schema: columns that are absent here are null."""
    present = {field.name: i for i, field in enumerate(columns.values.type)}
    arrays = []
    for name, kind in schema.types.items():
        if name not in present:
            arrays.append(pa.nulls(len(columns.values), kind))
            continue
        array = columns.values.field(present[name])
        if name in schema.as_json and name not in columns.as_json:
            array = _json_text(array.to_pylist())
        # Not safe: a whole number too large for a double loses digits rather than the job.
        arrays.append(array.cast(kind, safe=False))
    return arrays


def dictionaries(table: pa.Table, rows: int) -> list[dict[str, Any]]:
    """The rows of a table, which may have no columns, as dictionaries.

    What Python has no form for is text: times of nanoseconds, dates beyond the year 9999, text that
    is not valid UTF-8.
    """
    if not table.num_columns:
        return [{} for _ in range(rows)]
    names = table.column_names
    columns = [_python_values(column) for column in table.columns]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return typing.cast(list[Any], column.to_pylist())
    except UNREADABLE:
        return [_python_value(scalar) for scalar in column]


def _python_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if hasattr(scalar, "as_buffer"):
            return scalar.as_buffer().to_pybytes().decode(errors="replace")
    except UNREADABLE:
        pass  # as text, then
    try:
        return scalar.cast(pa.string()).as_py()
    except UNREADABLE:
        return f"a value of type {scalar.type} that cannot be written as text"


def _column(values: list[Any]) -> tuple[pa.Array, bool]:
    try:
        array = pa.array(values)
        if _is_storable(array.type):
            return array, False
    except (pa.ArrowException, OverflowError):
        pass  # no Arrow type holds them all
    return _json_text(values), True


def _json_text(values: Iterable[Any]) -> pa.Array:
    texts = [None if value is None else orjson.dumps(value, default=str) for value in values]
    return pa.array(texts, pa.string())


def _is_storable(kind: pa.DataType, depth: int = 0) -> bool:
    """Whether Parquet can hold the type: no empty struct, nothing too deep or too wide."""
    if depth > _DEEPEST:
        return False
    if pa.types.is_struct(kind):
        return 0 < kind.num_fields <= _WIDEST and all(
            _is_storable(field.type, depth + 1) for field in kind
        )
    if pa.types.is_nested(kind) and hasattr(kind, "value_type"):
        return _is_storable(kind.value_type, depth + 1)
    return True


def _without_null_types(kind: pa.DataType) -> pa.DataType:
    """The type with texts where no value tells the type: not every reader knows columns of null."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_null_types(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_null_types(field.type)) for field in kind])
    return kind


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds values of both, or None. Whole numbers widen to doubles."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _common(one.value_type, other.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _common_struct(one, other)
    numbers = {pa.int64(), pa.float64()}
    return pa.float64() if {one, other} <= numbers else None


def _common_struct(one: pa.StructType, other: pa.StructType) -> pa.DataType | None:
    types = {field.name: field.type for field in one}
    for field in other:
        both = _common(types.get(field.name, field.type), field.type)
        if both is None:
            return None
        types[field.name] = both
    return pa.struct(list(types.items()))
