"""The supervisor: whatever happens to a worker, its chunks go on and its GPU is free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from child import Child
from supervised import MODEL, alive, rows_of, submit, supervised
from waiting import wait_for

from trbatch.errors import WorkerError
from trbatch.job import JobFolder
from trbatch.queue import JobQueue
from trbatch.supervisor import Post, Supervisor


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    with JobQueue.connect(redis_url) as found:
        yield found


def texts_of(job: JobFolder) -> dict[int, str | None]:
    found = rows_of(job)
    texts = {row["prompt_index"]: row["text"] for row in found}
    assert len(texts) == len(found), "a row was published twice"
    return texts


def test_a_worker_decodes_and_its_parent_ends_with_its_exit_code(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(20)])
    with supervised(jobs.url, tmp_path / "log", "--burst") as worker:
        assert worker.wait() == 0
    assert texts_of(job) == {i: f"SAY {i}" for i in range(20)}


def test_the_parent_imports_no_torch() -> None:
    code = "import sys, trbatch.supervisor; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_killed_worker_is_replaced_and_its_chunks_go_on_at_once(
    jobs: JobQueue, tmp_path: Path
) -> None:
    """Its parent puts them back: nobody has to wait for a lease to run out."""
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(60)])
    with supervised(jobs.url, tmp_path / "log", env={"ECHO_STEP_S": "0.1"}) as worker:
        wait_for(lambda: len(rows_of(job)) >= 4)
        os.kill(worker.children()[0], signal.SIGKILL)
        begin = time.monotonic()
        wait_for(lambda: jobs.counts(job).started == 0, timeout=3)
        assert time.monotonic() - begin < 3.0
        wait_for(lambda: jobs.counts(job).finished == 8)
        assert "SIGKILL from outside" in worker.words
    assert texts_of(job) == {i: f"SAY {i}" for i in range(60)}
    assert {row["attempts"] for row in rows_of(job)} == {1, 2}
    assert all(row["error_code"] is None for row in rows_of(job))


def test_published_rows_are_not_decoded_again_after_a_kill(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(64)], chunk_size=64)
    with supervised(jobs.url, tmp_path / "log", env={"ECHO_STEP_S": "0.1"}) as worker:
        wait_for(lambda: len(rows_of(job)) >= 8)
        os.kill(worker.children()[0], signal.SIGKILL)
        kept = {row["prompt_index"] for row in rows_of(job)}
        wait_for(lambda: jobs.counts(job).finished == 1)
    assert set(texts_of(job)) == set(range(64))
    attempts = {row["prompt_index"]: row["attempts"] for row in rows_of(job)}
    assert len(kept) >= 8 and all(attempts[place] == 1 for place in kept)
    assert all(attempts[place] == 2 for place in set(range(64)) - kept)


def test_a_worker_dies_with_its_parent(jobs: JobQueue, tmp_path: Path) -> None:
    with supervised(jobs.url, tmp_path / "log") as worker:
        child = wait_for(worker.children)[0]
        wait_for(lambda: jobs.workers())
        worker.process.kill()
        worker.wait()
        wait_for(lambda: not alive(child), timeout=5)


def test_where_the_kernel_does_not_help_a_worker_looks_after_its_parent_itself(
    tmp_path: Path,
) -> None:
    pid = tmp_path / "pid"
    child = (
        "import os, pathlib, time; from trbatch import supervisor\n"
        "supervisor.LOOK_S, supervisor._PR_SET_PDEATHSIG = 0.05, -1\n"
        "supervisor.die_with_parent()\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with Child([sys.executable, "-c", parent]) as process:
        number = int(wait_for(lambda: pid.exists() and pid.read_text()))
        assert alive(number)
        process.kill()
    wait_for(lambda: not alive(number), timeout=5)


def test_a_successor_that_cannot_load_yet_is_tried_again(jobs: JobQueue, tmp_path: Path) -> None:
    """The GPU's memory may still be full of a predecessor; the model could be loaded before."""
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(60)])
    env = {"ECHO_STEP_S": "0.1", "ECHO_REFUSE_LOADS": "2 3", "ECHO_LOADS": str(tmp_path / "loads")}
    with supervised(jobs.url, tmp_path / "log", env=env) as worker:
        wait_for(lambda: len(rows_of(job)) >= 4)
        os.kill(worker.children()[0], signal.SIGKILL)
        wait_for(lambda: jobs.counts(job).finished == 8)
        assert worker.words.count("no memory left") == 2
    assert set(texts_of(job)) == set(range(60))


@pytest.mark.long
def test_a_worker_whose_model_takes_it_down_is_given_up_after_some_tries(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, ["say 1"])
    env = {"ECHO_LOADING": "die11", "ECHO_LOADS": str(tmp_path / "loads")}
    with supervised(jobs.url, tmp_path / "log", "--burst", env=env) as worker:
        assert worker.wait() == WorkerError.exit_code
        assert "died 5 times before its model stood, at last by SIGSEGV" in worker.words
        assert "hint:" in worker.words and "Traceback" not in worker.words
    assert len((tmp_path / "loads").read_text().splitlines()) == 5
    assert (jobs.counts(job).queued, jobs.counts(job).failed) == (1, 0)


def test_a_wrong_option_is_told_once(jobs: JobQueue, tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-model")
    with supervised(jobs.url, tmp_path / "log", "--model", missing) as worker:
        assert worker.wait() == 2
        assert worker.words.count("error:") == 1


def test_each_gpu_gets_a_worker_that_sees_no_other(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(400)])
    env = {"ECHO_LOADS": str(tmp_path / "loads"), "CUDA_VISIBLE_DEVICES": "GPU-7,GPU-8,GPU-9"}
    with supervised(
        jobs.url, tmp_path / "log", "--gpu", "0,2", "--burst", env=env | {"ECHO_STEP_S": "0.05"}
    ) as worker:
        assert worker.wait() == 0
    seen = {line.split()[1] for line in (tmp_path / "loads").read_text().splitlines()}
    assert seen == {"GPU-7", "GPU-9"}
    names = {row["worker"].rpartition("-gpu")[2].partition("-")[0] for row in rows_of(job)}
    assert names == {"GPU"}
    assert len({row["worker"] for row in rows_of(job)}) == 2
    assert set(texts_of(job)) == set(range(400))


def test_the_queue_of_the_command_line_reaches_the_worker_by_its_environment(
    jobs: JobQueue, tmp_path: Path
) -> None:
    url = jobs.url
    with supervised("redis://127.0.0.1:1", tmp_path / "log", f"--redis-url={url}") as worker:
        child = wait_for(worker.children)[0]
        wait_for(lambda: jobs.workers())
        arguments = Path(f"/proc/{child}/cmdline").read_text()
        assert url not in arguments


# --- stopping ---


def test_the_first_signal_finishes_what_was_taken(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(200)])
    with supervised(jobs.url, tmp_path / "log", env={"ECHO_STEP_S": "0.1"}) as worker:
        wait_for(lambda: jobs.counts(job).finished >= 1)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait() == 143
    counts = jobs.counts(job)
    assert counts.started == counts.failed == 0 and counts.queued > 0
    assert len(texts_of(job)) == 8 * counts.finished
    assert jobs.workers() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_second_signal_hands_back_and_keeps_finished_rows(
    jobs: JobQueue, tmp_path: Path, number: int
) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(400)], chunk_size=400)
    with supervised(jobs.url, tmp_path / "log", env={"ECHO_STEP_S": "0.2"}) as worker:
        wait_for(lambda: len(rows_of(job)) >= 4)
        worker.process.send_signal(number)
        time.sleep(0.8)
        begin = time.monotonic()
        worker.process.send_signal(number)
        assert worker.wait() == 128 + number
        assert time.monotonic() - begin < 5.0
    assert jobs.counts(job).queued == 1
    assert 4 <= len(texts_of(job)) < 400


def test_what_is_not_finished_within_the_grace_is_handed_back(
    jobs: JobQueue, tmp_path: Path
) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(400)], chunk_size=400)
    with supervised(
        jobs.url, tmp_path / "log", "--grace=1.5", env={"ECHO_STEP_S": "0.2"}
    ) as worker:
        wait_for(lambda: len(rows_of(job)) >= 4)
        before = len(rows_of(job))
        begin = time.monotonic()
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait() == 143
        assert 1.0 < time.monotonic() - begin < 6.0
    assert jobs.counts(job).queued == 1
    assert len(texts_of(job)) >= before + 8, "it went on for the time of the grace"


@pytest.mark.long
def test_a_worker_gives_its_gpu_back_at_the_hour(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(400)], chunk_size=400)
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 6))
    with supervised(
        jobs.url, tmp_path / "log", f"--until={soon}", "--grace=0.5", env={"ECHO_STEP_S": "0.2"}
    ) as worker:
        assert worker.wait() == 0
    assert jobs.counts(job).queued == 1
    assert 0 < len(texts_of(job)) < 400


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_worker_that_somebody_stops_alone_is_replaced(
    jobs: JobQueue, tmp_path: Path, number: int
) -> None:
    with supervised(jobs.url, tmp_path / "log") as worker:
        first = wait_for(worker.children)[0]
        wait_for(lambda: jobs.workers())
        os.kill(first, number)
        wait_for(lambda: worker.children() not in ([], [first]))


def test_a_worker_that_does_not_stop_is_killed(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    monkeypatch.setattr("trbatch.supervisor.COMMAND", (sys.executable, "-c", deaf))
    monkeypatch.setattr("trbatch.supervisor.LEAVE_S", 0.3)
    supervisor = Supervisor([Post("deaf")], [], redis_url=redis_url, grace_s=0.2)
    supervisor._ask(signal.SIGTERM)
    supervisor._workers[0].due = 0.0
    supervisor._start(supervisor._workers[0])
    time.sleep(0.5)
    assert supervisor.run() == 143


def test_the_model_of_a_worker_is_named_in_its_child(jobs: JobQueue, tmp_path: Path) -> None:
    with supervised(jobs.url, tmp_path / "log", "--model", MODEL) as worker:
        child = wait_for(worker.children)[0]
        wait_for(lambda: f"--model={MODEL}" in Path(f"/proc/{child}/cmdline").read_text())
