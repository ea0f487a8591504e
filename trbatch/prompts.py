"""Reading the input: JSON Lines (plain, gzip, zstd) and Parquet, as a stream of checked rows.

A bad row comes out as an error row. Only what makes a whole file unusable raises `InputError`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import pyarrow as pa

from trbatch import passthrough
from trbatch.config import MAX_ROW_BYTES, SamplingParams
from trbatch.errors import InputError
from trbatch.input_limits import (
    MAX_NESTING,
    Expansion,
    check_rereadable,
    is_too_deep,
    read_lines,
    too_large,
    unreadable,
)
from trbatch.parquet_input import read_parquet
from trbatch.rows import Row, RowChecker
from trbatch.shaping import Shaping

__all__ = ["Batch", "Row", "check_repeats", "read_batches", "read_rows"]

_JSON_LINES = (".jsonl", ".json", ".ndjson")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER = 1 << 20  # bytes
_BATCH = 1024  # rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive rows of the input.

    `columns` holds the passed-through columns of Parquet input, typed as they were, one entry a
    row; it is None for JSON Lines, whose rows carry their own `passthrough`.
    """

    rows: list[Row]
    columns: pa.StructArray | None = None

    @property
    def passed(self) -> set[str]:
        """Names of the columns that pass through."""
        if self.columns is not None:
            return {field.name for field in self.columns.type}
        return {name for row in self.rows for name in row.passthrough}


def read_rows(
    path: str | Path,
    *,
    prompt_column: str = "prompt",
    id_column: str = "",
    sampling: SamplingParams | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    shaping: Shaping | None = None,
) -> Iterator[Row]:
    """Every row of a file, in order, bad ones as error rows.

    Raises:
        InputError: the file is missing, unreadable, empty or of an unknown kind.
    """
    for batch in read_batches(
        path,
        _BATCH,
        prompt_column=prompt_column,
        id_column=id_column,
        sampling=sampling,
        max_row_bytes=max_row_bytes,
        shaping=shaping,
    ):
        if batch.columns is not None:
            names = [field.name for field in batch.columns.type]
            table = pa.table(batch.columns.flatten(), names)
            passed = passthrough.dictionaries(table, len(batch.rows))
            for row, fields in zip(batch.rows, passed, strict=True):
                row.passthrough = fields
        yield from batch.rows


def read_batches(
    path: str | Path,
    size: int,
    *,
    prompt_column: str = "prompt",
    id_column: str = "",
    sampling: SamplingParams | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    shaping: Shaping | None = None,
) -> Iterator[Batch]:
    """The rows of a file in batches of `size`, the last one smaller.

    Args:
        max_row_bytes: a longer line, or a longer text or binary value of Parquet, makes its row an
            error row.
        shaping: what the job makes of the rows' prompts.

    Raises:
        InputError: the file is missing, unreadable, empty or of an unknown kind.
        UsageError: no row has a column that the template reads; told when all rows are read.
    """
    name = str(path)
    kind, compression = _kind(name)
    place = "{}, row {}" if kind == "parquet" else "{}:{}"
    checker = RowChecker(
        lambda line: place.format(name, line), prompt_column, id_column, sampling, shaping
    )
    count = 0
    with _input_errors(name), _opened(name, compression) as (file, expansion):
        if kind == "parquet":
            tables = read_parquet(
                file, name, size, checker, prompt_column, id_column, max_row_bytes
            )
            batches: Iterator[Batch] = (Batch(rows, columns) for rows, columns in tables)
        else:
            batches = _read_json_lines(file, expansion, name, size, checker, max_row_bytes)
        for batch in batches:
            count += len(batch.rows)
            yield batch
    if count == 0:
        raise InputError(f"{name} has no rows")
    if checker.templated is not None:
        checker.templated.check_rows(name)


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
    hint = "give .jsonl, .ndjson or .json (also with .gz or .zst), or .parquet"
    if base.endswith((".csv", ".tsv")):
        hint += "; a table becomes one with pandas: read_csv(…).to_parquet(…)"
    raise InputError(f"{name}: unknown kind of file", hint=hint)


@contextmanager
def _input_errors(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except (OSError, EOFError, pa.ArrowException, ImportError) as error:
        raise unreadable(name, error) from error


@contextmanager
def _opened(name: str, compression: str | None) -> Iterator[tuple[BinaryIO, Expansion]]:
    with _open(name) as file:
        if compression is None:
            yield file, Expansion(name, None)
        else:
            with pa.CompressedInputStream(file, compression) as stream:
                plain = io.BufferedReader(cast(Any, stream), _BUFFER)
                yield cast(BinaryIO, plain), Expansion(name, file)


def _open(name: str) -> BinaryIO:
    if "://" in name:
        import fsspec  # here: it takes longer to import than a local file needs

        # Buffered by us: a store's own file does not read a part of a line.
        return io.BufferedReader(fsspec.open(name, "rb").open(), _BUFFER)
    check_rereadable(name)
    return open(name, "rb", buffering=_BUFFER)


def _read_json_lines(
    file: BinaryIO, expansion: Expansion, name: str, size: int, checker: RowChecker, most: int
) -> Iterator[Batch]:
    rows: list[Row] = []
    index = 0
    for line, text in read_lines(file, most, expansion):
        if line == 1 and text:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        if text is not None and (text.isspace() or not text):
            continue
        if index == 0 and text is not None:
            _refuse_array(text, name)
        rows.append(_json_row(text, index, line, checker, most))
        index += 1
        if len(rows) == size:
            yield Batch(rows)
            rows = []
    if rows:
        yield Batch(rows)


def _json_row(text: bytes | None, index: int, line: int, checker: RowChecker, most: int) -> Row:
    if text is None:
        return checker.bad(index, line, "row_too_large", too_large("the row", most))
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        cause = f"not valid JSON at character {error.colno}, {error.msg.partition(':')[0]}"
        return checker.bad(index, line, "invalid_json", f"{cause}; a line is one JSON object")
    if is_too_deep(text, fields):
        cause = f"the row is nested more than {MAX_NESTING} levels deep; make it flatter"
        return checker.bad(index, line, "too_deeply_nested", cause)
    return checker.row(fields, index, line)


def _refuse_array(text: bytes, name: str) -> None:
    start = text.strip()
    one_document = name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json")
    if start == b"[" or (one_document and start.startswith(b"[")):
        raise InputError(
            f"{name} holds one JSON array, not one object a line",
            hint="turn it into JSON Lines, e.g. jq -c '.[]' file.json > file.jsonl",
        )
