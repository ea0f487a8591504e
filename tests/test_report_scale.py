"""A report about very many rows: it streams, and its page stays small.

`TRBATCH_TEST_ROWS=1000000` makes it a million.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from trbatch.config import JobSpec
from trbatch.figures import Figures
from trbatch.job import JobFolder
from trbatch.results import SCHEMA
from trbatch.segments import FOLDER, footer, segment_name
from trbatch.trace import Trace

BEGAN = 1_790_000_000.0
COUNTED = ["finish_reason", "prompt_tokens", "completion_tokens", "num_spec_steps",
           "num_draft_tokens", "num_accepted_draft_tokens", "decode_s", "speedup"]  # fmt: skip

# In a process of its own, whose peak of memory is nobody else's.
MEASURE = """
import json, sys, time
from trbatch.job import JobFolder
from trbatch.reporting import make_report, write_report
import trbatch.report_page
begin = time.monotonic()
job = JobFolder.open(sys.argv[1])
def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
report = write_report(job, make_report(job, gpu_hour_price=2.0), sys.argv[2])
print(json.dumps({"before": before, "peak": peak(), "seconds": time.monotonic() - begin,
                  "rows": report.rows.total.rows, "categories": len(report.rows.categories),
                  "tokens": report.rows.total.completion_tokens}))
"""


def make_job(folder: Path, rows: int) -> JobFolder:
    """A job of so many rows in a thousand categories, with a segment a chunk."""
    file = folder / f"{rows}.jsonl"
    with file.open("wb") as out:
        for i in range(rows):
            row = {"id": f"row-{i:07}", "prompt": f"Prompt {i}.", "category": f"kind {i % 1000}"}
            out.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    store = str(folder / "store")
    job = JobFolder.submit(JobSpec(input=str(file), out=store, model="m", chunk_size=4096))
    for index in range(job.manifest.chunks):
        _decode(job, index)
    return job


def _decode(job: JobFolder, index: int) -> None:
    """A segment of a whole chunk, made column by column."""
    asked = job.chunk_table(index)
    count = asked.num_rows
    end = BEGAN + 8.0 * (index + 1)
    number = asked["prompt_index"].combine_chunks().cast(pa.float64())
    made = {
        "custom_id": asked["custom_id"],
        "prompt_index": asked["prompt_index"],
        "request_fingerprint": asked["fingerprint"],
        "finished_at": pc.subtract(end, pc.multiply(number, 1e-6)),
        "decode_s": pc.add(1.0, pc.multiply(number, 1e-6)),
    }
    constant = {
        "sample_index": 0, "text": "an answer of some length " * 8, "finish_reason": "stop",
        "prompt_tokens": 20, "completion_tokens": 41, "num_spec_steps": 16, "attempts": 1,
        "num_draft_tokens": 128, "num_accepted_draft_tokens": 24, "prefill_s": 0.1,
        "speedup": 1.9, "mean_acceptance_length": 2.5, "worker": f"gpu-{index % 8}", "seed": 1,
        "acceptance_histogram": [4, 6, 2, 2, 0, 2],
    }  # fmt: skip
    columns = [
        made[field.name]
        if field.name in made
        else pa.array([constant.get(field.name)] * count, field.type)
        for field in SCHEMA
    ]
    table = pa.table(columns, names=SCHEMA.names).cast(SCHEMA)
    figures = Figures.of(table.select(COUNTED).to_pylist())
    trace = Trace.of(f"gpu-{index % 8}", (end - 8.0, end), {(64, 4): 100, (1, 32): 3}, 2.0)
    metadata = footer(figures, (end - 8.0, end), {"dtype": "bfloat16"}, trace)
    name = segment_name(f"gpu-{index % 8}", "0" * 8, int(end * 1e6))
    place = Path(job.path) / FOLDER / name
    place.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), place, compression="zstd")


def measured(job: JobFolder, page: Path) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, job.path, str(page)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.long
@pytest.mark.alone
def test_many_rows_take_little_memory_and_make_a_small_page(tmp_path: Path) -> None:
    rows = int(os.environ.get("TRBATCH_TEST_ROWS", "250000"))
    few = measured(make_job(tmp_path, 50_000), tmp_path / "few.html")
    begin = time.monotonic()
    job = make_job(tmp_path, rows)
    print(f"made in {time.monotonic() - begin:.0f} s")
    many = measured(job, tmp_path / "many.html")
    size = (tmp_path / "many.html").stat().st_size
    print(json.dumps({"few": few, "many": many, "page": size}))
    assert (many["rows"], many["tokens"]) == (rows, 41 * rows)
    assert many["categories"] == 501, "the others are counted together"
    per_row = (many["peak"] - few["peak"]) / (rows - 50_000)
    assert per_row < 120, f"{per_row:.0f} bytes a row"
    assert many["peak"] - many["before"] < 400e6
    assert size < 200_000
