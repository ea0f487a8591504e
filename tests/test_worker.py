"""The worker: every row of every chunk ends in a segment once, and says where it is from."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from waiting import wait_for
from worker_tools import (
    MODEL,
    Background,
    EchoEngine,
    Loaded,
    config,
    expected,
    rows_of,
    submit,
    texts_of,
    write_prompts,
)

from trbatch import worker as worker_module
from trbatch.config import JobSpec, SamplingParams
from trbatch.engine.sequence import Completion, Request, TaskKey
from trbatch.engine_thread import EngineThread
from trbatch.job import JobFolder
from trbatch.queue import JobQueue
from trbatch.results import collect
from trbatch.worker import run_worker


def test_a_burst_decodes_every_row_once_and_empties_the_queue(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 30)
    turns: list[float] = []

    def make() -> EchoEngine:
        turns.append(sys.getswitchinterval())
        return EchoEngine()

    before = sys.getswitchinterval()
    assert run_worker(config(jobs.url), load=Loaded(make)) == 0
    assert turns == [pytest.approx(0.0002)] and sys.getswitchinterval() == before
    assert texts_of(job) == expected(30)
    counts = jobs.counts(job)
    assert (counts.open, counts.failed, counts.finished) == (0, 0, 8)
    assert JobFolder.open(job.path).missing_chunks() == []
    assert jobs.workers() == []


def test_the_model_is_loaded_once_for_all_chunks_and_jobs(jobs: JobQueue, tmp_path: Path) -> None:
    first = submit(jobs, tmp_path, 9, name="first")
    second = submit(jobs, tmp_path, 9, name="second")
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.models == [MODEL]
    assert texts_of(first) == texts_of(second) == expected(9)


def test_the_batch_does_not_drain_between_chunks(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 2 rows, a batch of 8: only the end of the queue sees fewer than 8.

    However slow the machine: a step lasts until the worker has taken as much as it ever will.
    """
    rows, given, answered = 64, 0, 0
    seen: list[tuple[int, int]] = []  # of each step: rows decoded together, rows given before it
    add = EngineThread.add

    def counting(thread: EngineThread, requests: Sequence[Request]) -> None:
        nonlocal given
        add(thread, requests)
        given += len(requests)

    class Waiting(EchoEngine):
        def step(self) -> list[Completion]:
            nonlocal answered
            before = answered + self.unfinished
            done = super().step()
            seen.append((self.batches[-1], before))
            wait_for(lambda: given == rows or given - answered >= 16)
            answered += len(done)
            return done

    monkeypatch.setattr(EngineThread, "add", counting)
    job = submit(jobs, tmp_path, rows, chunk_size=2)
    assert run_worker(config(jobs.url), load=Loaded(lambda: Waiting(capacity=8))) == 0
    assert texts_of(job) == expected(rows)
    assert all(size == 8 for size, before in seen[1:] if before < rows), seen
    assert len(seen) < 32, "64 rows of three words on average, eight at a time: 24, and the end"


def test_no_more_chunks_are_taken_than_the_batch_needs(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 60, chunk_size=4)
    worker = Background(jobs.url, Loaded(lambda: EchoEngine(capacity=4, step_s=0.2)))
    wait_for(lambda: jobs.counts(job).started)
    time.sleep(0.3)
    assert jobs.counts(job).started <= 4, "others want some too"
    worker.stop(times=2)


def test_chunks_in_flight_can_be_limited(jobs: JobQueue, tmp_path: Path) -> None:
    submit(jobs, tmp_path, 16, chunk_size=2)
    load = Loaded(lambda: EchoEngine(capacity=8))
    run_worker(config(jobs.url, chunks_in_flight=1), load=load)
    assert max(load.engine.batches) == 2


def test_the_engine_is_not_given_all_samples_at_once(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "AHEAD", 12)
    job = submit(jobs, tmp_path, 2, sampling=SamplingParams(n=100))
    most = 0

    class Counting(EchoEngine):
        def step(self) -> list[Completion]:
            nonlocal most
            most = max(most, self.unfinished)
            return super().step()

    load = Loaded(lambda: Counting(capacity=4))
    assert run_worker(config(jobs.url), load=load) == 0
    assert len(rows_of(job)) == 200
    assert len({(row["prompt_index"], row["sample_index"]) for row in rows_of(job)}) == 200
    assert 4 < most <= 16
    assert sum(size == 4 for size in load.engine.batches) >= 45, "and it is never kept waiting"


def test_messages_samples_seeds_and_sampling_reach_the_engine(
    jobs: JobQueue, tmp_path: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 2, "seed": 7},
        {"prompt": "four"},
    ]
    job = submit(jobs, tmp_path, rows, sampling=SamplingParams(n=2, temperature=0.5))
    run_worker(config(jobs.url), load=Loaded())
    found = {(row["prompt_index"], row["sample_index"]): row for row in rows_of(job)}
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[0, 1]["text"] == "ONE TWO THREE #1"
    assert found[0, 0]["completion_tokens"] == 2
    assert found[0, 0]["seed"] == 7
    assert found[1, 0]["completion_tokens"] == 1


def test_a_row_that_fails_is_a_row_and_not_the_end(jobs: JobQueue, tmp_path: Path) -> None:
    rows = [{"prompt": "fine"}, {"prompt": "unspeakable"}, {"prompt": "fine too"}]
    job = submit(jobs, tmp_path, rows)
    assert run_worker(config(jobs.url), load=Loaded()) == 0
    found = {row["prompt_index"]: row for row in rows_of(job)}
    assert [found[i]["finish_reason"] for i in range(3)] == ["stop", "error", "stop"]
    assert found[1]["error_code"] == "prompt_too_long"
    assert jobs.counts(job).failed == 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_error_row_names_its_place_in_the_input_whoever_found_it(
    jobs: JobQueue, tmp_path: Path, kind: str
) -> None:
    """What the engine refuses is told as what `submit` refuses: file and line."""
    prompts = ["fine", "", "unspeakable"]
    file = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        write_prompts(file, [{"prompt": text} for text in prompts])
    else:
        pq.write_table(pa.table({"prompt": prompts}), file)
    spec = JobSpec(input=str(file), name="job", model=MODEL, out=str(tmp_path / "store"))
    job = JobFolder.submit(spec)
    jobs.enqueue(job, job.missing_chunks())
    run_worker(config(jobs.url), load=Loaded())
    found = collect(JobFolder.open(job.path), str(tmp_path / "out.jsonl"), "jsonl")
    assert found.rows_failed == 2
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
    failed = (tmp_path / "out.errors.jsonl").read_text().splitlines()
    errors = (Path(job.path) / "errors.jsonl").read_text().splitlines()
    for texts in (
        [json.loads(line)["error"]["message"] for line in failed],
        [json.loads(line)["error_message"] for line in errors],
    ):
        by_submit, by_worker = texts
        place = by_submit.partition(": ")[0].removesuffix("2") + "3"
        assert str(file) in place
        assert by_worker == f"{place}: longer than the model takes"


def test_bad_input_rows_need_no_engine(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [{"prompt": "fine"}, {"nothing": 1}, {"prompt": ""}])
    run_worker(config(jobs.url), load=Loaded())
    assert texts_of(job) == {0: "FINE #0"}
    progress = JobFolder.open(job.path).progress()
    assert progress.rows == 3
    assert progress.rows_failed == 2


def test_rows_that_are_done_are_not_decoded_again(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 8)
    run_worker(config(jobs.url), load=Loaded())
    jobs.enqueue(job, [0, 1])
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.engine.batches == []
    assert texts_of(job) == expected(8)
    assert jobs.counts(job).finished == 2


def test_only_the_missing_rows_of_a_chunk_are_decoded(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 8, chunk_size=8)
    segments_folder = Path(job.path) / "segments"

    class InParts(EchoEngine):
        """Goes on after the first rows only when a segment holds them."""

        told = False

        def step(self) -> list[Completion]:
            if self.told:
                wait_for(lambda: list(segments_folder.glob("*.parquet")))
            finished = super().step()
            self.told = self.told or bool(finished)
            return finished

    run_worker(config(jobs.url, publish_s=0.0), load=Loaded(lambda: InParts(capacity=2)))
    segments = sorted(segments_folder.glob("*.parquet"))
    assert len(segments) > 1
    lost = {row["prompt_index"] for row in pq.read_table(segments[0]).to_pylist()}
    segments[0].unlink()
    again = JobFolder.open(job.path)
    jobs.enqueue(again, again.missing_chunks())
    run_worker(config(jobs.url), load=Loaded())
    assert 0 < len(lost) < 8
    assert texts_of(job) == expected(8)


def test_rows_are_published_while_their_chunk_still_runs(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 40, chunk_size=40)
    load = Loaded(lambda: EchoEngine(capacity=2, step_s=0.05))
    worker = Background(jobs.url, load, publish_s=0.1)
    wait_for(lambda: JobFolder.open(job.path).progress().rows_ok >= 2)
    assert jobs.counts(job).started == 1
    worker.stop(times=2)


def test_each_row_names_worker_model_task_and_attempt(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 3, task="greetings")
    run_worker(config(jobs.url, name="gpu0"), load=Loaded())
    found = rows_of(job)
    assert {row["model"] for row in found} == {MODEL}
    assert {row["task"] for row in found} == {"greetings"}
    assert {row["attempts"] for row in found} == {1}
    (worker,) = {row["worker"] for row in found}
    assert worker.startswith("gpu0-")
    assert job.ledger.facts() == {"dtype": ["float32"]}


def test_matrices_are_opened_per_task_and_saved_after_the_job(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 6, task="greetings", cold=True)
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.engine.opened == [TaskKey("greetings", job.matrices, job.id, cold=True)]
    assert load.engine.saved >= 2, "once with the last chunk, once at the end"


def test_jobs_that_share_a_tasks_name_share_its_matrix_only_where_they_should(
    jobs: JobQueue, tmp_path: Path
) -> None:
    stores = {name: str(tmp_path / name) for name in ("here", "there")}
    first = submit(jobs, tmp_path, 4, name="first", task="t", out=stores["here"])
    submit(jobs, tmp_path, 4, name="second", task="t", out=stores["here"])
    cold = submit(jobs, tmp_path, 4, name="cold", task="t", out=stores["here"], cold=True)
    far = submit(jobs, tmp_path, 4, name="first", task="t", out=stores["there"])
    private = submit(jobs, tmp_path, 4, name="private", task="t", private_matrix=True)
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.engine.opened == [
        TaskKey("t", first.matrices),
        TaskKey("t", first.matrices, cold.id, cold=True),
        TaskKey("t", far.matrices),
        TaskKey(private.manifest.matrix, apart=private.path),
    ]
