"""The input's rows joined with their results: by key, a group of some thousand rows at a time.

Memory holds 24 bytes for each row that the segments have; the texts are those of one group. Of each
segment only the group's rows are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from trbatch import chunks, passthrough
from trbatch.control import DEADLINE, RowEnd
from trbatch.job import JobFolder
from trbatch.keymap import KeyMap
from trbatch.parquet_files import read_parquet
from trbatch.schema import SCHEMA, Key, in_schema
from trbatch.segments import consistently, read_outcomes, reading
from trbatch.sinks import Group

_GROUP_ROWS = 8192  # rows whose texts are held at a time
_INPUT = "input:"  # before a passed-through column's name while it stands beside a chunk's own
_RANKS = {"error": 1, "cancelled": 2}  # what wins when a row is there twice: text, error, nothing
_SEGMENT_BITS = 26
_ROW_BITS = 34
_NOWHERE = -1  # the segment of a row that is in none


class Index:
    """Which row of which segment each key's result is, and how many were in vain."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.rows = 0
        self._places = KeyMap()  # rank, segment and row in one number: the smallest wins

    @classmethod
    def of(cls, job: JobFolder) -> Index:
        """The index of all segments that there are now; the oldest wins among equals."""
        retries = job.ledger.retries
        retries.refresh()

        def read(names: list[str]) -> Index:
            index = cls(names)
            for number, name in enumerate(names):
                with reading(job.folder, name) as file:
                    found = read_outcomes(file, partial(retries.void, name))
                index.add(number, found)
            return index

        return consistently(job.ledger.names, read)

    def add(self, number: int, found: list[tuple[Key, str]]) -> None:
        """Count the rows of a segment."""
        assert number < 1 << _SEGMENT_BITS and len(found) < 1 << _ROW_BITS, "more than fits a place"
        ranks = [_RANKS.get(reason, 0) << _SEGMENT_BITS | number for _, reason in found]
        self._places.add(
            (key, ranks[row] << _ROW_BITS | row)
            for row, (key, reason) in enumerate(found)
            if reason
        )
        self.rows += sum(1 for _, reason in found if reason)

    def __len__(self) -> int:
        """Distinct rows."""
        return len(self._places)

    def place(self, key: Key) -> tuple[int, int, int] | None:
        """Rank, segment and row there of a key's result; None if there is none."""
        found = self._places.get(key)
        if found is None:
            return None
        above, row = divmod(found, 1 << _ROW_BITS)
        return above >> _SEGMENT_BITS, above & ((1 << _SEGMENT_BITS) - 1), row


class Joiner:
    """Joins a group of the input's rows with their results.

    Args:
        job: whose chunks and segments.
        index: where each result is.
        inputs: names and types of the passed-through columns.
        end: what becomes of rows without a result; None leaves them out as missing.
    """

    def __init__(
        self,
        job: JobFolder,
        index: Index,
        inputs: passthrough.Schema,
        end: RowEnd | None = None,
    ) -> None:
        self.missing = 0
        self.ended = 0  # rows without a result that `end` was said of
        self.used = 0
        self._end = end
        self._job = job
        self._index = index
        self._inputs = inputs

    @property
    def expired(self) -> int:
        """Rows that the job's deadline made error rows."""
        return self.ended if self._end is not None and self._end.code == DEADLINE else 0

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
        names = [*chunks.SCHEMA.names, *(_INPUT + name for name in self._inputs.types)]
        return pa.table([*table.select(chunks.SCHEMA.names).columns, *values], names)

    def _group(self, asked: pa.Table) -> Group:
        positions = array("q")  # of each output row: the row of `asked`
        # Its segment and row there, or (-1, sample): a bad row or one that came to its end.
        places: list[tuple[int, int]] = []
        ids, marks, samples = (
            asked.column(name).to_pylist() for name in ("custom_id", "fingerprint", "samples")
        )
        for position, (name, mark, count) in enumerate(zip(ids, marks, samples, strict=True)):
            if count == 0:
                positions.append(position)
                places.append((_NOWHERE, 0))
            for sample in range(count):
                place = self._index.place((name, mark, sample))
                if place is not None:
                    self.used += 1
                elif self._end is not None:
                    self.ended += 1
                    place = (0, _NOWHERE, sample)
                else:
                    self.missing += 1
                    continue
                positions.append(position)
                places.append(place[1:])
        chosen = asked.take(pa.array(positions, pa.int64()))
        results = self._results(places, chosen)
        first_input = len(chunks.SCHEMA)
        inputs = chosen.select(range(first_input, chosen.num_columns))
        inputs = inputs.rename_columns(list(self._inputs.types))
        return Group(results, inputs, chosen.column("line"), chosen.column("request"))

    def _results(self, places: list[tuple[int, int]], chosen: pa.Table) -> pa.Table:
        """The result columns of the chosen rows: each from its segment, or made here."""
        of_segment: dict[int, list[tuple[int, int]]] = {}  # (row there, row of the output)
        for position, (number, row) in enumerate(places):
            of_segment.setdefault(number, []).append((row, position))
        nowhere = of_segment.pop(_NOWHERE, [])
        order = [position for _, position in nowhere]
        pieces = [self._without_result(chosen.take(pa.array(order, pa.int64())), nowhere)]
        for number, pairs in of_segment.items():
            name = self._index.names[number]
            with reading(self._job.folder, name) as file:
                segment = read_parquet(file)
            pieces.append(in_schema(segment.take(pa.array([row for row, _ in pairs]))))
            order += [position for _, position in pairs]
        results = pa.concat_tables(pieces).take(pc.array_sort_indices(pa.array(order, pa.int64())))
        # A row may have moved in the input since it was decoded.
        at = SCHEMA.get_field_index("prompt_index")
        return results.set_column(at, SCHEMA.field(at), chosen.column("prompt_index"))

    def _without_result(self, rows: pa.Table, samples: list[tuple[int, int]]) -> pa.Table:
        """Result rows of input rows that no worker has decoded: bad ones, or come to their end."""
        manifest, end = self._job.manifest, self._end
        marks = [mark or None for mark in rows.column("fingerprint").to_pylist()]  # None: bad
        codes, messages = rows.column("error_code"), rows.column("error_message")
        reasons = ["error"] * rows.num_rows
        if end is not None:
            reasons = [end.finish_reason if mark else "error" for mark in marks]
            codes = pc.fill_null(codes, end.code)
            messages = pc.fill_null(messages, end.message)
        known = {
            "custom_id": rows.column("custom_id"),
            "sample_index": [sample for sample, _ in samples],
            "prompt_index": rows.column("prompt_index"),
            "finish_reason": reasons,
            "error_code": codes,
            "error_message": messages,
            "attempts": [0] * rows.num_rows,
            "model": [manifest.model] * rows.num_rows,
            "task": [manifest.task] * rows.num_rows,
            "request_fingerprint": marks,
        }
        nothing = [None] * rows.num_rows
        return pa.table([known.get(name, nothing) for name in SCHEMA.names], schema=SCHEMA)
