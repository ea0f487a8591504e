"""A worker that is asked to stop, or killed: what it took is finished, handed back or redone."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from child import Child
from waiting import wait_for
from worker_tools import (
    MODEL,
    Background,
    EchoEngine,
    Loaded,
    config,
    expected,
    rows_of,
    start_process,
    submit,
    texts_of,
)

from trbatch.engine_events import Finished
from trbatch.engine_thread import EngineThread
from trbatch.job import JobFolder
from trbatch.queue import JobQueue
from trbatch.queue_names import ModelKey
from trbatch.stopping import SAME_SIGNAL_S
from trbatch.worker import BatchWorker, run_worker


def test_one_signal_finishes_what_was_taken_and_leaves_the_rest(
    jobs: JobQueue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="trbatch.worker")
    job = submit(jobs, tmp_path, 60, chunk_size=4)
    worker = Background(jobs.url, Loaded(lambda: EchoEngine(capacity=4, step_s=0.02)))
    wait_for(lambda: jobs.counts(job).finished >= 1)
    assert worker.stop() == 128 + signal.SIGTERM
    counts = jobs.counts(job)
    assert counts.started == counts.failed == 0
    assert counts.queued > 0
    assert re.search(r"asked to stop; in flight: \d chunks?, to be finished within", caplog.text)
    assert len(texts_of(job)) == 4 * counts.finished
    assert jobs.workers() == []


def test_a_signal_that_outlasts_a_wait_for_the_engine_does_not_make_it_endless() -> None:
    """So does one that comes while the engine holds Python's lock at the end of the wait."""
    before = signal.signal(signal.SIGALRM, lambda *_: time.sleep(0.3))
    unheard = threading.Timer(5.0, lambda: thread.events.put(Finished([])))
    thread = EngineThread(Loaded())
    try:
        unheard.start()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert thread.next_events(0.2) == []
    finally:
        signal.signal(signal.SIGALRM, before)
        unheard.cancel()


def test_two_signals_hand_back_what_was_taken_and_keep_what_is_done(
    jobs: JobQueue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="trbatch.worker")
    job = submit(jobs, tmp_path, 40, chunk_size=20)
    load = Loaded(lambda: EchoEngine(capacity=2, step_s=0.05))
    worker = Background(jobs.url, load, publish_s=60.0)
    wait_for(lambda: worker.worker._publisher.rows >= 2)
    begin = time.monotonic()
    assert worker.stop(times=2) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 2.0
    counts = jobs.counts(job)
    assert (counts.queued, counts.started, counts.failed) == (2, 0, 0)
    assert "handed back with all finished rows kept" in caplog.text
    assert 2 <= len(texts_of(job)) < 40
    assert load.engine.saved == 1
    run_worker(config(jobs.url), load=Loaded())
    assert texts_of(job) == expected(40)
    assert {row["attempts"] for row in rows_of(job)} == {1}


def test_the_third_signal_waits_for_no_step(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, 4)
    worker = Background(jobs.url, Loaded(lambda: EchoEngine(step_s=6.0)))
    wait_for(lambda: jobs.counts(job).started)
    begin = time.monotonic()
    worker.worker.stop.count = 3
    worker.thread.join(20)
    assert time.monotonic() - begin < 3.0
    worker.worker._leases.close()  # which is left to the end of the process
    worker.jobs.close()


def test_the_same_signal_passed_on_twice_counts_once(jobs: JobQueue) -> None:
    worker = BatchWorker(config(jobs.url), jobs, Loaded())
    worker.stop.ask(signal.SIGINT)
    worker.stop.ask(signal.SIGINT)
    assert worker.stop.count == 1
    assert worker.stop.exit_code == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_stops_cleanly_on_a_signal(
    jobs: JobQueue, tmp_path: Path, number: int, code: int
) -> None:
    job = submit(jobs, tmp_path, 60, chunk_size=4)
    with start_process(jobs) as process:
        wait_for(lambda: jobs.counts(job).finished)
        process.send_signal(number)
        assert process.wait(20) == code
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert jobs.counts(job).started == 0
    assert len(texts_of(job)) == 4 * jobs.counts(job).finished


def test_what_a_killed_worker_held_is_decoded_by_the_next(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(jobs, tmp_path, 24, chunk_size=12)
    with start_process(jobs) as process:
        wait_for(lambda: JobFolder.open(job.path).progress().rows_ok >= 2)
        process.kill()
    assert jobs.counts(job).started >= 1
    wip = jobs.queue(ModelKey(MODEL).queue_name).started_job_registry.key
    for member in jobs.connection.zrange(wip, 0, -1):
        jobs.connection.zadd(wip, {member: time.time() - 1})  # half a minute goes by
    worker = Background(jobs.url, Loaded())
    # Killed while it cleans or takes a chunk, it leaves what stays for LOCK_S and STUCK_S.
    wait_for(lambda: jobs.counts(job).finished == 2)
    worker.stop()
    assert texts_of(job) == expected(24)


LEAVING = """
import atexit, threading, time
from trbatch.stopping import ENGINE_THREAD, leaving
atexit.register(print, "torn down")
if {busy}:
    threading.Thread(target=time.sleep, args=(60,), name=ENGINE_THREAD, daemon=True).start()
with leaving():
    print("leaves")
    {way}
"""


@pytest.mark.parametrize(("busy", "said"), [(True, "leaves\n"), (False, "leaves\ntorn down\n")])
@pytest.mark.parametrize(
    ("way", "code", "words"),
    [
        ("raise SystemExit(143)", 143, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("pass", 0, ""),
    ],
)
def test_a_process_whose_engine_is_busy_leaves_without_tearing_it_down(
    busy: bool, said: str, way: str, code: int, words: str
) -> None:
    script = LEAVING.format(busy=busy, way=way)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, said)
    assert done.stderr.strip().rpartition("\n")[2] == words


def test_a_third_ctrl_c_in_the_middle_of_a_step_tears_nothing_down(
    jobs: JobQueue, tmp_path: Path
) -> None:
    """The command line shows an interrupt and ends: that way, too, goes past Python's end."""
    job = submit(jobs, tmp_path, 8)
    code = textwrap.dedent(
        f"""
        import atexit, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import worker_tools
        from trbatch import cli, flight, worker
        atexit.register(print, "torn down")
        worker.load_engine = lambda config, model: worker_tools.EchoEngine(step_s=60.0)
        flight.FlightRecord.inherited = classmethod(lambda cls: cls.create())
        sys.argv = ["trbatch", "worker", "--redis-url", {jobs.url!r}]
        cli.main()
        """
    )
    with Child(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: jobs.counts(job).started, timeout=30)
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(SAME_SIGNAL_S + 0.2)
        out, words = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "stopped; the same command again goes on" in words
    assert "Traceback" not in words
