"""What tests of supervised workers share: jobs for engines that echo, workers as real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from trbatch.config import JobSpec
from trbatch.job import JobFolder
from trbatch.queue import JobQueue

MODEL = "maker/echo"
ECHO = Path(__file__).with_name("echo_worker.py")
ROOT = Path(__file__).parent.parent


def submit(jobs: JobQueue, folder: Path, prompts: list[str], **settings: Any) -> JobFolder:
    """A job of these prompts, in chunks of 8 unless told."""
    name = settings.setdefault("name", "job")
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    values = {"model": MODEL, "chunk_size": 8, "out": str(folder / "store")} | settings
    job = JobFolder.submit(JobSpec(input=str(file), **values))
    jobs.enqueue(job, job.missing_chunks())
    return job


class Supervised:
    """`trbatch worker` with the echo engine, as a process with a child."""

    def __init__(
        self, url: str, log: Path, *arguments: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        surroundings = {"PYTHONPATH": str(ROOT), "TRBATCH_REDIS_URL": url, **(env or {})}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(ECHO), "worker", "--publish-seconds=0.1", *arguments],
                stdin=subprocess.DEVNULL,
                stderr=file,
                env=os.environ | surroundings,
            )

    @property
    def words(self) -> str:
        return self.log.read_text()

    def children(self) -> list[int]:
        """Pids of the workers that live."""
        tasks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return [int(pid) for pid in tasks.read_text().split()]
        except FileNotFoundError:
            return []

    def wait(self, timeout: float = 60.0) -> int:
        return self.process.wait(timeout)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@contextlib.contextmanager
def supervised(
    url: str, log: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> Iterator[Supervised]:
    found = Supervised(url, log, *arguments, env=env)
    try:
        yield found
    except BaseException as error:
        error.add_note(f"what the worker said:\n{found.words[-5000:]}")
        raise
    finally:
        found.stop()


def rows_of(job: JobFolder) -> list[dict[str, Any]]:
    """Every row of every segment, duplicates included."""
    files = sorted((Path(job.path) / "segments").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False
