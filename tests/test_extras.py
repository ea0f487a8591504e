"""On a machine that has only the client nothing that decodes begins, and nothing fails for it."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from job_tools import write_lines
from worker_tools import MODEL, Loaded, config, submit

import trbatch
from trbatch import cli
from trbatch.config import WorkerConfig
from trbatch.errors import MissingExtra, WorkerError
from trbatch.queue import JobQueue
from trbatch.worker import run_worker


@pytest.fixture
def client_only(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_torch(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "torch" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_torch)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])


def test_a_worker_without_torch_takes_nothing_from_the_queue(
    home: Path, tmp_path: Path, client_only: None
) -> None:
    rows = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    job = trbatch.submit(rows, model="org/echo")
    result = invoke("worker", "--burst")
    assert result.exit_code == 2
    assert "`trbatch worker` needs torch, which is not installed here" in result.stderr
    assert "hint: pip install 'trbatch[worker]'" in result.stderr
    chunks = job.status().chunks
    assert (chunks.queued, chunks.failed) == (1, 0)
    with pytest.raises(MissingExtra):
        trbatch.api.work(WorkerConfig(burst=True))


def test_what_decodes_says_at_once_that_it_cannot(
    home: Path, tmp_path: Path, client_only: None
) -> None:
    rows = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    for command in (("run", rows), ("bench", "speed", "--prompts", rows)):
        result = invoke(*command, "--model", "org/echo")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "needs torch" in result.stderr
    assert not list((home / "jobs").glob("*")), "a job was made that nobody here can decode"
    with pytest.raises(MissingExtra, match=r"trbatch\.generate needs torch"):
        trbatch.generate(["a"])


def test_a_package_that_a_machine_lacks_is_no_fault_of_the_model(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, 12)
    lacking = Loaded(refuse={MODEL: ModuleNotFoundError("No module named 'einops'")})
    with pytest.raises(WorkerError, match="einops"):
        run_worker(config(jobs.url, model=""), load=lacking)
    counts = jobs.counts(job)
    assert (counts.queued, counts.failed) == (3, 0)
