"""Reading the input: JSON Lines (plain, gzip, zstd) and Parquet, as a stream of checked rows.

A bad row comes out as an error row. Only what makes a whole file unusable raises `InputError`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from trbatch.config import SAMPLING_FIELDS, SamplingParams
from trbatch.errors import InputError
from trbatch.merging import is_absent
from trbatch.rows import Row, RowChecker

__all__ = ["Batch", "Row", "check_repeats", "read_batches", "read_rows"]

_JSON_LINES = (".jsonl", ".json", ".ndjson")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive rows of the input.

    `columns` holds the passed-through columns of Parquet input, typed as they were, one entry a
    row; it is None for JSON Lines, whose rows carry their own `passthrough`.
    """

    rows: list[Row]
    columns: pa.StructArray | None = None


def read_rows(
    path: str | Path,
    *,
    prompt_column: str = "prompt",
    id_column: str = "",
    sampling: SamplingParams | None = None,
) -> Iterator[Row]:
    """Every row of a file, in order, bad ones as error rows.

    Raises:
        InputError: the file is missing, unreadable, empty or of an unknown kind.
    """
    for batch in read_batches(
        path, 1024, prompt_column=prompt_column, id_column=id_column, sampling=sampling
    ):
        if batch.columns is not None:
            for row, passthrough in zip(batch.rows, batch.columns.to_pylist(), strict=True):
                row.passthrough = passthrough
        yield from batch.rows


def read_batches(
    path: str | Path,
    size: int,
    *,
    prompt_column: str = "prompt",
    id_column: str = "",
    sampling: SamplingParams | None = None,
) -> Iterator[Batch]:
    """The rows of a file in batches of `size`, the last one smaller.

    Raises:
        InputError: the file is missing, unreadable, empty or of an unknown kind.
    """
    name = str(path)
    kind, compression = _kind(name)
    place = "{}, row {}" if kind == "parquet" else "{}:{}"
    checker = RowChecker(lambda line: place.format(name, line), prompt_column, id_column, sampling)
    count = 0
    with _input_errors(name), _opened(name, compression) as file:
        if kind == "parquet":
            batches = _read_parquet(file, name, size, checker, prompt_column, id_column)
        else:
            batches = _read_json_lines(file, name, size, checker)
        for batch in batches:
            count += len(batch.rows)
            yield batch
    if count == 0:
        raise InputError(f"{name} has no rows")


def check_repeats(rows: Iterable[Row], repeated: frozenset[int], path: str | Path) -> list[Row]:
    """Rule out that an id came twice, given the hashes, by `hash`, that did.

    Returns:
        the bad rows that must give their id up: they have none of their own, and the number that
        stands in for it is another row's id.

    Raises:
        InputError: two rows have the same id; names both lines.
    """
    owners: dict[str, Row] = {}
    borrowers: dict[str, Row] = {}
    for row in rows:
        if hash(row.id) not in repeated:
            continue
        if row.error is not None and not row.named:
            borrowers[row.id] = row
            continue
        other = owners.setdefault(row.id, row)
        if other is not row:
            raise InputError(
                f"{path}: lines {other.line} and {row.line} have the same id {row.id!r}",
                hint="ids must be unique; a row without one has its number as its id",
            )
    return [row for name, row in borrowers.items() if name in owners]


def _kind(name: str) -> tuple[str, str | None]:
    base, compression = name.lower(), None
    for suffix, found in _COMPRESSIONS.items():
        if base.endswith(suffix):
            base, compression = base.removesuffix(suffix), found
    if base.endswith(_JSON_LINES):
        return "json", compression
    if base.endswith(".parquet") and compression is None:
        return "parquet", None
    raise InputError(
        f"{name}: unknown kind of file",
        hint="give .jsonl, .ndjson or .json (also with .gz or .zst), or .parquet",
    )


@contextmanager
def _input_errors(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except (OSError, EOFError, pa.ArrowException, ImportError) as error:
        raise InputError(f"cannot read {name}: {error}") from error


@contextmanager
def _opened(name: str, compression: str | None) -> Iterator[BinaryIO]:
    with _open(name) as file:
        if compression is None:
            yield file
        else:
            with pa.CompressedInputStream(file, compression) as stream:
                yield cast(BinaryIO, io.BufferedReader(cast(Any, stream), _BUFFER))


def _open(name: str) -> BinaryIO:
    if "://" in name:
        import fsspec  # here: it takes longer to import than a local file needs

        return cast(BinaryIO, fsspec.open(name, "rb").open())
    return open(name, "rb", buffering=_BUFFER)


def _read_json_lines(file: BinaryIO, name: str, size: int, checker: RowChecker) -> Iterator[Batch]:
    rows: list[Row] = []
    index = 0
    for line, text in enumerate(file, start=1):
        if line == 1:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        if text.isspace() or not text:
            continue
        if index == 0:
            _refuse_array(text, name)
        try:
            row = checker.row(orjson.loads(text), index, line)
        except orjson.JSONDecodeError as error:
            cause = f"not valid JSON at character {error.colno}, {error.msg.partition(':')[0]}"
            row = checker.bad(index, line, "invalid_json", f"{cause}; a line is one JSON object")
        rows.append(row)
        index += 1
        if len(rows) == size:
            yield Batch(rows)
            rows = []
    if rows:
        yield Batch(rows)


def _refuse_array(text: bytes, name: str) -> None:
    start = text.strip()
    one_document = name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json")
    if start == b"[" or (one_document and start.startswith(b"[")):
        raise InputError(
            f"{name} holds one JSON array, not one object a line",
            hint="turn it into JSON Lines, e.g. jq -c '.[]' file.json > file.jsonl",
        )


def _read_parquet(
    file: BinaryIO, name: str, size: int, checker: RowChecker, prompt_column: str, id_column: str
) -> Iterator[Batch]:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    _check_columns(names, name, prompt_column, id_column)
    ids = id_column or ("custom_id" if "custom_id" in names else "id")
    read = {prompt_column, "messages", "sampling", ids, *SAMPLING_FIELDS}
    if id_column == "":
        read.add("id")  # of rows whose custom_id is null
    if prompt_column not in names and "messages" not in names:
        read |= {"body", "url", "method"}
    fields = [column for column in names if column in read]
    passed = [c for c in names if c not in read or (c == "id" and ids == "custom_id")]
    index = 0
    for table in _rebatched(parquet.iter_batches(size), size):
        rows = []
        for values in _dictionaries(table.select(fields), {"custom_id", "id", ids}):
            if isinstance(values, str):
                rows.append(checker.bad(index, index + 1, "invalid_characters", values))
            else:
                rows.append(checker.row(values, index, index + 1))
            index += 1
        yield Batch(rows, _struct(table.select(passed)))


def _check_columns(names: list[str], name: str, prompt_column: str, id_column: str) -> None:
    listed = ", ".join(names)
    if len(set(names)) < len(names):
        raise InputError(f"{name} has two columns of one name", hint=f"columns: {listed}")
    if not {prompt_column, "messages", "body"} & set(names):
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


def _dictionaries(table: pa.Table, ids: Set[str]) -> Iterator[dict[str, Any] | str]:
    """Each row as a dictionary without nulls, or as a text that says why it cannot be one.

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
        broken = [name for name, value in row.items() if isinstance(value, UnicodeDecodeError)]
        if broken:
            yield f"column {broken[0]!r} is not valid UTF-8"
            continue
        if isinstance(row.get("messages"), list):
            row["messages"] = [_without_nulls(message) for message in row["messages"]]
        yield {name: value for name, value in row.items() if not is_absent(value)}


def _whole(values: list[Any]) -> list[Any]:
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return cast(list[Any], column.to_pylist())
    except UnicodeDecodeError:  # of one row; the others are good
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


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
