"""Chunks: the checked input in files of a few hundred rows, one lease of work each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from trbatch import passthrough
from trbatch.config import SamplingParams
from trbatch.errors import RowError
from trbatch.merging import SamplingMerger
from trbatch.parquet_files import open_parquet, read_parquet
from trbatch.prompts import Batch
from trbatch.rows import Row
from trbatch.schema import Key
from trbatch.shaping import CHAT_ARGUMENTS

SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("prompt_index", pa.int64()),
        ("line", pa.int64()),
        ("request", pa.string()),  # JSON; null for a bad row
        ("seed", pa.int64()),
        ("samples", pa.int32()),  # how many are asked for; 0 for a bad row
        ("fingerprint", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
    ]
)
_KEYS = ["custom_id", "fingerprint", "samples"]
_PASSTHROUGH = "passthrough"
_AS_JSON = b"trbatch.as_json"  # names of passed-through columns whose values are JSON text


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """One row of a chunk, as a worker takes it. A bad row has an `error` and no request."""

    custom_id: str
    prompt_index: int  # place in the input, from 0
    line: int  # line of the input file, from 1
    # {"prompt": str} or {"messages": […]}, maybe "chat_template_kwargs", maybe "sampling"
    request: dict[str, Any]
    seed: int
    samples: int  # how many are asked for; 0 for a bad row
    fingerprint: str
    error: RowError | None = None

    def key(self, sample_index: int) -> Key:
        """What identifies a sample of this row in the segments."""
        return self.custom_id, self.fingerprint, sample_index

    def sampling(self, of_job: SamplingParams) -> SamplingParams:
        """The job's sampling with the row's own fields over it."""
        return of_job.merged(self.request.get("sampling", {}))


class RowHasher:
    """Seeds and fingerprints of the rows of one job."""

    def __init__(self, model: str, revision: str, sampling: SamplingParams, job_seed: int) -> None:
        self._model = orjson.dumps([model, revision])
        self._merger = SamplingMerger(sampling)
        self._seeds = blake2b(job_seed.to_bytes(8, "little"), digest_size=8)
        self._starts: dict[bytes, Any] = {}

    def identify(self, row: Row) -> tuple[int, str, int]:
        """Seed, fingerprint and number of samples of a good row.

        The fingerprint covers text or messages, the chat template's arguments, model, revision,
        merged sampling and seed; not how many samples are asked for, so that asking for more of
        them keeps those that are there.
        """
        assert row.request is not None, "a bad row has no fingerprint"
        sampling, canonical, seed = self._merger.merge(row.request.get("sampling"))
        if seed is None:
            seeds = self._seeds.copy()
            seeds.update(row.id.encode())
            seed = int.from_bytes(seeds.digest(), "little") >> 1
        request = self._start(canonical).copy()
        prompt = row.request.get("prompt")
        if prompt is None:
            request.update(b"%d messages " % seed)
            messages = row.request["messages"]
            request.update(orjson.dumps(messages, option=orjson.OPT_SORT_KEYS))
            if arguments := row.request.get(CHAT_ARGUMENTS):
                request.update(orjson.dumps(arguments, option=orjson.OPT_SORT_KEYS))
        else:
            request.update(b"%d prompt " % seed)
            request.update(prompt.encode())
        return seed, request.hexdigest(), sampling.n

    def _start(self, canonical: bytes) -> Any:
        start = self._starts.get(canonical)
        if start is None:
            if len(self._starts) >= 4096:
                self._starts.clear()
            start = blake2b(self._model + canonical, digest_size=16)
            self._starts[canonical] = start
        return start


def encode(batch: Batch, hasher: RowHasher) -> tuple[pa.Table, int]:
    """The chunk of a batch of rows, and how many samples it asks for."""
    rows = batch.rows
    requests: list[bytes | None] = []
    seeds, samples, fingerprints = [], [], []
    for row in rows:
        if row.request is None:
            seed, fingerprint, count = 0, "", 0
            requests.append(None)
        else:
            seed, fingerprint, count = hasher.identify(row)
            requests.append(orjson.dumps(row.request))
        seeds.append(seed)
        fingerprints.append(fingerprint)
        samples.append(count)
    columns = [
        [row.id for row in rows],
        [row.index for row in rows],
        [row.line for row in rows],
        requests,
        seeds,
        samples,
        fingerprints,
        [row.error and row.error.code for row in rows],
        [row.error and row.error.message for row in rows],
    ]
    arrays = [pa.array(c, kind) for c, kind in zip(columns, SCHEMA.types, strict=True)]
    return _with_passthrough(pa.table(arrays, schema=SCHEMA), batch), sum(samples)


def _with_passthrough(table: pa.Table, batch: Batch) -> pa.Table:
    if batch.columns is None:
        columns = passthrough.columns_of([row.passthrough for row in batch.rows])
    else:
        columns = passthrough.Columns(batch.columns)
    if columns.values.type.num_fields == 0:
        return table
    as_json = orjson.dumps(sorted(columns.as_json))
    table = table.append_column(_PASSTHROUGH, columns.values)
    return table.replace_schema_metadata({_AS_JSON: as_json})


def with_id(table: pa.Table, position: int, name: str) -> pa.Table:
    """The chunk with another id for one of its rows."""
    names = table["custom_id"].to_pylist()
    names[position] = name
    return table.set_column(0, "custom_id", pa.array(names, pa.string()))


def to_bytes(table: pa.Table) -> memoryview:
    """The chunk as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return memoryview(sink.getvalue())


def read_table(file: BinaryIO) -> pa.Table:
    """A whole chunk."""
    return read_parquet(file)


def read_rows(file: BinaryIO) -> list[ChunkRow]:
    """A chunk's rows, bad ones included."""
    table = read_parquet(file, SCHEMA.names)
    return list(_rows(table))


def read_keys(file: BinaryIO) -> Iterator[Key]:
    """The key of every sample that a chunk asks for."""
    table = read_parquet(file, _KEYS)
    return _keys(table)


def passed_names(schema: pa.Schema) -> list[str]:
    """Names of a chunk's passed-through columns."""
    return (
        [field.name for field in schema.field(_PASSTHROUGH).type]
        if _PASSTHROUGH in schema.names
        else []
    )


def read_schema(file: BinaryIO) -> passthrough.Schema:
    """Names and types of a chunk's passed-through columns."""
    schema = open_parquet(file).schema_arrow
    if _PASSTHROUGH not in schema.names:
        return passthrough.Schema({})
    types = {field.name: field.type for field in schema.field(_PASSTHROUGH).type}
    return passthrough.Schema(types, _as_json(schema))


def passed_through(table: pa.Table) -> passthrough.Columns:
    """The passed-through columns of a whole chunk."""
    if _PASSTHROUGH not in table.column_names:
        return passthrough.Columns(pa.array([{}] * table.num_rows, pa.struct([])))
    values = table[_PASSTHROUGH].combine_chunks()
    return passthrough.Columns(values, _as_json(table.schema))


def _as_json(schema: pa.Schema) -> frozenset[str]:
    return frozenset(orjson.loads((schema.metadata or {}).get(_AS_JSON, b"[]")))


def _rows(table: pa.Table) -> Iterator[ChunkRow]:
    columns = [table[name].to_pylist() for name in SCHEMA.names]
    for name, index, line, request, seed, samples, mark, code, message in zip(
        *columns, strict=True
    ):
        error = None if code is None else RowError(code, message)
        asked = {} if request is None else orjson.loads(request)
        yield ChunkRow(name, index, line, asked, seed, samples, mark, error)


def _keys(table: pa.Table) -> Iterator[Key]:
    columns = [table[name].to_pylist() for name in _KEYS]
    for name, fingerprint, samples in zip(*columns, strict=True):
        for sample in range(samples):
            yield name, fingerprint, sample
