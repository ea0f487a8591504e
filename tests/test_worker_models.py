"""Which model a worker loads, and what becomes of chunks whose model cannot be had."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

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
)

from trbatch.errors import ModelError, WorkerError
from trbatch.queue import JobQueue
from trbatch.worker import run_worker


def test_a_worker_of_one_model_leaves_the_chunks_of_others(jobs: JobQueue, tmp_path: Path) -> None:
    mine = submit(jobs, tmp_path, 4, name="mine")
    other = submit(jobs, tmp_path, 4, name="other", model="maker/other")
    load = Loaded()
    run_worker(config(jobs.url), load=load)
    assert load.models == [MODEL]
    assert texts_of(mine) == expected(4)
    assert jobs.counts(other).queued == 1
    assert rows_of(other) == []


def test_a_worker_without_a_model_loads_what_the_next_chunk_needs(
    jobs: JobQueue, tmp_path: Path
) -> None:
    first = submit(jobs, tmp_path, 8, name="first", model="maker/b")
    second = submit(jobs, tmp_path, 8, name="second", model="maker/a")
    third = submit(jobs, tmp_path, 8, name="third", model="maker/b")
    load = Loaded()
    assert run_worker(config(jobs.url, model=""), load=load) == 0
    assert load.models == ["maker/b", "maker/a"], "in order of arrival, each once"
    assert texts_of(first) == texts_of(second) == texts_of(third) == expected(8)


def test_nothing_is_loaded_for_an_empty_queue(jobs: JobQueue) -> None:
    load = Loaded()
    assert run_worker(config(jobs.url), load=load) == 0
    assert run_worker(config(jobs.url, model=""), load=load) == 0
    assert load.models == []


def test_an_idle_worker_finds_what_is_submitted_later(jobs: JobQueue, tmp_path: Path) -> None:
    worker = Background(jobs.url, Loaded(), model="")
    wait_for(lambda: jobs.workers())
    for name, model in (("a", "maker/a"), ("b", "maker/b"), ("c", "maker/a")):
        job = submit(jobs, tmp_path, 5, name=name, model=model)
        wait_for(lambda job=job: jobs.counts(job).finished == 2)
        assert texts_of(job) == expected(5)
    assert worker.stop() == 128 + signal.SIGTERM


def test_no_chunk_is_taken_before_the_model_stands(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 4)
    seen: list[int] = []

    def slow() -> EchoEngine:
        time.sleep(0.3)
        seen.append(jobs.counts(job).started)
        return EchoEngine()

    run_worker(config(jobs.url), load=Loaded(slow))
    assert seen == [0]
    assert texts_of(job) == expected(4)


def test_a_configured_model_that_cannot_be_loaded_ends_the_worker(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 4)
    with pytest.raises(ModelError, match="no such model"):
        run_worker(config(jobs.url), load=Loaded(refuse={MODEL: ModelError("no such model")}))
    assert jobs.counts(job).queued == 1
    assert jobs.workers() == []


def test_a_jobs_model_that_cannot_be_loaded_fails_that_job_alone(
    jobs: JobQueue, tmp_path: Path
) -> None:
    bad = submit(jobs, tmp_path, 8, name="bad", model="maker/bad")
    good = submit(jobs, tmp_path, 8, name="good")
    load = Loaded(refuse={"maker/bad": ModelError("no such model")})
    assert run_worker(config(jobs.url, model=""), load=load) == 4
    assert jobs.failures(bad) == dict.fromkeys((0, 1), "trbatch.errors.ModelError: no such model")
    assert texts_of(good) == expected(8)


def test_a_jobs_model_that_fails_in_an_unknown_way_fails_that_job_alone(
    jobs: JobQueue, tmp_path: Path
) -> None:
    bad = submit(jobs, tmp_path, 4, name="bad", model="maker/bad")
    good = submit(jobs, tmp_path, 8, name="good")
    load = Loaded(refuse={"maker/bad": TypeError("NoneType has no items")})
    assert run_worker(config(jobs.url, model=""), load=load) == 4
    assert "TypeError: NoneType has no items" in jobs.failures(bad)[0]
    assert texts_of(good) == expected(8)


def test_a_worker_that_cannot_load_anything_fails_no_chunk(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 12)
    load = Loaded(refuse={MODEL: WorkerError("no GPU that torch can use")})
    with pytest.raises(WorkerError, match="no GPU") as caught:
        run_worker(config(jobs.url, model=""), load=load)
    assert caught.value.exit_code == 4
    counts = jobs.counts(job)
    assert (counts.queued, counts.failed) == (3, 0)
    assert run_worker(config(jobs.url, model=""), load=Loaded()) == 0
    assert texts_of(job) == expected(12)


@pytest.mark.parametrize(
    "error", [OSError("no space left"), MemoryError(), ModelError("its files are gone")]
)
def test_a_jobs_model_that_could_be_loaded_before_is_not_to_blame(
    jobs: JobQueue, tmp_path: Path, error: Exception
) -> None:
    """A full disk while a model is loaded must not cost the chunks of that model."""
    job = submit(jobs, tmp_path, 12)
    run_worker(config(jobs.url, model=""), load=Loaded())
    for segment in sorted((Path(job.path) / "segments").iterdir())[1:]:
        segment.unlink()
    jobs.enqueue(job, [0, 1, 2])
    with pytest.raises(WorkerError):
        run_worker(config(jobs.url, model=""), load=Loaded(refuse={MODEL: error}))
    assert (jobs.counts(job).queued, jobs.counts(job).failed) == (3, 0)
    assert run_worker(config(jobs.url, model=""), load=Loaded()) == 0


@pytest.mark.parametrize(
    "engine", [{"device": "cuda:99"}, {"device": "cpu", "max_model_len": 10**8}]
)
def test_a_worker_of_wrong_options_leaves_the_queue_as_it_was(
    jobs: JobQueue, tmp_path: Path, small_model: Path, engine: dict[str, Any]
) -> None:
    job = submit(jobs, tmp_path, 8, model=str(small_model))
    with pytest.raises(WorkerError):
        run_worker(config(jobs.url, model="", engine=engine))
    counts = jobs.counts(job)
    assert (counts.queued, counts.failed) == (2, 0)
