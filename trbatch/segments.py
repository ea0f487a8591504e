"""Segments: finished rows in immutable files of their own, and the ledger of what they hold.

A segment's name is `<worker>-<token>-<microseconds>.parquet`: unique, and ordered by its last part,
the time when it was published. Its footer carries the sums over its rows, so that progress needs no
rows.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from trbatch.errors import JobFailed
from trbatch.figures import Figures
from trbatch.naming import slug
from trbatch.schema import KEY_COLUMNS, SCHEMA, Key
from trbatch.storage import Folder

FOLDER = "segments"

_FIGURES = b"trbatch.figures"
_SPAN = b"trbatch.span"
_FACTS = b"trbatch.facts"


class SegmentWriter:
    """Publishes segments under names that nobody else makes."""

    def __init__(self, job: Folder, now: Callable[[], float] = time.time) -> None:
        self._job = job
        self._now = now
        self._token = secrets.token_hex(4)
        self._last = 0  # microseconds

    def publish(
        self, worker: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]
    ) -> str:
        """Write one segment. Returns its file name."""
        assert rows, "a segment holds at least one row"
        unknown = set().union(*rows) - set(SCHEMA.names)
        assert not unknown, f"no such result columns: {sorted(unknown)}"
        ended = max(int(self._now() * 1e6), self._last + 1)
        span = (self._started(rows, ended), ended / 1e6)
        metadata = {
            _FIGURES: orjson.dumps(Figures.of(rows).to_dict()),
            _SPAN: orjson.dumps(span),
            _FACTS: orjson.dumps(dict(facts)),
        }
        table = pa.Table.from_pylist(list(rows), SCHEMA).replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        name = f"{slug(worker)}-{self._token}-{ended:016d}.parquet"
        self._job.write(f"{FOLDER}/{name}", memoryview(sink.getvalue()))
        self._last = ended
        return name

    def _started(self, rows: Sequence[Mapping[str, Any]], ended: int) -> float:
        """When the work on these rows began, but not before the segment before."""
        longest = max((r.get("prefill_s") or 0.0) + (r.get("decode_s") or 0.0) for r in rows)
        return max(ended / 1e6 - longest, self._last / 1e6)


def ordered(names: Iterable[str]) -> list[str]:
    """Segment names by time of publication, oldest first."""
    return sorted(names, key=lambda name: (_published(name), name))


def _published(name: str) -> int:
    digits = name.removesuffix(".parquet").rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


@contextmanager
def reading(job: Folder, name: str) -> Iterator[BinaryIO]:
    """A segment for reading.

    Raises:
        JobFailed: it is damaged.
    """
    try:
        with job.open(f"{FOLDER}/{name}") as file:
            yield file
    except (pa.ArrowException, KeyError, orjson.JSONDecodeError) as error:
        raise JobFailed(
            f"the segment {job.join(f'{FOLDER}/{name}')} is damaged: {error}",
            hint="remove it and resume the job: its rows are then decoded again",
        ) from error


def read_outcomes(file: BinaryIO) -> list[tuple[Key, str]]:
    """Key and finish reason of each row of a segment, in its order."""
    columns = [*KEY_COLUMNS, "finish_reason"]
    table = pq.ParquetFile(file).read(columns=columns, use_threads=False)
    ids, marks, samples, reasons = (table[name].to_pylist() for name in columns)
    return list(zip(zip(ids, marks, samples, strict=True), reasons, strict=True))


class Ledger:
    """What the segments of a job hold; each segment is read once, however often one asks.

    A cancelled row counts as not done. A row that both failed and succeeded has succeeded.
    """

    def __init__(self, job: Folder) -> None:
        self._job = job
        self._outcomes: dict[Key, bool] = {}  # whether it succeeded
        self._read: set[str] = set()
        self._footers: dict[str, tuple[Figures, tuple[float, float]]] = {}

    def names(self) -> list[str]:
        """The segments that there are now, oldest first."""
        return ordered(self._job.names(FOLDER))

    def outcomes(self) -> Mapping[Key, bool]:
        """Whether each row that is done has succeeded."""
        for name in self.names():
            if name in self._read:
                continue
            with reading(self._job, name) as file:
                found = read_outcomes(file)
            for key, reason in found:
                if reason != "cancelled":
                    self._outcomes[key] = reason != "error" or self._outcomes.get(key, False)
            self._read.add(name)
        return self._outcomes

    def footers(self) -> list[tuple[Figures, tuple[float, float]]]:
        """Of each segment: the sums over its rows, and when the work on them began and ended."""
        names = self.names()
        for name in names:
            if name not in self._footers:
                with reading(self._job, name) as file:
                    self._footers[name] = _read_footer(file)
        return [self._footers[name] for name in names]

    def facts(self) -> dict[str, list[str]]:
        """What workers said of themselves, e.g. {"dtype": ["bfloat16"]}: all distinct values."""
        found: dict[str, set[str]] = {}
        for name in self.names():
            with reading(self._job, name) as file:
                metadata = pq.read_metadata(file).metadata
            for key, value in orjson.loads(metadata[_FACTS]).items():
                found.setdefault(key, set()).add(value)
        return {key: sorted(values) for key, values in found.items()}


def _read_footer(file: BinaryIO) -> tuple[Figures, tuple[float, float]]:
    metadata = pq.read_metadata(file).metadata
    start, end = orjson.loads(metadata[_SPAN])
    return Figures(**orjson.loads(metadata[_FIGURES])), (start, end)
