"""A big job: submitted fast, in little memory of client, queue and worker, each row once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import redis

SCRIPT = str(Path(__file__).with_name("scale_run.py"))
MIB = 1 << 20


def run(role: str, *arguments: str | Path) -> dict[str, Any]:
    command = [sys.executable, SCRIPT, role, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_prompts(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for i in range(rows):
            file.write(f'{{"id": "row-{i:07d}", "prompt": "Write a haiku about number {i}."}}\n')


def life(tmp_path: Path, url: str, rows: int) -> dict[str, Any]:
    """Submit, drain and collect a job; everything that is measured on the way."""
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.parquet"
    write_prompts(prompts, rows)
    with redis.Redis.from_url(url) as client:
        before = client.info("memory")["used_memory"]
        submitted = run("submit", prompts, "big")
        queued = client.info("memory")["used_memory"] - before
        worked = run("work")
        after = client.info("memory")
    collected = run("collect", "big", answers)
    figures = {
        "rows": rows,
        "submit, rows/s": round(rows / submitted["seconds"]),
        "submit, bytes a row": round((submitted["highest"] - submitted["start"]) / rows, 1),
        "redis after submit, MiB": round(queued / MIB, 2),
        "redis at most, MiB": round((after["used_memory_peak"] - before) / MIB, 2),
        "worker, rows/s": round(rows / worked["seconds"]),
        "worker memory, MiB": {
            n: round(held / MIB, 1)
            for n, held in worked["memory"][:: max(1, len(worked["memory"]) // 10)]
        },
        "wait, s": round(collected["wait_s"], 1),
        "collect, rows/s": round(rows / (collected["seconds"] - collected["wait_s"])),
        "wait, bytes a row": round((collected["after_wait"] - collected["start"]) / rows, 1),
        "collect, bytes a row": round((collected["highest"] - collected["start"]) / rows, 1),
    }
    print(json.dumps(figures))
    assert worked["rows"] == rows
    assert worked["code"] == 0
    assert collected["words"].startswith(f"complete: {rows} rows in = {rows} ok")
    table = pq.ParquetFile(answers)
    assert table.metadata.num_rows == rows
    return figures


def test_a_job_of_20_000_rows_is_drained_in_little_memory(tmp_path: Path, redis_url: str) -> None:
    figures = life(tmp_path, redis_url, 20_000)
    memory = list(figures["worker memory, MiB"].values())
    assert max(memory) - memory[0] < 48  # what Arrow and the allocator keep for later included
    assert figures["redis at most, MiB"] < 2


@pytest.mark.long
@pytest.mark.torture
def test_a_job_of_a_million_rows_is_drained_in_little_memory(
    tmp_path: Path, redis_url: str
) -> None:
    """The promises: 50,000 rows/s submitted, 24 bytes a row of client memory, 20 MB of Redis; a
    worker grows by what it knows of rows that are done.
    """
    rows = 1_000_000
    figures = life(tmp_path, redis_url, rows)
    assert figures["submit, rows/s"] > 50_000
    assert figures["submit, bytes a row"] <= 24
    assert figures["redis at most, MiB"] * MIB <= 20e6
    memory = list(figures["worker memory, MiB"].values())
    # The first tenth fills what stays in use; from then on it knows 24 bytes more of each row.
    # What it holds between two publishings comes and goes, so the least of each half is compared.
    assert (min(memory[5:]) - min(memory[1:5])) * MIB < 24 * rows + 4 * MIB
    assert max(memory[1:]) - min(memory[1:]) < 96  # MiB: two seconds of rows, as they are published
