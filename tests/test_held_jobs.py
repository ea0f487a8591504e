"""Chunks that owe no row, of held jobs and of older readings, hold up neither jobs nor beats."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from trbatch import api, holds, model_choice
from trbatch.chunk_lease import Lease
from trbatch.control import Control
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue
from workers import submit, work

pytestmark = pytest.mark.usefixtures("home")


def published(job: api.Job) -> list[str]:
    files = sorted((Path(job.path) / "segments").glob("*.parquet"))
    return [name for file in files for name in pq.read_table(file)["custom_id"].to_pylist()]


def expire(job: api.Job) -> None:
    Control(deadline=time.time() - 1, deadline_asked="then").write(job.folder.folder)


def test_an_expired_job_with_many_chunks_holds_up_no_other(tmp_path: Path) -> None:
    job = submit(tmp_path, 300, chunk_size=1)
    expire(job)
    other = submit(tmp_path, 4, name="other")
    work()
    assert len(published(other)) == 4
    assert published(job) == []
    with JobQueue.connect() as jobs:
        assert len(jobs.ids(job)) == 1, "one was taken, the others were taken out of the queue"


def test_a_job_that_is_taken_up_while_a_worker_clears_it_away_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, 12)
    expire(job)
    withdraw = holds.withdraw

    def taken_up_meanwhile(*arguments: Any) -> int:
        Control().write(job.folder.folder)
        return withdraw(*arguments)

    monkeypatch.setattr(holds, "withdraw", taken_up_meanwhile)
    work()
    assert job.status().state == "completed"


def test_chunks_of_the_same_name_in_another_store_stay_in_the_queue(tmp_path: Path) -> None:
    job = submit(tmp_path, 12, out=str(tmp_path / "one"))
    expire(job)
    other = submit(tmp_path, 12, out=str(tmp_path / "two"))
    work()
    assert published(job) == []
    assert len(published(other)) == 12


def test_a_worker_beats_between_chunks_that_owe_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"r{i}", "prompt": f"say {i}"} for i in range(60)]
    submit(tmp_path, rows, chunk_size=1)
    job = submit(tmp_path, [*rows, {"id": "new", "prompt": "say new"}], chunk_size=1)
    assert job.folder.manifest.generation == 1, "the first 60 chunks are of an older reading"
    monkeypatch.setattr(model_choice, "TAKE_S", 0.05)
    take, most = LeaseWorker.take_first, 0

    def slow_take(self: LeaseWorker, queues: Any) -> Lease | None:
        nonlocal most
        most = max(most, len(self.leases))
        time.sleep(0.01)
        return take(self, queues)

    monkeypatch.setattr(LeaseWorker, "take_first", slow_take)
    work()
    assert most < 10, "what owes nothing is finished before more is taken"
    assert len(published(job)) == 61
