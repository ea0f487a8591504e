"""The disk of the queue's server is full: it refuses every write, and costs nothing but time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner
from disks import Disk, Mounted, small_disk
from redis_server import redis_server
from supervised import MODEL, rows_of, submit, supervised
from waiting import wait_for

from trbatch import cli
from trbatch.errors import Unreachable
from trbatch.job import JobFolder
from trbatch.queue import JobQueue
from trbatch.results import collect


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", monkeypatch) as found:
        if not isinstance(found, Mounted):
            pytest.skip("mounting a small disk needs root")
        yield found


@pytest.fixture
def url(disk: Disk) -> Iterator[str]:
    with redis_server(disk.path, "--appendonly", "yes") as port:
        yield f"redis://127.0.0.1:{port}/0"


def fill(disk: Disk, url: str) -> None:
    """Until the server has noticed: its log is written every second."""
    disk.fill()
    with redis.Redis.from_url(url) as connection:

        def refuses() -> bool:
            try:
                connection.set("filler", bytes(1 << 16))
            except redis.ResponseError as error:
                return "MISCONF" in str(error)
            return False

        wait_for(refuses, timeout=20)


@pytest.mark.long
@pytest.mark.torture
def test_a_worker_waits_until_there_is_room_again(disk: Disk, url: str, tmp_path: Path) -> None:
    with JobQueue.connect(url, patient=True) as jobs:
        job = submit(jobs, tmp_path, [f"say {i}" for i in range(120)], chunk_size=60)
        root = f"--root={tmp_path}"
        with supervised(url, tmp_path / "log", root, env={"ECHO_STEP_S": "0.2"}) as worker:
            wait_for(lambda: len(rows_of(job)) >= 4)
            (child,) = worker.children()
            fill(disk, url)
            before = len(rows_of(job))
            wait_for(lambda: "MISCONF" in worker.words)
            assert len(rows_of(job)) > before, "what is finished needs no queue to be published"
            disk.free()
            wait_for(lambda: "can be used again" in worker.words)
            wait_for(lambda: jobs.counts(job).finished == 2, timeout=40)
            assert worker.children() == [child], "it was never replaced"
            assert "Traceback" not in worker.words
    receipt = collect(JobFolder.open(job.path), str(tmp_path / "out.parquet"))
    assert receipt.complete and receipt.rows_ok == 120


def test_submit_says_that_the_queue_has_no_room(
    disk: Disk, url: str, tmp_path: Path, home: Path
) -> None:
    fill(disk, url)
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"prompt": "say it"}) + "\n")
    done = CliRunner().invoke(
        cli.commands, ["submit", str(file), "--model", MODEL, "--redis-url", url]
    )
    assert done.exit_code == Unreachable.exit_code
    assert "MISCONF" in done.stderr and "look for a full disk" in done.stderr
    assert "Traceback" not in done.stderr
