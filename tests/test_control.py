"""Cancel, pause, resume, retry, deadlines and priorities: what is done stays, the rest obeys."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import redis
from echo_worker import EchoEngine
from waiting import wait_for

from trbatch import api, holds
from trbatch.chunk_lease import Lease
from trbatch.control import CONTROL, Control
from trbatch.engine.sequence import Completion, Request
from trbatch.errors import Cancelled, Expired, JobFailed, UsageError
from trbatch.job import JobFolder
from trbatch.lease import LeaseWorker
from trbatch.progress import duration
from trbatch.queue import JobQueue
from trbatch.queue_control import leases
from trbatch.queue_names import ModelKey
from workers import submit, work, working

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "LOOK_S", 0.1)


class Moody(EchoEngine):
    """Fails what starts with `bad`, with the second word as its code, until it is in the mood."""

    willing = False

    def _echo(self, request: Request) -> Completion:
        words = (request.prompt or "").split()
        if words[0] == "bad" and not self.willing:
            return Completion(
                key=request.key,
                finish_reason="error",
                error_code=words[1],
                error_message="not today",
                sample_index=request.sample_index,
            )
        return super()._echo(request)


def rows_of(receipt: api.Receipt) -> list[dict[str, Any]]:
    return pq.read_table(receipt.output).to_pylist()


def published(job: api.Job) -> list[str]:
    files = sorted((Path(job.path) / "segments").glob("*.parquet"))
    return [name for file in files for name in pq.read_table(file)["custom_id"].to_pylist()]


# --- cancel ---


def test_cancelling_keeps_what_is_done_and_frees_the_worker_for_other_jobs(tmp_path: Path) -> None:
    job = submit(tmp_path, 200)
    with working(EchoEngine(0.1)) as worker:
        wait_for(lambda: len(published(job)) >= 8)
        start = time.monotonic()
        status = job.cancel()
        assert status.state in ("cancelling", "cancelled")
        with pytest.raises(Cancelled, match=r"job job was cancelled; \d+ of 200 rows are done"):
            job.wait(timeout=10)
        assert time.monotonic() - start < 5
        assert not worker.chunks
        done = len(published(job))
        other = submit(tmp_path, 4, name="other")
        assert other.wait(timeout=10).state == "completed"
        assert len(published(job)) == done < 200
    status = job.status()
    assert (status.state, status.chunks.open, status.finished) == ("cancelled", 0, True)
    assert status.progress.rows_cancelled == 200 - done
    receipt = job.collect()
    assert (receipt.rows_ok, receipt.rows_cancelled, receipt.complete) == (done, 200 - done, True)
    assert receipt.exit_code == Cancelled.exit_code
    rows = rows_of(receipt)
    assert [row["custom_id"] for row in rows] == [f"r{i}" for i in range(200)]
    lost = [row for row in rows if row["finish_reason"] == "cancelled"]
    assert {row["error_code"] for row in lost} == {"cancelled"}
    assert {row["text"] for row in lost} == {None}
    assert (Path(job.path) / "_PARTIAL").exists()


def test_a_cancelled_job_can_be_taken_up_again(tmp_path: Path) -> None:
    job = submit(tmp_path)
    assert job.cancel().state == "cancelled"
    work()
    assert published(job) == []
    assert job.resume() == 3
    work()
    receipt = job.collect()
    assert (receipt.rows_ok, receipt.exit_code) == (12, 0)
    assert (Path(job.path) / "_SUCCESS").exists()


def test_submitting_a_cancelled_job_again_does_not_revive_it(tmp_path: Path) -> None:
    job = submit(tmp_path)
    job.cancel()
    again = submit(tmp_path)
    assert (again.id, again.status().state) == (job.id, "cancelled")
    with JobQueue.connect() as jobs:
        assert jobs.counts(job).open == 0


def test_a_job_that_is_complete_cannot_be_cancelled_any_more(tmp_path: Path) -> None:
    job = submit(tmp_path)
    work()
    assert job.cancel().state == "completed"
    assert not (Path(job.path) / CONTROL).exists()
    assert job.collect().exit_code == 0


def test_a_cancelled_job_keeps_the_rows_of_all_samples_and_bad_rows_apart(tmp_path: Path) -> None:
    job = submit(tmp_path, [{"id": "a", "prompt": "x", "n": 2}, {"id": "b"}], name="few")
    job.cancel()
    rows = rows_of(job.collect())
    found = [(row["custom_id"], row["sample_index"], row["finish_reason"]) for row in rows]
    assert found == [("a", 0, "cancelled"), ("a", 1, "cancelled"), ("b", 0, "error")]


def test_a_dead_workers_chunk_keeps_no_job_from_ending_as_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, 4)
    with working(EchoEngine(5.0)):
        wait_for(lambda: job.status().chunks.started)
        job.cancel()
        monkeypatch.setattr(holds, "LOOK_S", 1e9)
        with JobQueue.connect() as jobs:  # as if it had died: its lease runs out
            for name in jobs.models():
                registry = jobs.queue(name).started_job_registry.key
                for entry in jobs.connection.zrange(registry, 0, -1):
                    jobs.connection.zadd(registry, {entry: time.time() - 1})
        assert job.status().state == "cancelled"


# --- pause ---


def test_a_paused_job_stops_and_goes_on_without_losing_or_repeating_a_row(tmp_path: Path) -> None:
    job = submit(tmp_path, 100)
    with working(EchoEngine(0.05)) as worker:
        wait_for(lambda: len(published(job)) >= 8)
        assert job.pause().paused
        wait_for(lambda: not worker.chunks, timeout=5)
        done = len(published(job))
        time.sleep(0.5)
        assert len(published(job)) == done < 100
        status = job.status()
        assert (status.paused, status.state, status.chunks.open) == (True, "in_progress", 0)
        job.resume()
        assert job.wait(timeout=30).progress.rows_ok == 100
    assert sorted(published(job)) == sorted(f"r{i}" for i in range(100))


def test_a_job_that_is_resumed_while_a_worker_lets_go_of_it_loses_no_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, 40, chunk_size=40)
    real = LeaseWorker.finish

    def resumed_first(self: LeaseWorker, lease: Lease, result: dict[str, int]) -> bool:
        if job.folder.control().hold:
            job.resume()  # it finds the chunk with the worker and leaves it alone
        return real(self, lease, result)

    monkeypatch.setattr(LeaseWorker, "finish", resumed_first)
    with working(EchoEngine(0.1)):
        wait_for(lambda: len(published(job)) >= 4)
        job.pause()
        assert job.wait(timeout=20).progress.rows_ok == 40
    assert not job.status().paused


def test_a_chunk_that_comes_back_while_its_job_is_paused_is_not_decoded(tmp_path: Path) -> None:
    job = submit(tmp_path)
    Control(hold="paused").write(job.folder.folder)  # its chunks are still in the queue
    work()
    assert published(job) == []
    assert not job.status().finished
    job.resume()
    work()
    assert len(published(job)) == 12


def test_a_paused_job_that_is_submitted_again_stays_paused(tmp_path: Path) -> None:
    job = submit(tmp_path)
    job.pause()
    submit(tmp_path)
    work()
    assert published(job) == []
    assert job.status().paused


# --- deadline ---


def test_rows_that_are_not_done_by_the_deadline_become_error_rows(tmp_path: Path) -> None:
    job = submit(tmp_path, 200, deadline="4s")  # a busy machine may take 2 s to begin
    with working(EchoEngine(0.1)) as worker:
        with pytest.raises(Expired, match=r"job job was not done by .*; \d+ of 200 rows are done"):
            job.wait(timeout=20)
        wait_for(lambda: not worker.chunks, timeout=5)
    done = len(published(job))
    assert 0 < done < 200
    status = job.status()
    assert (status.state, status.errors) == ("expired", {"deadline": 200 - done})
    receipt = job.collect()
    assert (receipt.rows_ok, receipt.rows_failed, receipt.complete) == (done, 200 - done, True)
    assert receipt.exit_code == Expired.exit_code
    late = [row for row in rows_of(receipt) if row["error_code"] == "deadline"]
    assert len(late) == receipt.rows_expired == 200 - done
    assert "passed before this row was done" in late[0]["error_message"]


def test_an_expired_job_goes_on_with_a_new_deadline_only(tmp_path: Path) -> None:
    job = submit(tmp_path, deadline="1s")
    wait_for(lambda: job.status().state == "expired", timeout=5)
    work()  # meets chunks of a job that is over
    assert published(job) == []
    with pytest.raises(UsageError, match="deadline of job job has passed") as caught:
        job.resume()
    assert "--deadline" in (caught.value.hint or "")
    assert job.resume(deadline="1h") == 3
    work()
    assert job.status().state == "completed"


def test_who_waits_for_an_expired_job_takes_it_out_of_the_queue(tmp_path: Path) -> None:
    job = submit(tmp_path, deadline="1s")
    with pytest.raises(Expired):
        job.wait(timeout=10)
    assert job.status().chunks.open == 0


def test_the_same_deadline_again_is_the_same_deadline(tmp_path: Path) -> None:
    job = submit(tmp_path, deadline="1h")
    first = job.status().deadline
    assert first is not None
    assert abs(first - time.time() - 3600) < 10
    time.sleep(0.01)
    assert submit(tmp_path, deadline="1h").status().deadline == first
    assert submit(tmp_path).status().deadline == first
    later = submit(tmp_path, deadline="2h").status().deadline
    assert later is not None
    assert later > first + 3500
    assert submit(tmp_path, deadline="none").status().deadline is None


def test_a_wrong_deadline_is_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'soon' is no point in time"):
        api.submit(tmp_path / "missing.jsonl", deadline="soon")


# --- priority ---


def test_more_urgent_jobs_are_decoded_first(tmp_path: Path) -> None:
    for name in ("low", "normal", "high"):
        submit(tmp_path, [{"prompt": f"{name} {i}"} for i in range(8)], name=name, priority=name)
    engine = Seen()
    work(engine, chunks_in_flight=1)
    order = [prompt.split()[0] for prompt in engine.prompts]
    assert order == ["high"] * 8 + ["normal"] * 8 + ["low"] * 8


def test_an_urgent_job_of_another_model_is_decoded_before_the_rest_of_this_one(
    tmp_path: Path,
) -> None:
    submit(tmp_path, [{"prompt": f"first {i}"} for i in range(40)], name="first")
    engine = Seen(0.02)
    with working(engine, chunks_in_flight=1):
        wait_for(lambda: engine.prompts)
        urgent = [{"prompt": f"urgent {i}"} for i in range(4)]
        submit(tmp_path, urgent, name="urgent", model="org/other", priority="high")
        wait_for(lambda: len(engine.prompts) == 44)
    words = [prompt.split()[0] for prompt in engine.prompts]
    assert "first" in words[words.index("urgent") :]


def test_a_waiting_job_can_be_made_more_urgent(tmp_path: Path) -> None:
    submit(tmp_path, [{"prompt": f"one {i}"} for i in range(8)], name="one")
    other = submit(tmp_path, [{"prompt": f"two {i}"} for i in range(8)], name="two", priority="low")
    status = other.status()
    assert (status.priority, status.ahead) == ("low", 2)
    other = submit(
        tmp_path, [{"prompt": f"two {i}"} for i in range(8)], name="two", priority="high"
    )
    status = other.status()
    assert (status.priority, status.ahead, status.chunks.queued) == ("high", 0, 2)
    engine = Seen()
    work(engine, chunks_in_flight=1)
    assert [prompt.split()[0] for prompt in engine.prompts] == ["two"] * 8 + ["one"] * 8


def test_a_worker_of_one_model_takes_the_more_urgent_of_its_chunks(tmp_path: Path) -> None:
    submit(tmp_path, [{"prompt": "b"}], name="b")
    submit(tmp_path, [{"prompt": "a"}], name="a", priority="high")
    engine = Seen()
    work(engine, model="org/echo", chunks_in_flight=1)
    assert engine.prompts == ["a", "b"]


class Seen(EchoEngine):
    """Remembers what it was asked, in order."""

    def __init__(self, step_s: float = 0.0) -> None:
        super().__init__(step_s)
        self.prompts: list[str] = []

    def add(self, request: Request) -> None:
        self.prompts.append(request.prompt or "")
        super().add(request)


# --- retry ---

BAD = [{"id": f"b{i}", "prompt": f"bad {'flaky' if i % 2 else 'poison'} {i}"} for i in range(4)]
GOOD = [{"id": f"g{i}", "prompt": f"good {i}"} for i in range(4)]


def test_failed_rows_are_decoded_again_and_no_others(tmp_path: Path) -> None:
    job = submit(tmp_path, [*BAD, *GOOD, {"id": "unusable"}])
    engine = work(Moody())
    status = job.status()
    assert status.state == "completed"
    assert status.errors == {"flaky": 2, "poison": 2, "missing_prompt": 1}
    assert job.retry() == 4
    assert job.status().state == "in_progress"
    assert not job.collect().complete
    engine.willing = True
    work(engine)
    assert sorted(published(job)) == sorted(
        [*(f"b{i}" for i in range(4))] * 2 + [r["id"] for r in GOOD]
    )
    receipt = job.collect()
    assert (receipt.rows_ok, receipt.rows_failed, receipt.duplicates) == (8, 1, 0)
    assert receipt.complete
    assert job.status().errors == {"missing_prompt": 1}


def test_only_failures_of_the_named_codes_are_decoded_again(tmp_path: Path) -> None:
    job = submit(tmp_path, BAD)
    engine = work(Moody())
    engine.willing = True
    assert job.retry(["flaky"]) == 2
    work(engine)
    assert job.status().errors == {"poison": 2}
    assert [row["error_code"] for row in rows_of(job.collect())] == ["poison", None] * 2
    assert job.retry(["no_such_code"]) == 0


def test_a_row_that_fails_again_has_failed_again(tmp_path: Path) -> None:
    job = submit(tmp_path, BAD)
    work(Moody())
    for _ in range(2):
        assert job.retry() == 4
        work(Moody())
        status = job.status()
        assert (status.state, status.progress.rows_failed) == ("completed", 4)
        assert status.errors == {"poison": 2, "flaky": 2}


def test_rows_of_a_running_chunk_are_retried_when_it_is_through(tmp_path: Path) -> None:
    rows = [*BAD, *({"prompt": f"later {i}"} for i in range(40))]
    job = submit(tmp_path, rows, chunk_size=50)
    engine = Moody(0.1)
    with working(engine):
        wait_for(lambda: job.status().progress.rows_failed)
        assert job.status().chunks.started == 1
        engine.willing = True
        assert job.retry(["flaky"]) == 2
        states = set()
        wait_for(lambda: states.add(state := job.status().state) or state == "completed")
        assert states <= {"in_progress", "completed"}, "never failed in between"
    assert job.status().errors == {"poison": 2}
    receipt = job.collect()
    assert (receipt.rows_ok, receipt.rows_failed, receipt.duplicates) == (42, 2, 0)


def test_a_retry_between_the_end_of_a_chunk_and_its_letting_go_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, BAD)
    engine = Moody()
    finish = LeaseWorker.finish
    retried: list[int] = []

    def finish_late(leases: LeaseWorker, *arguments: Any) -> bool:
        if not retried:  # the chunk still counts as running
            engine.willing = True
            retried.append(job.retry())
        return finish(leases, *arguments)

    monkeypatch.setattr(LeaseWorker, "finish", finish_late)
    work(engine)
    assert retried == [4]
    receipt = job.collect()
    assert (receipt.rows_ok, receipt.rows_failed, receipt.complete) == (4, 0, True)


def test_a_retry_of_a_held_job_is_refused(tmp_path: Path) -> None:
    job = submit(tmp_path, BAD)
    job.pause()
    with pytest.raises(UsageError, match="paused"):
        job.retry()


@pytest.mark.parametrize("first", ["missing", "progress", "failures"])
def test_a_folder_that_was_open_before_sees_the_retry(tmp_path: Path, first: str) -> None:
    job = submit(tmp_path, BAD)
    work(Moody())
    watcher = JobFolder.open(job.path)
    assert watcher.missing(0) == []
    assert watcher.progress().complete
    job.retry(["poison"])
    if first == "progress":
        assert watcher.progress().rows_done == 2
    elif first == "failures":
        assert sum(sum(codes.values()) for codes in watcher.ledger.failures().values()) == 2
    assert [row.custom_id for row, _ in watcher.missing(0)] == ["b0", "b2"]
    assert watcher.progress().rows_done == 2


# --- the queue is lost ---


def test_a_wiped_queue_costs_a_resume_and_nothing_else(tmp_path: Path, redis_url: str) -> None:
    job = submit(tmp_path, 40)
    with working(EchoEngine(0.05), chunks_in_flight=1):
        wait_for(lambda: len(published(job)) >= 8)
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        done = len(published(job))
        wait_for(lambda: job.status().state == "failed")
        with pytest.raises(JobFailed, match="no chunk of it is in the queue") as caught:
            job.wait(timeout=5)
        assert caught.value.hint == f"trbatch resume {job.path}"
        api.Job.open(job.path).resume()
        assert job.wait(timeout=30).progress.rows_ok == 40
    names = published(job)
    assert set(names) == {f"r{i}" for i in range(40)}
    assert len(names) - 40 <= 4  # what was in flight, at most, is there twice
    assert done >= 8
    assert job.collect().exit_code == 0


# --- who works on it ---


def test_status_names_the_worker_of_each_running_chunk(tmp_path: Path) -> None:
    job = submit(tmp_path, 8)
    with working(EchoEngine(1.0), name="gpu0"):
        wait_for(lambda: len(job.status().leases) == 2)
        status = job.status()
        with JobQueue.connect() as jobs:
            assert [lease.chunk for lease in leases(jobs, job.folder)] == [0, 1]
    assert [lease.chunk for lease in status.leases] == [0, 1]
    for lease in status.leases:
        assert lease.worker.startswith("gpu0")
        assert lease.attempt == 1
        assert 0 < lease.left_s <= 60
        assert lease.running_s is not None
        assert 0 <= lease.running_s < 10
    assert status.to_dict()["leases"][0]["chunk"] == 0


def test_a_lease_tells_the_attempt_that_its_rows_will_have(tmp_path: Path) -> None:
    """What workers lost or let go of counts there as well as what failed."""
    job = submit(tmp_path, 4)
    with JobQueue.connect() as jobs:
        queue = jobs.queue(ModelKey(job.folder.manifest.model).queue_name)
        worker = LeaseWorker(jobs.connection, "w", [queue])
        worker.open()
        for expected in (1, 2, 3):
            found = worker.take(queue)
            assert found is not None
            (lease,) = leases(jobs, job.folder)
            assert lease.attempt == found.attempt == expected
            worker.hand_back(found, lost=True)
        failed = worker.take(queue)
        assert failed is not None
        worker.fail(failed, RuntimeError("no"))
        again = worker.take(queue)
        assert again is not None
        (lease,) = leases(jobs, job.folder)
        assert lease.attempt == again.attempt == 5
        jobs.connection.zadd(again.job.started_job_registry.key, {f"{again.job.id}:x": "inf"})
        duration(leases(jobs, job.folder)[0].left_s)
        worker.close()


def test_leases_are_told_whatever_redis_holds(tmp_path: Path) -> None:
    job = submit(tmp_path, 4)
    with working(EchoEngine(1.0)), JobQueue.connect() as jobs:
        wait_for(lambda: leases(jobs, job.folder))
        (rq_id,) = jobs.ids(job)
        poison = {"worker_name": b"\xff\xfe", "started_at": b"\xff", "retries_left": b"9" * 99}
        poison["trbatch_lost"] = b"9" * 5000
        jobs.connection.hset(f"rq:job:{rq_id}", mapping=poison)
        (registry,) = (jobs.queue(name).started_job_registry.key for name in jobs.models())
        later = time.time() + 60
        jobs.connection.zadd(registry, {b"\xff:1": later, f"{rq_id}9x:1": later, "": later})
        jobs.connection.zadd(registry, {f"{rq_id}{'9' * 5000}:1": later})
        (lease,) = leases(jobs, job.folder)
        assert (lease.chunk, lease.attempt, lease.running_s) == (0, 1, None)


def test_a_job_in_an_object_store_can_be_held_retried_and_resumed(tmp_path: Path) -> None:
    store = f"memory://control-{time.time_ns()}"
    job = submit(tmp_path, BAD, out=store, deadline="1h")
    assert job.pause().paused
    job.resume()
    engine = work(Moody())
    assert job.retry(["flaky"]) == 2
    assert job.cancel().state == "cancelled"
    assert job.collect(tmp_path / "out.parquet").rows_cancelled == 2
    engine.willing = True
    job.resume()
    work(engine)
    receipt = job.collect(tmp_path / "out.parquet")
    assert (receipt.rows_ok, receipt.rows_failed, receipt.rows_cancelled) == (2, 2, 0)


def test_a_damaged_control_file_is_named_and_stops_no_worker(tmp_path: Path) -> None:
    job = submit(tmp_path, 40)
    with working(EchoEngine(0.05)):
        wait_for(lambda: published(job))
        (Path(job.path) / CONTROL).write_text('{"hold": "sideways"}')
        time.sleep(0.4)
        with pytest.raises(UsageError, match=r"control\.json is damaged"):
            job.status()
        (Path(job.path) / CONTROL).unlink()
        job.resume()
        assert job.wait(timeout=20).state == "completed"
