"""Segments: finished rows in immutable files of their own, and the ledger of what they hold.

A segment's name is `<worker>-<token>-<microseconds>.parquet`: unique, and ordered by its last part,
the time when it was published. Its footer carries the sums over its rows, so that progress needs no
rows.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from trbatch.errors import JobFailed
from trbatch.figures import Figures
from trbatch.keymap import KeyMap
from trbatch.naming import slug
from trbatch.parquet_files import open_parquet, read_parquet
from trbatch.retries import Retries
from trbatch.schema import KEY_COLUMNS, SCHEMA, Key
from trbatch.storage import Folder
from trbatch.trace import Span, Steps, Trace

FOLDER = "segments"
T = TypeVar("T")

_FIGURES = b"trbatch.figures"
_SPAN = b"trbatch.span"
_FACTS = b"trbatch.facts"
_TRACE = b"trbatch.trace"
_NOT_DONE = frozenset({"cancelled", ""})


class SegmentWriter:
    """Publishes segments under names that nobody else makes."""

    def __init__(self, job: Folder, now: Callable[[], float] = time.time) -> None:
        self._job = job
        self._now = now
        self._token = secrets.token_hex(4)
        self._last = 0  # microseconds
        self._reached = 0.0  # the end of the last span, Unix seconds

    def publish(
        self,
        worker: str,
        rows: Sequence[Mapping[str, Any]],
        facts: Mapping[str, str],
        steps: Steps | None = None,
    ) -> str:
        """Write one segment. Returns its file name. `steps`: of the engine since the last one."""
        assert rows, "a segment holds at least one row"
        unknown = set().union(*rows) - set(SCHEMA.names)
        assert not unknown, f"no such result columns: {sorted(unknown)}"
        ended = max(int(self._now() * 1e6), self._last + 1)
        work = _work_on(rows, ended / 1e6)
        longest, span = max(took for _, took in work), self._span(work)
        trace = Trace.of(worker, span, steps or {}, longest)
        metadata = footer(Figures.of(rows), span, facts, trace)
        table = pa.Table.from_pylist(list(rows), SCHEMA).replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        name = segment_name(worker, self._token, ended)
        self._job.write(f"{FOLDER}/{name}", memoryview(sink.getvalue()))
        self._last, self._reached = ended, span[1]
        return name

    def _span(self, work: Sequence[tuple[float, float]]) -> Span:
        """From when the first of the rows began until the last one was done, Unix seconds.

        Not before the span before has ended: spans of one writer tile its time, so that the rows of
        some of them over the length of these are a pace.
        """
        end = max(self._reached, max(done for done, _ in work))
        return max(self._reached, min(done - took for done, took in work)), end


def _work_on(rows: Sequence[Mapping[str, Any]], now: float) -> list[tuple[float, float]]:
    """When each row was done, Unix seconds (`now` if it is not said), and how many it took."""
    return [
        (
            min(row.get("finished_at") or now, now),
            (row.get("prefill_s") or 0.0) + (row.get("decode_s") or 0.0),
        )
        for row in rows
    ]


def footer(
    figures: Figures, span: tuple[float, float], facts: Mapping[str, str], trace: Trace
) -> dict[bytes, bytes]:
    """What a segment's file says of itself.

    Args:
        figures: sums over its rows.
        span: when the work on them began and ended, Unix seconds.
        facts: of the engine, e.g. its dtype.
        trace: which workers, when, and in what steps.
    """
    return {
        _FIGURES: orjson.dumps(figures.to_dict()),
        _SPAN: orjson.dumps(span),
        _FACTS: orjson.dumps(dict(facts)),
        _TRACE: trace.to_json(),
    }


def segment_name(worker: str, token: str, ended: int) -> str:
    """The file name of a segment that was ended at this Unix time in microseconds."""
    return f"{slug(worker)}-{token}-{ended:016d}.parquet"


def ordered(names: Iterable[str]) -> list[str]:
    """Segment names by time of publication, oldest first."""
    return sorted(names, key=lambda name: (published(name), name))


def published(name: str) -> int:
    """When a segment was published, Unix time in microseconds; 0 if its name does not tell."""
    digits = name.removesuffix(".parquet").rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def consistently(names: Callable[[], list[str]], read: Callable[[list[str]], T]) -> T:
    """What `read` makes of the segments' names; once more if some went away meanwhile.

    `prune` puts few segments in the place of many.
    """
    for _ in range(3):
        try:
            return read(names())
        except FileNotFoundError:
            continue
    return read(names())


@contextmanager
def reading(job: Folder, name: str) -> Iterator[BinaryIO]:
    """A segment for reading.

    Raises:
        JobFailed: it is damaged.
    """
    try:
        with job.open(f"{FOLDER}/{name}") as file:
            yield file
    except (pa.ArrowException, KeyError, orjson.JSONDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage's trouble; Arrow's own, of damage inside a page, has no number
        raise JobFailed(
            f"the segment {job.join(f'{FOLDER}/{name}')} is damaged: {error}",
            hint="remove it and resume the job: its rows are then decoded again",
        ) from error


class Footer(NamedTuple):
    """What one segment says of itself."""

    figures: Figures
    span: tuple[float, float]  # when the work on its rows began and ended, Unix seconds
    worker: str  # "" if several
    longest_s: float  # prefill and decoding of the row that took longest


class Ledger:
    """What the segments of a job hold; each segment is read once, however often one asks.

    A cancelled row counts as not done, and so does a failed one that is to be retried. A row that
    both failed and succeeded has succeeded.
    """

    def __init__(self, job: Folder) -> None:
        self._job = job
        self._outcomes = KeyMap()  # 0: succeeded, 1: failed
        self._read: set[str] = set()
        self._footers: dict[str, Footer] = {}
        self._failures: dict[str, Counter[str]] = {}
        self.retries = Retries(job)
        self._heeded = 0  # how many requests to retry the outcomes know of

    def names(self) -> list[str]:
        """The segments that there are now, oldest first."""
        return ordered(self._job.names(FOLDER))

    def refresh(self) -> list[str]:
        """Read the outcomes of new segments. Returns the segments that there are now."""
        self.retries.refresh()
        if len(self.retries) != self._heeded:  # others may have read them before
            self._outcomes, self._read = KeyMap(), set()
            self._heeded = len(self.retries)
        return consistently(self.names, self._read_new)

    def _read_new(self, names: list[str]) -> list[str]:
        for name in names:
            if name in self._read:
                continue
            with reading(self._job, name) as file:
                found = read_outcomes(file, partial(self.retries.void, name))
            self._outcomes.add(
                (key, reason == "error") for key, reason in found if reason not in _NOT_DONE
            )
            self._read.add(name)
        return names

    def __contains__(self, key: object) -> bool:
        """Whether a row of this `Key` is done, by the segments that the last `refresh` saw."""
        return self.succeeded(cast(Key, key)) is not None

    def succeeded(self, key: Key) -> bool | None:
        """Whether a row that is done has succeeded; None if it is not done."""
        outcome = self._outcomes.get(key)
        return None if outcome is None else outcome == 0

    def __len__(self) -> int:
        """Rows that are done, outdated ones included, by the last `refresh`."""
        return len(self._outcomes)

    def footers(self) -> list[Footer]:
        """Of each segment what it says of itself, oldest first."""
        return [footer for _, footer in consistently(self.names, self._named_footers)]

    def trace(self) -> Trace:
        """Which workers worked on the rows, when, and in what steps; reads every footer anew."""

        def read(names: list[str]) -> Trace:
            trace = Trace()
            for name in names:
                with reading(self._job, name) as file:
                    trace.add(_trace_in(name, open_parquet(file).metadata.metadata))
            return trace

        return consistently(self.names, read)

    def _named_footers(self, names: list[str]) -> list[tuple[str, Footer]]:
        for name in names:
            if name not in self._footers:
                with reading(self._job, name) as file:
                    self._footers[name] = _read_footer(name, file)
        return [(name, self._footers[name]) for name in names]

    def failures(self) -> dict[str, Counter[str]]:
        """Of each segment with failed rows that count: how many of which error code.

        Reads only segments whose footers tell of failures. A row that failed twice counts twice.
        """
        self.retries.refresh()
        return consistently(self.names, self._failures_in)

    def _failures_in(self, names: list[str]) -> dict[str, Counter[str]]:
        found = {}
        for name, footer in self._named_footers(names):
            if not footer.figures.rows_failed:
                continue
            if name not in self._failures:
                with reading(self._job, name) as file:
                    self._failures[name] = Counter(_failed_codes(file))
            counts = self._failures[name]
            kept = {c: n for c, n in counts.items() if not self.retries.void(name, c)}
            if kept:
                found[name] = Counter(kept)
        return found

    def facts(self) -> dict[str, list[str]]:
        """What workers said of themselves, e.g. {"dtype": ["bfloat16"]}: all distinct values."""
        found: dict[str, set[str]] = {}
        for name in self.names():
            with reading(self._job, name) as file:
                metadata = open_parquet(file).metadata.metadata
            for key, value in orjson.loads(metadata[_FACTS]).items():
                found.setdefault(key, set()).add(value)
        return {key: sorted(values) for key, values in found.items()}


def read_outcomes(file: BinaryIO, void: Callable[[str | None], bool]) -> list[tuple[Key, str]]:
    """Key and finish reason of each row of a segment, in its order.

    Args:
        void: whether a failure of this error code is to be retried; its reason becomes "".
    """
    columns = [*KEY_COLUMNS, "finish_reason", "error_code"]
    table = read_parquet(file, columns)
    ids, marks, samples, reasons, codes = (table[name].to_pylist() for name in columns)
    if "error" in reasons:
        pairs = zip(reasons, codes, strict=True)
        reasons = ["" if r == "error" and void(code) else r for r, code in pairs]
    return list(zip(zip(ids, marks, samples, strict=True), reasons, strict=True))


def _failed_codes(file: BinaryIO) -> list[str]:
    table = read_parquet(file, ["finish_reason", "error_code"])
    pairs = zip(table["finish_reason"].to_pylist(), table["error_code"].to_pylist(), strict=True)
    return [code or "" for reason, code in pairs if reason == "error"]


def _read_footer(name: str, file: BinaryIO) -> Footer:
    metadata = open_parquet(file).metadata.metadata
    start, end = orjson.loads(metadata[_SPAN])
    trace = _trace_in(name, metadata)
    worker = next(iter(trace.spans)) if len(trace.spans) == 1 else ""
    return Footer(
        Figures(**orjson.loads(metadata[_FIGURES])), (start, end), worker, trace.longest_s
    )


def _trace_in(name: str, metadata: Mapping[bytes, bytes]) -> Trace:
    """The trace of a segment; of one without, which an earlier version wrote, only when."""
    if _TRACE in metadata:
        return Trace.from_json(metadata[_TRACE])
    start, end = orjson.loads(metadata[_SPAN])
    return Trace.of(name.rsplit("-", 2)[0], (start, end), {}, 0.0)
