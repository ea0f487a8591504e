"""Reading Parquet input: columns become the fields of rows, the other columns stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trbatch import parquet_bombs
from trbatch.config import SAMPLING_FIELDS
from trbatch.errors import InputError
from trbatch.input_limits import too_large
from trbatch.merging import BadRow, is_absent
from trbatch.parquet_files import open_parquet
from trbatch.passthrough import UNREADABLE
from trbatch.rows import Row, RowChecker
from trbatch.shaping import CHAT_ARGUMENTS

_LARGE = "trbatch: too large"  # of each row: the column whose value is


def read_parquet(
    file: BinaryIO,
    name: str,
    size: int,
    checker: RowChecker,
    prompt_column: str,
    id_column: str,
    most: int,
) -> Iterator[tuple[list[Row], pa.StructArray]]:
    """Rows of a file, `size` at a time, with their passed-through columns.

    Args:
        most: bytes of a text or of binary data; more make an error row.

    Raises:
        InputError: the columns are not those of an input.
        UsageError: nor those that the job's template needs.
    """
    parquet = _opened(file, name)
    names = parquet.schema_arrow.names
    templated = checker.templated is not None
    _check_columns(names, name, prompt_column, id_column, templated=templated)
    if checker.templated is not None:
        checker.templated.check_table(names, name)
    ids = id_column or ("custom_id" if "custom_id" in names else "id")
    read = {"sampling", CHAT_ARGUMENTS, ids, *SAMPLING_FIELDS}
    if id_column == "":
        read.add("id")  # of rows whose custom_id is null
    if not templated:
        read |= {prompt_column, "messages"}
        if prompt_column not in names and "messages" not in names:
            read |= {"body", "url", "method"}
    fields = names if templated else [column for column in names if column in read]
    passed = [c for c in names if c not in read or (c == "id" and ids == "custom_id")]
    index = 0
    at_once = 1 if parquet_bombs.may_explode(parquet.metadata, file, most) else size
    batches = (_screened(batch, most) for batch in _batches(parquet, name, at_once))
    for table in _rebatched(batches, size):
        large = table[_LARGE].to_pylist()
        rows: list[Row] = []
        nothing = dict.fromkeys(fields) if templated else {}  # a null is no missing column there
        for values in _dictionaries(table.select(fields), {"custom_id", "id", ids}):
            if column := large[len(rows)]:
                cause = too_large(f"column {column!r}", most)
                rows.append(checker.bad(index, index + 1, "row_too_large", cause))
            elif isinstance(values, BadRow):
                rows.append(checker.bad(index, index + 1, values.code, values.text))
            else:
                rows.append(checker.row(nothing | values, index, index + 1))
            index += 1
        yield rows, _struct(table.select(passed))


def _opened(file: BinaryIO, name: str) -> pq.ParquetFile:
    try:
        return open_parquet(file)
    except UnicodeDecodeError as error:  # of damaged names of columns
        raise InputError(f"cannot read {name}: {error}") from error


def _batches(parquet: pq.ParquetFile, name: str, size: int) -> Iterator[pa.RecordBatch]:
    batches = parquet.iter_batches(size, use_threads=False)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UNREADABLE as error:
            raise InputError(f"cannot read {name}: {error}") from error
        yield batch


def _check_columns(
    names: list[str], name: str, prompt_column: str, id_column: str, *, templated: bool
) -> None:
    listed = ", ".join(names)
    if len(set(names)) < len(names):
        raise InputError(f"{name} has two columns of one name", hint=f"columns: {listed}")
    if not templated and not {prompt_column, "messages", "body"} & set(names):
        raise InputError(
            f"{name} has neither a column {prompt_column!r} nor a column 'messages'",
            hint=f"name the prompts' column with --prompt-column; columns: {listed}",
        )
    if id_column and id_column not in names:
        raise InputError(f"{name} has no column {id_column!r}", hint=f"columns: {listed}")


def _rebatched(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Tables of exactly `size` rows, the last one smaller, whatever the file's row groups are."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += batch.num_rows
        while count >= size:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, size)
            count -= size
            waiting = table.slice(size).to_batches()
    if count:
        yield pa.Table.from_batches(waiting)


def _screened(batch: pa.RecordBatch, most: int) -> pa.RecordBatch:
    """The batch with nothing but nulls in rows that hold a text or binary data of too many bytes.

    The name of the column that does stands in a column of its own, `_LARGE`.
    """
    found: dict[int, str] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if not _has_bytes(column.type):
            continue
        lengths = pc.binary_length(column)
        if (pc.max(lengths).as_py() or 0) > most:
            rows = pc.indices_nonzero(pc.fill_null(pc.greater(lengths, most), False))
            found |= dict.fromkeys(rows.to_pylist(), name)
    if found:
        kept = [None if row in found else row for row in range(batch.num_rows)]
        batch = batch.take(pa.array(kept, pa.int64()))
    large = [found.get(row) for row in range(batch.num_rows)] if found else batch.num_rows * [None]
    return batch.append_column(_LARGE, pa.array(large, pa.string()))


def _has_bytes(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    return any(test(kind) for test in (*tests, pa.types.is_large_binary))


def _dictionaries(table: pa.Table, ids: Set[str]) -> Iterator[dict[str, Any] | BadRow]:
    """Each row as a dictionary without nulls, or why it cannot be one.

    Args:
        table: the columns that are read.
        ids: names of those that hold whole numbers even where they are stored as floats, as pandas
            does once one of them is absent.
    """
    columns = [
        _whole(_values(column)) if name in ids else _values(column)
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    for values in zip(*columns, strict=True):
        row = dict(zip(table.column_names, values, strict=True))
        broken = [name for name, value in row.items() if isinstance(value, Exception)]
        if broken:
            yield _unreadable(broken[0], row[broken[0]])
            continue
        if isinstance(row.get("messages"), list):
            row["messages"] = [_without_nulls(message) for message in row["messages"]]
        yield {name: value for name, value in row.items() if not is_absent(value)}


def _whole(values: list[Any]) -> list[Any]:
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return cast(list[Any], column.to_pylist())
    except UNREADABLE:  # of one row; the others are good
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UNREADABLE as error:
        return error


def _unreadable(column: str, error: Exception) -> BadRow:
    if isinstance(error, UnicodeDecodeError):
        return BadRow("invalid_characters", f"column {column!r} is not valid UTF-8")
    return BadRow("invalid_value", f"column {column!r} holds a value that cannot be read: {error}")


def _without_nulls(message: Any) -> Any:
    """A Parquet struct has a null for every key that another row's message has."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _struct(table: pa.Table) -> pa.StructArray:
    columns = [column.combine_chunks() for column in table.columns]
    if not columns:
        return pa.array([{}] * table.num_rows, pa.struct([]))
    return pa.StructArray.from_arrays(columns, names=table.column_names)
