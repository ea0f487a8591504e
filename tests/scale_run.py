"""One role in the life of a big job, in a process of its own, so that its memory is its own.

    python scale_run.py submit INPUT JOB | work JOB | collect JOB OUTPUT

Prints a line of JSON: seconds, and resident memory in bytes: at the start (everything imported, a
small job done), the highest, and for a worker at several points on the way.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trbatch import api
from trbatch.config import WorkerConfig
from trbatch.engine.sequence import Completion, Request, TaskKey
from trbatch.worker import run_worker

MODEL = "org/instant"


class InstantEngine:
    """Answers a thousand requests a step, at once, and notes how much memory the process has."""

    capacity = 1024
    copies = None
    steps: Mapping[tuple[int, int], int] = {}  # nobody asks of what kind

    def __init__(self) -> None:
        self.rows = 0
        # Rows answered, bytes resident, small objects alive (what no fragmentation changes).
        self.memory: list[tuple[int, int, int]] = []
        self._waiting: deque[Request] = deque()

    @property
    def unfinished(self) -> int:
        return len(self._waiting)

    def open_task(self, key: TaskKey) -> None: ...

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def add_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.add(request)

    def step(self) -> list[Completion]:
        count = min(self.capacity, len(self._waiting))
        before = self.rows // 10_000
        self.rows += count
        if self.rows // 10_000 > before:
            self.memory.append((self.rows, resident(), sys.getallocatedblocks()))
        return [self._answer(self._waiting.popleft()) for _ in range(count)]

    def abort(self, keys: Iterable[Hashable]) -> None: ...

    def save_tasks(self) -> None: ...

    def stats(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def _answer(request: Request) -> Completion:
        return Completion(
            key=request.key,
            finish_reason="stop",
            text="an answer of a few words",
            token_ids=[5, 6, 7, 8],
            seed=request.seed,
            sample_index=request.sample_index,
            num_spec_steps=2,
            acceptance_histogram=[1, 1],
        )


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest() -> int:
    """The most bytes that this process has held.

    From /proc: `ru_maxrss` is kept across exec, and would count what a big parent held.
    """
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def warm_up() -> None:
    """Do everything once, small, so that what it imports and allocates is there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "warm.jsonl")
        path.write_text("".join(f'{{"prompt": "warm {i}"}}\n' for i in range(2000)))
        job = api.submit(path, model="org/warm", out=folder)
        job.status()
        run_worker(WorkerConfig(model="org/warm", burst=True), load=lambda model: InstantEngine())
        job.wait(timeout=60)
        job.collect()


def main(role: str, *arguments: str) -> dict[str, Any]:
    warm_up()
    found: dict[str, Any] = {"start": resident()}
    begin = time.perf_counter()
    if role == "submit":
        job = api.submit(arguments[0], model=MODEL, name=arguments[1])
        found["chunks"] = job.folder.manifest.chunks
    elif role == "work":
        engine = InstantEngine()
        found["code"] = run_worker(WorkerConfig(model=MODEL, burst=True), load=lambda model: engine)
        found |= {"rows": engine.rows, "memory": engine.memory}
    else:
        status = api.wait(arguments[0], timeout=600)
        found["wait_s"] = time.perf_counter() - begin
        found["after_wait"] = resident()
        receipt = api.collect(arguments[0], arguments[1])
        found |= {"words": str(receipt), "state": status.state}
    return found | {"seconds": time.perf_counter() - begin, "highest": highest()}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
