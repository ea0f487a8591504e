"""A big job: submitted fast, in little memory of client, queue and worker, each row once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
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


def lines_parsed_per_s(path: Path) -> float:
    """How quick this machine is at present."""
    with path.open("rb") as file:
        begin = time.perf_counter()
        lines = sum(1 for line in file if json.loads(line))
        return lines / (time.perf_counter() - begin)


def growth(values: list[int]) -> int:
    """How much more the least of the second half is than that of the first, its tenth left out.

    The first tenth fills what stays in use. What a worker holds between two publishings comes and
    goes, more of it on a quicker machine; at its least there is next to nothing of it.
    """
    tenth, half = len(values) // 10, len(values) // 2
    return min(values[half:]) - min(values[tenth:half])


def life(tmp_path: Path, url: str, rows: int) -> dict[str, Any]:
    """Submit, drain and collect a job; everything that is measured on the way."""
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.parquet"
    write_prompts(prompts, rows)
    with redis.Redis.from_url(url) as client:
        before = client.info("memory")["used_memory"]
        parsed = lines_parsed_per_s(prompts)
        submitted = run("submit", prompts, "big")
        queued = client.info("memory")["used_memory"] - before
        worked = run("work")
        after = client.info("memory")
    collected = run("collect", "big", answers)
    figures = {
        "rows": rows,
        "json.loads, lines/s": round(parsed),
        "submit, rows/s": round(rows / submitted["seconds"]),
        "submit, bytes a row": round((submitted["highest"] - submitted["start"]) / rows, 1),
        "redis after submit, MiB": round(queued / MIB, 2),
        "redis at most, MiB": round((after["used_memory_peak"] - before) / MIB, 2),
        "worker, rows/s": round(rows / worked["seconds"]),
        "worker memory, MiB": {
            n: round(held / MIB, 1)
            for n, held, _ in worked["memory"][:: max(1, len(worked["memory"]) // 10)]
        },
        "worker growth, MiB": round(growth([held for _, held, _ in worked["memory"]]) / MIB, 1),
        "worker growth, objects": growth([alive for _, _, alive in worked["memory"]]),
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
@pytest.mark.alone
@pytest.mark.torture
def test_a_job_of_a_million_rows_is_drained_in_little_memory(
    tmp_path: Path, redis_url: str
) -> None:
    """The promises: 50,000 rows/s submitted, 24 bytes a row of client memory, 20 MB of Redis; a
    worker grows by what it knows of rows that are done, 24 bytes each, in no objects of their own.
    """
    rows = 1_000_000
    figures = life(tmp_path, redis_url, rows)
    # A seventh of the rate of json.loads alone: what a machine in its slow hours is measured by.
    assert figures["submit, rows/s"] > min(50_000, figures["json.loads, lines/s"] / 7)
    assert figures["submit, bytes a row"] <= 24
    assert figures["redis at most, MiB"] * MIB <= 20e6
    # One object for each of the half million rows would be 500,000. Of rows in flight there are a
    # thousand more or less whenever one looks, of some 25 objects each: it was -2,000 and 26,500.
    assert figures["worker growth, objects"] < rows / 10
    # 12 MiB for half of the rows; the rest is what allocators keep of a busier moment. It was 17
    # where 9,000 rows/s went through, and may have been 40 with 16,000.
    assert figures["worker growth, MiB"] * MIB < 24 * rows / 2 + 64 * MIB
    memory = list(figures["worker memory, MiB"].values())
    assert max(memory[1:]) - min(memory[1:]) < 128  # MiB: two seconds of rows, being published
