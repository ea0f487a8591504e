"""Tasks' matrices where a disk is full, closed or no disk at all but an object store."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_sharing import LoadedTiny, prompts
from test_tasks import Room
from worker_tools import config, submit

from trbatch import cli, matrices, object_storage
from trbatch.engine.sequence import TaskKey
from trbatch.errors import Unreachable
from trbatch.matrices import matrix_file
from trbatch.matrix_stream import stream_key
from trbatch.queue import JobQueue
from trbatch.worker import run_worker


@pytest.fixture
def store(bucket: str) -> str:
    return f"s3://{bucket}/jobs"


def learned(folder: Path | str, *tokens: int) -> Room:
    """A task `news` whose matrix has rows of these tokens, saved in a folder."""
    room = Room()
    task = room.tasks.open(TaskKey("news", folder), busy=set())
    for token in tokens:
        room.write(task.index, token, 20)
    room.tasks.save()
    return room


def test_a_matrix_comes_back_from_a_bucket_row_for_row(store: str) -> None:
    first = learned(f"{store}/matrices", 7, 9)
    second = Room()
    task = second.tasks.open(TaskKey("news", f"{store}/matrices"), busy=set())
    assert torch.equal(second.rows(task.index), first.rows(0))
    assert task.age_s is not None
    assert task.age_s < 60


def test_the_commands_find_move_and_forget_the_matrices_of_a_bucket(
    redis_url: str, store: str, tmp_path: Path
) -> None:
    learned(f"{store}/matrices", 7)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli.commands, ["matrix", *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    (listed,) = json.loads(run("list", "--store", store, "--json"))
    assert listed["file"] == matrix_file(f"{store}/matrices", "model", "news")
    file = tmp_path / "news.safetensors"
    run("export", "news", "--store", store, "-o", str(file))
    assert matrices.read(file).facts.rows == 1
    made = run("import", str(file), "--task", "olds", "--store", store)
    assert made == matrix_file(f"{store}/matrices", "model", "olds")
    run("reset", "news", "--store", store)
    assert [row["task"] for row in json.loads(run("list", "--store", store, "--json"))] == ["olds"]


def test_a_job_in_a_bucket_leaves_its_tasks_matrix_there_and_the_next_begins_with_it(
    redis_url: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))
    with JobQueue.connect(redis_url) as jobs, caplog.at_level(logging.INFO, "trbatch"):
        for name in ("first", "second"):
            caplog.clear()
            settings = {"task": "night", "out": store, "sampling": {"max_tokens": 8}}
            submit(jobs, tmp_path, prompts(4), name=name, **settings)
            assert run_worker(config(redis_url), load=LoadedTiny()) == 0
            jobs.connection.flushall()  # what is shared of it is gone: the file is all there is
        (saved,) = matrices.all_in(f"{store}/matrices")
    assert saved.facts.rows > 0
    assert "task 'night': matrix of" in caplog.text


def test_stores_share_no_matrix_wherever_the_worker_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(folder: str) -> str:
        return stream_key("model", TaskKey("t", folder))

    before = key("s3://one/matrices")
    monkeypatch.chdir(tmp_path)
    assert key("s3://one/matrices") == before
    assert key("s3://other/matrices") != before


@pytest.mark.parametrize("key", [TaskKey("news"), TaskKey("news", apart="job", cold=True)])
def test_a_matrix_that_cannot_be_read_now_is_not_saved_over(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: TaskKey
) -> None:
    learned(f"{store}/matrices", 7, 9)
    room = Room()
    with monkeypatch.context() as away:

        def fail(*_: object) -> object:
            raise Unreachable("the store is away")

        away.setattr(object_storage.RemoteFolder, "exists", fail)
        task = room.tasks.open(replace(key, folder=f"{store}/matrices"), busy=set())
    assert "and is not saved: the store is away" in caplog.text
    room.write(task.index, 11, 20)
    room.tasks.save()
    (saved,) = matrices.all_in(f"{store}/matrices")
    assert saved.facts.rows == 2
