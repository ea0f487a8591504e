"""A worker when things break round it: engine, files, storage, queue server."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for
from worker_tools import (
    Background,
    EchoEngine,
    Loaded,
    config,
    expected,
    rows_of,
    submit,
    texts_of,
)

from trbatch.errors import TrbatchError, Unreachable
from trbatch.job import JobFolder
from trbatch.queue import JobQueue
from trbatch.worker import run_worker


def test_an_engine_that_raises_ends_the_worker_and_costs_no_row(
    jobs: JobQueue, tmp_path: Path
) -> None:
    def fragile() -> EchoEngine:
        engine = EchoEngine(capacity=2)
        engine.fail_at_step = 6
        return engine

    job = submit(jobs, tmp_path, 20)
    with pytest.raises(TrbatchError, match="the engine failed: RuntimeError: device on fire"):
        run_worker(config(jobs.url), load=Loaded(fragile))
    counts = jobs.counts(job)
    assert counts.started == counts.failed == 0, "a retry is left for each chunk"
    assert len(texts_of(job)) > 0
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(job) == expected(20)
    assert {row["attempts"] for row in rows_of(job)} == {1, 2}


def test_a_chunk_that_cannot_be_read_fails_alone(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 12)
    (Path(job.path) / job.manifest.chunk_name(1)).write_bytes(b"this is not Parquet")
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert set(texts_of(job)) == {*range(4), *range(8, 12)}
    assert list(jobs.failures(job)) == [1]


def test_a_job_folder_outside_the_allowed_ones_is_not_read(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 4)
    run_worker(config(jobs.url, roots=(str(tmp_path / "elsewhere"),)), load=Loaded())
    assert rows_of(job) == []
    assert "outside what this worker may read" in jobs.failures(job)[0]
    jobs.enqueue(job, [0])
    run_worker(config(jobs.url, roots=(str(tmp_path),)), load=Loaded())
    assert texts_of(job) == expected(4)


def test_a_path_that_climbs_out_of_an_allowed_folder_is_not_read(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 4)
    climbing = tmp_path / "allowed" / ".." / "store" / job.id

    class Disguised:
        id, manifest, path = job.id, job.manifest, str(climbing)

    (tmp_path / "allowed").mkdir()
    jobs.enqueue(Disguised(), [0])
    run_worker(config(jobs.url, roots=(str(tmp_path / "allowed"),)), load=Loaded())
    assert rows_of(job) == []


def test_chunks_of_an_older_generation_are_passed_over(jobs: JobQueue, tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"say {i}"} for i in range(6)]
    submit(jobs, tmp_path, rows)
    rows += [{"id": f"r{i}", "prompt": f"say {i}"} for i in range(6, 10)]
    grown = submit(jobs, tmp_path, rows)
    assert grown.manifest.generation > 0
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(grown) == {i: f"SAY {i} #0" for i in range(10)}
    assert jobs.counts(grown).open == 0


def test_a_storage_that_fails_for_a_moment_loses_nothing(
    jobs: JobQueue,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = submit(jobs, tmp_path, 12)
    publish, failures = JobFolder.publish, [OSError("no space left"), Unreachable("no network")]

    def sometimes(self: JobFolder, *args: Any, **settings: Any) -> str:
        if failures:
            raise failures.pop()
        return publish(self, *args, **settings)

    monkeypatch.setattr(JobFolder, "publish", sometimes)
    with caplog.at_level(logging.WARNING):
        assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(job) == expected(12)
    assert "no space left" in caplog.text


def test_matrices_that_cannot_be_saved_stop_nothing(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: EchoEngine) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(EchoEngine, "save_tasks", full)
    job = submit(jobs, tmp_path, 8)
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    assert texts_of(job) == expected(8)


def test_the_queue_server_may_be_killed_and_started_again(jobs: JobQueue, tmp_path: Path) -> None:
    from trbatch import server

    job = submit(jobs, tmp_path, 40)
    load = Loaded(lambda: EchoEngine(capacity=2, step_s=0.03))
    worker = Background(jobs.url, load)
    wait_for(lambda: jobs.counts(job).finished >= 1)
    time.sleep(1.1)  # the log is synced every second
    os.kill(server.status().pid, signal.SIGKILL)
    time.sleep(0.5)
    server.ensure()
    wait_for(lambda: jobs.counts(job).finished == 10, timeout=30)
    worker.stop()
    assert set(texts_of(job)) == set(range(40))


def test_two_workers_share_a_job_without_doubling_a_row(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 60, chunk_size=2)
    workers = [
        Background(jobs.url, Loaded(lambda: EchoEngine(capacity=2, step_s=0.01))) for _ in range(2)
    ]
    wait_for(lambda: jobs.counts(job).finished == 30, timeout=30)
    for worker in workers:
        worker.stop()
    assert texts_of(job) == expected(60)
    assert len({row["worker"] for row in rows_of(job)}) == 2


def test_the_worker_module_imports_no_torch() -> None:
    code = "import sys, trbatch.worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
