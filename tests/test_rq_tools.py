"""rq-dashboard and rq-exporter show a queue of trbatch: each in an environment of its own.

They need other versions of rq than trbatch does, and are what operators have already.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from echo_worker import EchoEngine

from trbatch import api
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue, ModelKey
from workers import submit, wait_for, work, working

pytestmark = pytest.mark.long

# What docs/operations.md says to install.
DASHBOARD = ("rq-dashboard==0.9.0", "six==1.17.0", "rq==2.12.0")
EXPORTER = ("rq-exporter==3.1.0", "rq==2.12.0")
MODEL = ModelKey("org/echo")


def environment(folder: Path, *packages: str) -> Path:
    """The folder of the programs of a new environment with these packages."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True, timeout=300)
    return folder / "bin"


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("dashboard"), *DASHBOARD) / "rq-dashboard"


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("exporter"), *EXPORTER) / "rq-exporter"


@contextmanager
def serving(port: int, *command: str | Path) -> Iterator[str]:
    """A server at a port of this host for as long as the context lasts."""
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        try:
            ask(url)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    try:
        wait_for(answers, timeout=60)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ask(url: str, *, post: bool = False) -> str:
    request = urllib.request.Request(url, data=b"" if post else None)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def fail_one(jobs: JobQueue, worker: LeaseWorker) -> str:
    """Let one chunk fail for good; returns its rq id."""
    lease = worker.take(jobs.queue(MODEL.queue_name))
    assert lease is not None
    assert worker.fail(lease, RuntimeError("the disk was unplugged"), final=True)
    return lease.job.id


@pytest.fixture
def name_of_queue(jobs: JobQueue) -> str:
    return MODEL.queue_name


def by_status(jobs: JobQueue) -> dict[str, int]:
    (info,) = jobs.queues()
    return {"queued": info.queued, "started": info.started, "failed": info.failed}


def test_the_exporter_counts_what_trbatch_counts(
    exporter: Path, jobs: JobQueue, worker: LeaseWorker, port: int, tmp_path: Path
) -> None:
    submit(tmp_path, rows=40)
    fail_one(jobs, worker)
    assert worker.take(jobs.queue(MODEL.queue_name)) is not None
    command = (exporter, "--redis-url", jobs.url, "--host", "127.0.0.1", "-p", port)
    with serving(port, *map(str, command)) as url:
        text = ask(f"{url}/metrics")
    pattern = r'^rq_jobs\{queue="([^"]+)",status="(\w+)"\} ([\d.]+)$'
    found = {(q, s): float(n) for q, s, n in re.findall(pattern, text, re.MULTILINE)}
    counts = by_status(jobs)
    assert counts == {"queued": 8, "started": 1, "failed": 1}
    assert {s: found[MODEL.queue_name, s] for s in counts} == counts
    workers = re.findall(r'^rq_workers\{name="([^"]+)".*state="(\w+)"\} 1.0$', text, re.MULTILINE)
    assert [name for name, _ in workers] == [worker.name]


@contextmanager
def dashboard_of(dashboard: Path, jobs: JobQueue, port: int, *flags: str) -> Iterator[Any]:
    command = [dashboard, "--json", "-u", jobs.url, "-b", "127.0.0.1", "-p", str(port), *flags]
    with serving(port, *command) as url:

        def data(path: str) -> Any:
            return json.loads(ask(f"{url}/0/data/{path}.json"))

        yield url, data


def test_the_dashboard_shows_chunks_and_workers(
    dashboard: Path, jobs: JobQueue, worker: LeaseWorker, port: int, tmp_path: Path
) -> None:
    job = submit(tmp_path, rows=40)
    failed = fail_one(jobs, worker)
    assert worker.take(jobs.queue(MODEL.queue_name)) is not None
    with dashboard_of(dashboard, jobs, port, "--disable-delete") as (url, data):
        (queue,) = data("queues")["queues"]
        counts = by_status(jobs)
        assert queue["name"] == MODEL.queue_name
        assert queue["count"] == counts["queued"]
        assert queue["started_job_registry_count"] == counts["started"]
        assert queue["failed_job_registry_count"] == counts["failed"]
        listed = data(f"jobs/{MODEL.queue_name}/queued/20/asc/1")["jobs"]
        assert [one["description"] for one in listed] == [
            f"{job.id} chunk {i}" for i in range(2, 10)
        ]
        one = data(f"job/{failed}")
        assert one["status"] == "failed"
        assert "the disk was unplugged" in one["exc_info"]
        (shown,) = data("workers")["workers"]
        assert shown["name"] == worker.name
        for path in ("", "0/view/workers", f"0/view/job/{failed}"):
            assert "RQ" in ask(f"{url}/{path}")
        for path in (f"job/{failed}/delete", f"queue/{MODEL.queue_name}/queued/empty"):
            assert json.loads(ask(f"{url}/{path}", post=True)) == {"status": "DISABLED"}
    assert by_status(jobs) == counts


@pytest.mark.parametrize(
    "path", [lambda rq_id: f"job/{rq_id}/requeue", lambda rq_id: f"requeue/{MODEL.queue_name}"],
    ids=["one", "all"],
)  # fmt: skip
def test_a_failed_chunk_that_the_dashboard_requeues_is_decoded(
    dashboard: Path,
    jobs: JobQueue,
    worker: LeaseWorker,
    port: int,
    tmp_path: Path,
    path: Callable[[str], str],
) -> None:
    job = submit(tmp_path, rows=12)
    failed = fail_one(jobs, worker)
    worker.close()
    with dashboard_of(dashboard, jobs, port, "--disable-delete") as (url, _):
        ask(f"{url}/{path(failed)}", post=True)
    work()
    assert job.status().state == "completed"


def test_a_queue_that_the_dashboard_empties_is_filled_again_by_resume(
    dashboard: Path, jobs: JobQueue, port: int, tmp_path: Path
) -> None:
    job = submit(tmp_path, rows=12)
    with dashboard_of(dashboard, jobs, port) as (url, _):
        ask(f"{url}/queue/{MODEL.queue_name}/queued/empty", post=True)
    assert job.status().state == "failed", "no chunk of it is in the queue"
    assert api.resume(job) == 3
    work()
    assert job.status().state == "completed"


def test_a_worker_loses_the_lease_of_a_chunk_that_the_dashboard_deletes(
    dashboard: Path, jobs: JobQueue, worker: LeaseWorker, port: int, tmp_path: Path
) -> None:
    job = submit(tmp_path, rows=12)
    lease = worker.take(jobs.queue(MODEL.queue_name))
    assert lease is not None and worker.holds(lease)
    with dashboard_of(dashboard, jobs, port) as (url, _):
        ask(f"{url}/job/{lease.job.id}/delete", post=True)
    assert not worker.holds(lease)
    worker.drop(lease)
    worker.close()
    work()
    assert job.status().state == "failed"
    assert api.resume(job) == 1
    work()
    assert job.status().state == "completed"


def test_a_worker_goes_on_while_the_dashboard_looks(
    dashboard: Path, jobs: JobQueue, port: int, tmp_path: Path
) -> None:
    job = submit(tmp_path, rows=40)
    with (
        dashboard_of(dashboard, jobs, port) as (_, data),
        working(EchoEngine(step_s=0.1), model="org/echo"),
    ):
        seen = set()
        while job.status().state != "completed":
            seen |= {one["state"] for one in data("workers")["workers"]}
            data("queues")
            time.sleep(0.05)
    assert "busy" in seen
