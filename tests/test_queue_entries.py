"""What Redis says of a chunk is not believed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from queue_tools import MODEL, FakeFolder, counts, queue, run_out, take, take_all
from rq import Queue
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from trbatch.chunk_job import ChunkJob
from trbatch.chunk_lease import BadChunk
from trbatch.lease import LeaseWorker
from trbatch.queue import FUNCTION, JobQueue
from trbatch.queue_names import chunk_id
from trbatch.recovery import recover


def push(jobs: JobQueue, job: ChunkJob) -> None:
    found = queue(jobs)
    found.enqueue_job(job)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("os.system", ["touch {file}"]),
        ("os.system", ["/store/job", 0, 0]),
        (FUNCTION, ["touch {file}"]),
        (FUNCTION, ["/store/job", "0", 0]),
        (FUNCTION, ["/store/job", -1, 0]),
        (FUNCTION, []),
    ],
)
def test_an_entry_that_is_no_chunk_fails_and_runs_nothing(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path, function: str, arguments: list[Any]
) -> None:
    marker = tmp_path / "marker"
    arguments = [str(a).format(file=marker) if isinstance(a, str) else a for a in arguments]
    plain = Queue(MODEL.queue_name, connection=jobs.connection, serializer=JSONSerializer)
    job = plain.enqueue(function, args=arguments, retry=None)
    jobs.enqueue(FakeFolder(), [0])
    assert take(jobs, worker).chunk == 0, "the chunk behind it is handed out"
    assert job.get_status() == JobStatus.FAILED
    assert not marker.exists()


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("where", ["data", "meta", "status", "no hash"])
def test_a_poisoned_entry_runs_nothing_and_stops_nothing(
    jobs: JobQueue, worker: LeaseWorker, tmp_path: Path, where: str
) -> None:
    marker = tmp_path / "marker"
    folder = FakeFolder()
    jobs.enqueue(folder, [0, 1])
    key = ChunkJob.key_for(chunk_id(folder, 0))
    if where == "no hash":
        jobs.connection.delete(key)
    else:
        jobs.connection.hset(key, where, pickle.dumps(_Bomb(marker)))
    assert 1 in take_all(jobs, worker)
    assert not marker.exists()


def test_callbacks_and_webhooks_of_an_entry_are_ignored(
    jobs: JobQueue, worker: LeaseWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq.webhook.Webhook.send", lambda *a, **k: pytest.fail("a webhook"))
    folder = FakeFolder()
    jobs.enqueue(folder, [0, 1])
    hooks = [
        {"url": "http://localhost:1/", "job_status": status} for status in ("finished", "failed")
    ]
    for chunk in (0, 1):
        key = ChunkJob.key_for(chunk_id(folder, chunk))
        jobs.connection.hset(
            key,
            mapping={
                "success_callback_name": "builtins.exit",
                "failure_callback_name": "builtins.exit",
                "stopped_callback_name": "builtins.exit",
                "webhooks": json.dumps(hooks),
            },
        )
    assert worker.finish(take(jobs, worker), {})
    assert worker.fail(take(jobs, worker), BadChunk("no"), final=True)
    assert counts(jobs) == (0, 0, 1, 1)


def test_the_function_of_a_chunk_cannot_be_had(jobs: JobQueue) -> None:
    jobs.enqueue(FakeFolder(), [0])
    job = ChunkJob.fetch(chunk_id(FakeFolder(), 0), jobs.connection, JSONSerializer)
    with pytest.raises(PermissionError):
        job.perform()


NUMBERS = ["9" * 5000, "99999999999", "-99999999999", str(2**63 - 1), "1e999", "nan", "½", ""]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:20] or "empty")
@pytest.mark.parametrize(
    "field", ["trbatch_lost", "retries_left", "result_ttl", "failure_ttl", "ttl", "timeout"]
)
def test_no_number_of_an_entry_is_believed_without_bounds(
    jobs: JobQueue, worker: LeaseWorker, field: str, number: str
) -> None:
    """The attempt always fits its column; the chunk ends, or waits again, as any other does."""
    folder = FakeFolder()
    jobs.enqueue(folder, [0])
    key = ChunkJob.key_for(chunk_id(folder, 0))
    jobs.connection.hset(key, field, number)
    found = worker.take(queue(jobs))
    if found is None:  # what rq cannot read at all counts as absent
        assert field != "trbatch_lost"
        return
    assert 1 <= found.attempt < 2**31
    assert worker.hand_back(found, lost=True)
    again = take(jobs, worker)
    assert 1 <= again.attempt < 2**31
    run_out(jobs, again)
    assert recover(queue(jobs)) == 1
    assert worker.fail(take(jobs, worker), BadChunk("no"))
    if (last := worker.take(queue(jobs))) is not None:
        assert worker.finish(last, {})


def test_promises_of_delays_and_repeats_are_cut_to_what_all_get(
    jobs: JobQueue, worker: LeaseWorker
) -> None:
    folder = FakeFolder()
    jobs.enqueue(folder, [0])
    key = ChunkJob.key_for(chunk_id(folder, 0))
    promises = {"retry_intervals": "[1e300]", "repeats_left": "9", "repeat_intervals": '["x"]'}
    jobs.connection.hset(key, mapping=promises)
    assert worker.fail(take(jobs, worker), BadChunk("no"))
    assert worker.finish(take(jobs, worker), {})
    assert counts(jobs) == (0, 0, 0, 1)


def test_an_entry_whose_other_keys_are_of_another_kind_does_not_stop_recovery(
    jobs: JobQueue, worker: LeaseWorker
) -> None:
    folder = FakeFolder()
    jobs.enqueue(folder, [0, 1])
    leases = {lease.chunk: lease for lease in (take(jobs, worker), take(jobs, worker))}
    for lease in leases.values():
        run_out(jobs, lease)
    jobs.connection.delete(f"rq:executions:{leases[0].job.id}")
    jobs.connection.set(f"rq:executions:{leases[0].job.id}", b"no set")
    jobs.connection.lpush(f"{queue(jobs).intermediate_queue_key}", leases[1].job.id)
    jobs.connection.sadd(f"{queue(jobs).intermediate_queue_key}:seen:{leases[1].job.id}", b"x")
    assert recover(queue(jobs)) >= 2
