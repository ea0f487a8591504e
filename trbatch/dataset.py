"""From segments to one dataset: every row exactly once, in input order.

Rows are joined by key, never by position. Memory holds the keys of all rows but the texts of only a
few thousand: the input's chunks are taken group by group, of each segment only the group's rows.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from typing import BinaryIO

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import trbatch
from trbatch import chunks, passthrough
from trbatch.figures import Figures, covered_seconds
from trbatch.ids import RepeatCheck
from trbatch.job import JobFolder
from trbatch.outputs import check_output, target
from trbatch.receipt import Receipt
from trbatch.schema import SCHEMA, Key
from trbatch.segments import read_outcomes, reading
from trbatch.sinks import Group, JsonSink, ParquetSink, Sink
from trbatch.storage import writing

_GROUP_ROWS = 8192  # rows whose texts are held at a time
_INPUT = "input:"  # before a passed-through column's name while it stands beside a chunk's own
_RANKS = {"error": 1, "cancelled": 2}  # what wins when a row is there twice: text, error, nothing


def collect(job: JobFolder, output: str | None = None, format: str = "parquet") -> Receipt:
    """Write the dataset of a job, with stats, errors and a receipt in the job folder.

    Rows that no segment holds yet are left out and counted as missing; the receipt then is not
    complete. Columns of the input keep their types and names, but for names that a result column
    has: those get the prefix `input_`.

    Args:
        job: whose rows; may still be running.
        output: a file, or a folder to put `<job id>.<format>` into. If None, the job's own output
            unless its name promises another format, else `results.<format>` in the job folder.
        format: `parquet`, or `jsonl` for OpenAI's batch result lines.

    Raises:
        UsageError: the format is unknown, or the output's name promises another one.
    """
    place = _target(job, output or "", format)
    inputs = job.passthrough_schema()
    index = _Index.of(job)
    joiner = _Joiner(job, index, inputs)
    tally = _Tally()
    with writing(place) as file, job.folder.writing("errors.jsonl") as errors:
        sink: Sink = (
            JsonSink(file, inputs)
            if format == "jsonl"
            else ParquetSink(file, inputs, _metadata(job))
        )
        for group in joiner.groups():
            sink.write(group)
            tally.count(group, errors)
        sink.close()
    receipt = _receipt(job, place, index, joiner, tally)
    job.folder.write("stats.json", orjson.dumps(receipt.stats, option=orjson.OPT_INDENT_2))
    job.mark(complete=receipt.complete)
    return receipt


class _Index:
    """Which row of which segment each key's result is, and how many were in vain."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places: dict[Key, tuple[int, int, int]] = {}  # rank, segment, row
        self.rows = 0

    @classmethod
    def of(cls, job: JobFolder) -> _Index:
        """The index of all segments that there are now; the oldest wins among equals."""
        index = cls()
        index.names = job.ledger.names()
        for number, name in enumerate(index.names):
            with reading(job.folder, name) as file:
                for row, (key, reason) in enumerate(read_outcomes(file)):
                    place = (_RANKS.get(reason, 0), number, row)
                    index.places[key] = min(place, index.places.get(key, place))
                    index.rows += 1
        return index


class _Tally:
    """What the dataset holds, counted as it is written."""

    def __init__(self) -> None:
        self.figures = Figures()
        self.keys = RepeatCheck()

    def count(self, group: Group, errors: BinaryIO) -> None:
        """Count a group's rows and write its failed ones to `errors`."""
        rows = group.results.select(_COUNTED).to_pylist()
        self.keys.add(f"{row['sample_index']} {row['custom_id']}" for row in rows)
        for row, line in zip(rows, group.lines.to_pylist(), strict=True):
            self.figures.count(row)
            if row["finish_reason"] == "error":
                names = ("custom_id", "sample_index", "prompt_index", "error_code", "error_message")
                failure = {name: row[name] for name in names} | {"line": line}
                errors.write(orjson.dumps(failure, option=orjson.OPT_APPEND_NEWLINE))


_COUNTED = [
    "custom_id",
    "sample_index",
    "prompt_index",
    "finish_reason",
    "error_code",
    "error_message",
    "prompt_tokens",
    "completion_tokens",
    "decode_s",
    "speedup",
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
]


class _Joiner:
    """Joins a group of the input's rows with their results.

    Args:
        job: whose chunks and segments.
        index: where each result is.
        inputs: names and types of the passed-through columns.
    """

    def __init__(self, job: JobFolder, index: _Index, inputs: passthrough.Schema) -> None:
        self.missing = 0
        self.used = 0
        self._job = job
        self._index = index
        self._inputs = inputs

    def groups(self) -> Iterator[Group]:
        """The whole output, some thousand rows at a time, in input order."""
        waiting: list[pa.Table] = []
        rows = 0
        for number in range(self._job.manifest.chunks):
            waiting.append(self._asked(number))
            rows += waiting[-1].num_rows
            if rows >= _GROUP_ROWS:
                yield self._group(pa.concat_tables(waiting))
                waiting, rows = [], 0
        if waiting:
            yield self._group(pa.concat_tables(waiting))

    def _asked(self, number: int) -> pa.Table:
        """A chunk with its passed-through columns, in their common types, behind its own."""
        table = self._job.chunk_table(number)
        values = passthrough.cast(chunks.passed_through(table), self._inputs)
        table = table.select(chunks.SCHEMA.names)
        for name, column in zip(self._inputs.types, values, strict=True):
            table = table.append_column(_INPUT + name, column)
        return table

    def _group(self, asked: pa.Table) -> Group:
        positions = array("q")  # of each output row: the row of `asked`
        places: list[tuple[int, int] | None] = []  # its segment and row there; None: a bad row
        ids, marks, samples = (
            asked.column(name).to_pylist() for name in ("custom_id", "fingerprint", "samples")
        )
        for position, (name, mark, count) in enumerate(zip(ids, marks, samples, strict=True)):
            if count == 0:
                positions.append(position)
                places.append(None)
            for sample in range(count):
                place = self._index.places.get((name, mark, sample))
                if place is None:
                    self.missing += 1
                    continue
                positions.append(position)
                places.append(place[1:])
        self.used += len(places) - places.count(None)
        chosen = asked.take(pa.array(positions, pa.int64()))
        results = self._results(places, chosen)
        first_input = len(chunks.SCHEMA)
        inputs = chosen.select(range(first_input, chosen.num_columns))
        inputs = inputs.rename_columns(list(self._inputs.types))
        return Group(results, inputs, chosen.column("line"))

    def _results(self, places: list[tuple[int, int] | None], chosen: pa.Table) -> pa.Table:
        """The result columns of the chosen rows: each from its segment, or of a bad row."""
        of_segment: dict[int, list[tuple[int, int]]] = {}  # (row there, row of the output)
        bad: list[int] = []
        for position, place in enumerate(places):
            if place is None:
                bad.append(position)
            else:
                of_segment.setdefault(place[0], []).append((place[1], position))
        pieces = [self._bad_rows(chosen.take(pa.array(bad, pa.int64())))]
        order = list(bad)
        for number, pairs in of_segment.items():
            name = self._index.names[number]
            with reading(self._job.folder, name) as file:
                segment = pq.ParquetFile(file).read(use_threads=False)
            pieces.append(segment.take(pa.array([row for row, _ in pairs])).cast(SCHEMA))
            order += [position for _, position in pairs]
        results = pa.concat_tables(pieces).take(pc.array_sort_indices(pa.array(order, pa.int64())))
        # A row may have moved in the input since it was decoded.
        at = SCHEMA.get_field_index("prompt_index")
        return results.set_column(at, SCHEMA.field(at), chosen.column("prompt_index"))

    def _bad_rows(self, bad: pa.Table) -> pa.Table:
        """Result rows of input rows that never went to a worker."""
        manifest = self._job.manifest
        known = {
            "custom_id": bad.column("custom_id"),
            "sample_index": [0] * bad.num_rows,
            "prompt_index": bad.column("prompt_index"),
            "finish_reason": ["error"] * bad.num_rows,
            "error_code": bad.column("error_code"),
            "error_message": bad.column("error_message"),
            "attempts": [0] * bad.num_rows,
            "model": [manifest.model] * bad.num_rows,
            "task": [manifest.task] * bad.num_rows,
        }
        nothing = [None] * bad.num_rows
        return pa.table([known.get(name, nothing) for name in SCHEMA.names], schema=SCHEMA)


def _target(job: JobFolder, output: str, format: str) -> str:
    """Where the dataset goes; the file that the job itself names, only if that fits the format."""
    check_output(output, job.manifest.input.path, format)
    found = target(output, job.spec.output, job.id, format)
    check_output(found, job.manifest.input.path, format)
    return found or job.folder.join(f"results.{format}")


def _metadata(job: JobFolder) -> dict[str, str]:
    """What the dataset's file says about itself; the engine's facts as its workers named them."""
    manifest = job.manifest
    facts = {"dtype": ["unknown"]} | job.ledger.facts()
    return {
        "trbatch.job": manifest.id,
        "trbatch.version": trbatch.__version__,
        "trbatch.model": manifest.model,
        "trbatch.revision": manifest.revision,
        "trbatch.task": manifest.task,
        "trbatch.job_seed": str(manifest.job_seed),
        "trbatch.sampling": orjson.dumps(manifest.spec.sampling.to_dict()).decode(),
        **{f"trbatch.{name}": ", ".join(values) for name, values in facts.items()},
    }


def _receipt(job: JobFolder, target: str, index: _Index, joiner: _Joiner, tally: _Tally) -> Receipt:
    figures = tally.figures
    receipt = Receipt(
        job=job.id,
        output=target,
        rows_in=job.manifest.samples,
        rows_ok=figures.rows_ok,
        rows_failed=figures.rows_failed,
        rows_cancelled=figures.rows_cancelled,
        rows_missing=joiner.missing,
        duplicates=index.rows - len(index.places),
        repeated=len(tally.keys.repeated()),
    )
    busy_s = covered_seconds(span for _, span in job.ledger.footers())
    stats = {
        "receipt": receipt.to_dict(),
        "rows_outdated": len(index.places) - joiner.used,
        "figures": figures.to_dict(),
        "mean_acceptance_length": figures.mean_acceptance_length,
        "draft_acceptance_rate": figures.draft_acceptance_rate,
        "speedup": figures.speedup,
        "busy_s": busy_s,
        "tokens_per_s": figures.completion_tokens / busy_s if busy_s > 0 else None,
        "metadata": _metadata(job),
    }
    return dataclasses.replace(receipt, stats=stats)
