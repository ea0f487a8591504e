"""Many segments of a complete job into few: each row once, in input order.

The new ones are written and checked before an old one goes, so that a reader finds every row at any
time; `segments.consistently` is what it reads again by.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trbatch import passthrough
from trbatch.errors import JobFailed
from trbatch.figures import Figures, covered_seconds
from trbatch.job import JobFolder
from trbatch.joining import Index, Joiner
from trbatch.parquet_files import read_parquet
from trbatch.retries import FOLDER as RETRIES
from trbatch.schema import SCHEMA
from trbatch.segments import FOLDER, footer, published, segment_name
from trbatch.trace import Trace

SEGMENT_ROWS = 65_536  # about; whoever reads one holds it in memory

_COUNTED = [  # what `Figures.count` reads
    "finish_reason",
    "repetitive",
    "prompt_tokens",
    "completion_tokens",
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "decode_s",
    "speedup",
]


class Overtaken(JobFailed):
    """Another command has changed the job while it was compacted."""


def compact(job: JobFolder) -> int:
    """Put few segments, of `SEGMENT_ROWS` rows each, in the place of all. Returns how many went.

    Outdated and repeated rows are left out, and so are failed ones that were decoded again.

    Raises:
        Overtaken: another command has changed the job meanwhile; nothing was removed.
        JobFailed: rows are missing, or a new segment is not whole; nothing was removed.
    """
    made: dict[str, int] = {}  # rows of each new segment
    try:
        return _compact(job, made)
    except FileNotFoundError as error:
        _remove(job, FOLDER, list(made))
        raise Overtaken("is being compacted by another command") from error


def _compact(job: JobFolder, made: dict[str, int]) -> int:
    asked = job.folder.names(RETRIES)
    index = Index.of(job)
    joiner = Joiner(job, index, passthrough.Schema({}))
    spans = [footer.span for footer in job.ledger.footers()]
    trace = job.ledger.trace()  # of all, for the first of the new ones
    end = max(end for _, end in spans)
    busy = (end - covered_seconds(spans), end)
    facts = {key: ", ".join(values) for key, values in job.ledger.facts().items()}
    token, written = secrets.token_hex(4), max(map(published, index.names))
    for number, tables in enumerate(_portions(joiner)):
        name = segment_name("compact", token, written + number)
        span = busy if number == 0 else (end, end)
        metadata = footer(_figures(tables), span, facts, Trace() if number else trace)
        made[name] = _write(job, name, pa.concat_tables(tables), metadata)
    if joiner.missing:
        _remove(job, FOLDER, list(made))
        raise JobFailed(f"job {job.id} lacks {joiner.missing} rows and is not compacted")
    for name, rows in made.items():
        _check(job, name, rows)
    if not job.is_current():
        _remove(job, FOLDER, list(made))
        raise Overtaken("is being submitted with its input read anew")
    if set(job.folder.names(RETRIES)) - set(asked):
        _remove(job, FOLDER, list(made))
        raise Overtaken("has rows that are to be decoded again")
    _remove(job, FOLDER, index.names)
    _remove(job, RETRIES, asked)
    # Whoever asked in this very moment meant the failures that lie in the new ones now.
    job.ledger.retries.carry_over(asked, list(made))
    return len(index.names)


def needed(job: JobFolder) -> int:
    """How many segments a job of so many rows has at most when it is compact."""
    return max(1, math.ceil(sum(job.manifest.chunk_samples) / SEGMENT_ROWS))


def _portions(joiner: Joiner) -> Iterator[list[pa.Table]]:
    """The results of all rows that went to workers, some ten thousand at a time."""
    waiting: list[pa.Table] = []
    for group in joiner.groups():
        waiting.append(group.results.filter(pc.is_valid(group.results["request_fingerprint"])))
        if sum(table.num_rows for table in waiting) >= SEGMENT_ROWS:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _figures(tables: Sequence[pa.Table]) -> Figures:
    return Figures.of(row for table in tables for row in table.select(_COUNTED).to_pylist())


def _write(job: JobFolder, name: str, table: pa.Table, metadata: Mapping[bytes, bytes]) -> int:
    with job.folder.writing(f"{FOLDER}/{name}") as file:
        table = table.cast(SCHEMA).replace_schema_metadata(metadata)
        pq.write_table(table, file, compression="zstd")
    return int(table.num_rows)


def _check(job: JobFolder, name: str, rows: int) -> None:
    with job.folder.open(f"{FOLDER}/{name}") as file:
        try:
            found = read_parquet(file, ["custom_id"]).num_rows
        except pa.ArrowException as error:
            raise JobFailed(f"the new segment {name} cannot be read: {error}") from error
    if found != rows:
        raise JobFailed(f"the new segment {name} holds {found} rows instead of {rows}")


def _remove(job: JobFolder, below: str, names: Sequence[str]) -> None:
    for name in names:
        job.folder.remove(f"{below}/{name}")
