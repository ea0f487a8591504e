"""Many segments of a complete job into one: each row once, in input order.

The new segment is written and checked before an old one goes, so that a reader finds every row at
any time; `segments.consistently` is what it reads again by.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trbatch import passthrough
from trbatch.errors import JobFailed
from trbatch.figures import Figures, covered_seconds
from trbatch.job import JobFolder
from trbatch.joining import Index, Joiner
from trbatch.retries import FOLDER as RETRIES
from trbatch.schema import SCHEMA
from trbatch.segments import FOLDER, footer, published, segment_name

_COUNTED = [
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "decode_s",
    "speedup",
]


def compact(job: JobFolder) -> int:
    """Put one segment in the place of all. Returns how many went.

    Outdated and repeated rows are left out, and so are failed ones that were decoded again.

    Raises:
        JobFailed: rows are missing, or the new segment is not whole; nothing was removed.
    """
    asked = job.folder.names(RETRIES)
    index = Index.of(job)
    joiner = Joiner(job, index, passthrough.Schema({}))
    name = segment_name("compact", secrets.token_hex(4), max(map(published, index.names)))
    spans = [span for _, span in job.ledger.footers()]
    end = max(end for _, end in spans)
    facts = {key: ", ".join(values) for key, values in job.ledger.facts().items()}
    figures = Figures()
    with (
        job.folder.writing(f"{FOLDER}/{name}") as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer,
    ):
        for group in joiner.groups():
            rows = group.results.filter(pc.is_valid(group.results["request_fingerprint"]))
            writer.write_table(rows)
            for row in rows.select(_COUNTED).to_pylist():
                figures.count(row)
        if joiner.missing:
            raise JobFailed(f"job {job.id} lacks {joiner.missing} rows and is not compacted")
        metadata = footer(figures, (end - covered_seconds(spans), end), facts)
        writer.add_key_value_metadata(metadata)
    _check(job, name, joiner.used)
    _remove(job, FOLDER, index.names)
    _remove(job, RETRIES, asked)
    return len(index.names)


def _check(job: JobFolder, name: str, rows: int) -> None:
    with job.folder.open(f"{FOLDER}/{name}") as file:
        try:
            found = pq.read_table(file, columns=["custom_id"]).num_rows
        except pa.ArrowException as error:
            raise JobFailed(f"the new segment {name} cannot be read: {error}") from error
    if found != rows:
        raise JobFailed(f"the new segment {name} holds {found} rows instead of {rows}")


def _remove(job: JobFolder, below: str, names: Sequence[str]) -> None:
    for name in names:
        job.folder.remove(f"{below}/{name}")
