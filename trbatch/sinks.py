"""What a dataset is written as: one Parquet file, or OpenAI's batch result and error lines."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from trbatch import passthrough
from trbatch.errors import UsageError
from trbatch.masking import mask_url
from trbatch.openai_results import error_lines, result_line
from trbatch.outputs import errors_of, is_folder
from trbatch.schema import LEADING_COLUMNS, SCHEMA
from trbatch.storage import Folder, place, writing

_OF_AN_ERROR_LINE = {"custom_id", "error", "trbatch"}  # keys; the last is nobody else's


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive rows of the output: result columns, input columns, …; all equally long."""

    results: pa.Table
    inputs: pa.Table
    lines: pa.ChunkedArray  # of the input file
    requests: pa.ChunkedArray  # JSON, as in `chunks.SCHEMA`


class Sink(Protocol):
    """Where groups are written to."""

    def write(self, group: Group) -> None:
        """Write a group."""

    def close(self) -> None:
        """Write what has to come last."""


class ParquetSink:
    """Writes groups into one Parquet file, the input's columns behind the first of ours."""

    def __init__(self, file: BinaryIO, inputs: passthrough.Schema, metadata: dict[str, str]):
        self._names = _output_names(list(inputs.types))
        fields = [
            pa.field(name, kind)
            for name, kind in zip(self._names, inputs.types.values(), strict=True)
        ]
        ours = list(SCHEMA)
        self._schema = pa.schema(
            [*ours[:LEADING_COLUMNS], *fields, *ours[LEADING_COLUMNS:]], metadata=metadata
        )
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")

    def write(self, group: Group) -> None:
        """Write a group as one row group."""
        ours = group.results.columns
        columns = [*ours[:LEADING_COLUMNS], *group.inputs.columns, *ours[LEADING_COLUMNS:]]
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def close(self) -> None:
        """Write the footer."""
        try:
            self._writer.close()
        finally:
            self._writer.is_open = False  # else it tries again when nobody looks


class JsonSink:
    """Writes groups as OpenAI batch lines.

    Args:
        file: gets a line for each input row of which a sample has a text, with all that have one.
        errors: gets a line for each sample that has none.
    """

    def __init__(self, file: BinaryIO, errors: BinaryIO, inputs: passthrough.Schema) -> None:
        self._file = file
        self._errors = errors
        self._inputs = inputs
        self._created = int(time.time())

    def write(self, group: Group) -> None:
        """Write the lines of a group; a row's samples are never in two groups."""
        inputs = passthrough.dictionaries(group.inputs, group.results.num_rows)
        others = (inputs, group.lines.to_pylist(), group.requests.to_pylist())
        rows = zip(group.results.to_pylist(), *others, strict=True)
        for _, samples in itertools.groupby(rows, key=lambda row: row[0]["prompt_index"]):
            results, (passed, *_), (number, *_), (request, *_) = zip(*samples, strict=True)
            is_chat = request is not None and "messages" in orjson.loads(request)
            values = self._parsed(passed)
            line = result_line(results, values, self._created, is_chat=is_chat)
            if line is not None:
                self._file.write(_dumped(line))
            for failed in error_lines(results, values, line=number):
                self._errors.write(_dumped(failed))

    def close(self) -> None:
        """Nothing is left to write."""

    def _parsed(self, values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: orjson.loads(value) if name in self._inputs.as_json and value else value
            for name, value in values.items()
        }


def check_error_file(output: str, format: str) -> None:
    """Refuse an output whose error file would take the place of somebody's own.

    An earlier collection's is known by its lines: each is a row's, as `JsonSink` writes it.

    Args:
        output: the dataset's file; "" or a folder, where it is not decided yet, is always fine.
        format: in which it will be written.

    Raises:
        UsageError: there is a file that trbatch has not written, or to which something was added.
    """
    if format != "jsonl" or not output or is_folder(output):
        return
    path = errors_of(output)
    folder, name = place(path)
    if folder.exists(name) and not _is_ours(folder, name):
        raise UsageError(
            f"{mask_url(folder.join(name))} was not written by trbatch, and failed rows would "
            "take its place",
            hint="move it, or choose another --output",
        )


def _is_ours(folder: Folder, name: str) -> bool:
    with folder.open(name) as file:
        ours = [_is_error_line(text) for text in file]
    return bool(ours) and all(ours)


def _is_error_line(text: bytes) -> bool:
    try:
        line = orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return isinstance(line, dict) and line.keys() >= _OF_AN_ERROR_LINE


def _dumped(line: dict[str, Any]) -> bytes:
    return orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE)


@contextmanager
def error_file(path: str) -> Iterator[BinaryIO]:
    """A file that appears under `path` on success, if anything was written to it.

    What an earlier collection left there is gone if not; see `check_error_file`.
    """
    with tempfile.TemporaryFile() as file:
        yield cast(BinaryIO, file)
        if file.tell():
            file.seek(0)
            with writing(path) as target:
                shutil.copyfileobj(file, target)
        else:
            folder, name = place(path)
            folder.remove(name)


def _output_names(inputs: list[str]) -> list[str]:
    """Names of the input's columns in the output: a name that is taken gets `input_` before it."""
    taken = {*SCHEMA.names, *inputs}
    names = []
    for name in inputs:
        if name in SCHEMA.names:
            name = f"input_{name}"
            while name in taken:
                name = f"input_{name}"
            taken.add(name)
        names.append(name)
    return names
