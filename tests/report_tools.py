"""What tests of reports share: a job with a life of its own, and a browser that looks at pages."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from job_tools import Result, result, write_lines

from trbatch.config import JobSpec
from trbatch.engine.sequence import Completion
from trbatch.job import JobFolder
from trbatch.results import result_row
from trbatch.segments import SegmentWriter

BEGAN = 1_790_000_000.0  # Unix seconds
CATEGORIES = ("writing", "coding", "math", "translation", None)
HOSTILE = '<script>document.title="taken"</script><img src=x onerror="alert(1)">&"\'\u202e'


def make_job(folder: Path, rows: int = 240, *, hostile: str = "", **settings: Any) -> JobFolder:
    """A job of which two workers have decoded everything: slowly at first, with a pause of hours.

    Every 40th row has failed, and the input has a bad row more. `hostile` is put into all texts
    that come from rows.
    """
    values = [
        {
            "id": f"row {i}{hostile}",
            "prompt": f"Prompt {i}.",
            "category": _category(i, hostile),
        }
        for i in range(rows)
    ]
    name = settings.setdefault("name", "nightly-2026-11-22")
    file = write_lines(folder / f"{name}.jsonl", *values, f"no JSON {hostile}")
    base = {"input": str(file), "out": str(folder / "store"), "model": "org/model-7b"}
    job = JobFolder.submit(JobSpec(**(base | {"chunk_size": 16} | settings)))
    clock = _Clock(job)
    for index in range(job.manifest.chunks):
        if index == job.manifest.chunks // 2:
            clock.sleep(3 * 3600.0)
        clock.decode(index)
    return job


def _category(number: int, hostile: str) -> str | None:
    found = CATEGORIES[number % len(CATEGORIES)]
    return f"{found}{hostile}" if found else None


class _Clock:
    """Two workers with a time of their own; the matrix warms with every row."""

    def __init__(self, job: JobFolder) -> None:
        self._job, self._draw, self._now = job, random.Random(7), BEGAN
        writers = {w: SegmentWriter(job.folder, lambda: self._now) for w in ("gpu-a", "gpu-b")}
        self._writers = writers
        self._done, self._took = 0, 0.0

    def sleep(self, seconds: float) -> None:
        self._now += seconds

    def decode(self, chunk: int) -> None:
        worker = ("gpu-a", "gpu-b")[chunk % 2]
        self._took = 4.0 + 4.0 * self._draw.random()  # a worker's time for a chunk is twice that
        self._now += self._took
        rows, steps = [], Counter[tuple[int, int]]()
        for row, sample in self._job.missing(chunk):
            self._done += 1
            rows.append(self._row(row, sample, worker))
            batch = self._draw.choice((16, 16, 16, 8, 2))
            steps[(batch, self._draw.choice((1, 4, 6, 8) if batch > 4 else (8, 16, 24)))] += 9
        facts = {"dtype": "bfloat16", "device": "NVIDIA H100"}
        if rows:
            self._writers[worker].publish(worker, rows, facts, steps)

    def _row(self, row: Any, sample: int, worker: str) -> Result:
        known = {
            "worker": worker,
            "finished_at": self._now - 1.6 * self._took * self._draw.random(),
        }
        if row.prompt_index % 40 == 7:
            failed = {"finish_reason": "error", "text": None, "completion_tokens": 0}
            nothing = ("decode_s", "prefill_s", "speedup", "num_spec_steps", "tokens_per_s")
            message = f"the prompt has 9,000 tokens{row.custom_id.removeprefix('row ')}"
            return (
                result(self._job, row, sample)
                | dict.fromkeys(nothing)
                | {"error_code": "prompt_too_long", "error_message": message}
                | {"mean_acceptance_length": None, "acceptance_histogram": []}
                | {"num_draft_tokens": 0, "num_accepted_draft_tokens": 0}
                | failed
                | known
            )
        warmth = min(1.0, self._done / 150)
        weights = [
            1.6 - warmth,
            1.0,
            0.4 + warmth,
            0.2 + warmth,
            warmth,
            0.6 * warmth,
            0.3,
            0.2,
            0.1,
        ]
        histogram = [0] * len(weights)
        for index in self._draw.choices(range(len(weights)), weights, k=self._draw.randint(5, 30)):
            histogram[index] += 1
        while histogram and not histogram[-1]:
            histogram.pop()
        forwards = sum(histogram)
        tokens = sum((i + 1) * n for i, n in enumerate(histogram)) + 1
        decode_s = forwards * 0.4 * (0.8 + 0.4 * self._draw.random())
        loops = row.prompt_index % 6 == 4 and tokens > 40
        ids = [1] * tokens if loops else list(range(tokens))
        completion = Completion(
            key=0, finish_reason="stop", text="text", token_ids=ids, prompt_tokens=30,
            sample_index=sample, prefill_s=0.03, decode_s=decode_s, num_spec_steps=forwards,
            baseline_decode_s=(tokens - 1) * 0.22, num_draft_tokens=forwards * 7,
            num_accepted_draft_tokens=tokens - 1 - forwards, acceptance_histogram=histogram,
        )  # fmt: skip
        made = result(self._job, row, sample)
        own = result_row(completion, row, model="org/model-7b", task="t", worker=worker, attempts=1)
        return made | own | known


class Page(HTMLParser):
    """The tables, texts and elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}  # by the id of what they stand in
        self.titles: dict[str, list[str]] = {}  # of shapes, by the same
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.words = ""
        self._id = ""
        self._cell: list[str] | None = None
        self._title: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self._id = dict(attrs).get("id") or self._id
        if tag == "tr":
            self.tables.setdefault(self._id, []).append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "title":
            self._title = []

    def handle_data(self, data: str) -> None:
        self.words += data
        for kept in (self._cell, self._title):
            if kept is not None:
                kept.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._id][-1].append("".join(self._cell))
            self._cell = None
        elif tag == "title" and self._title is not None:
            self.titles.setdefault(self._id, []).append("".join(self._title))
            self._title = None


def browser() -> str:
    """A headless Chromium; the test is skipped where there is none."""
    wanted = os.environ.get("TRBATCH_TEST_BROWSER")
    for name in [wanted] if wanted else ["chromium", "google-chrome"]:
        if found := shutil.which(name):
            return found
    pytest.skip("no browser: install chromium, or name one in TRBATCH_TEST_BROWSER")


def look(page: Path, output: Path, *flags: str, width: int = 1200, height: int = 900) -> Path:
    """Have the browser show a page and write what it sees: a .png, a .pdf, or .html of its DOM."""
    how = {".png": f"--screenshot={output}", ".pdf": f"--print-to-pdf={output}"}
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
        "--no-pdf-header-footer", f"--user-data-dir={output}.profile",
        f"--window-size={width},{height}", how.get(output.suffix, "--dump-dom"), *flags,
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    if output.suffix == ".html":
        output.write_bytes(done.stdout)
    shutil.rmtree(f"{output}.profile", ignore_errors=True)
    assert output.is_file(), done.stderr.decode(errors="replace")[-2000:]
    return output
