"""rq-dashboard and rq-exporter show a queue of trbatch: each in an environment of its own.

They need other versions of rq than trbatch does, and are what operators have already. What is
installed and run is what docs/operations.md says: the first and the second command of its blocks.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from echo_worker import EchoEngine
from sh_blocks import found
from waiting import wait_for

from trbatch import api
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue, ModelKey
from workers import submit, work, working

pytestmark = pytest.mark.long

PAGE = "docs/operations.md"
MODEL = ModelKey("org/echo")


@dataclass(frozen=True)
class Tool:
    """An installed tool: its folder, and the command that starts it as the page has it."""

    folder: Path
    command: str

    def words(self, url: str, port: int) -> list[str]:
        """The command for this queue and this port of its own."""
        command = self.command.replace("redis://queue-host:6379", url)
        assert url in command, "the page names another queue"
        program, *rest = shlex.split(command)
        return [str(self.folder / program), *rest, "-p", str(port)]  # the last one counts


def installed(folder: Path, key: str) -> Tool:
    """Run the first command of the page's block that begins like this, in a folder."""
    install, start = found(PAGE, key).splitlines()
    environment = os.environ | {
        "PATH": f"{sys.base_prefix}/bin:{os.environ['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_QUIET": "1",
    }
    subprocess.run(["bash", "-euc", install], cwd=folder, env=environment, check=True, timeout=300)
    return Tool(folder, start)


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Tool:
    return installed(tmp_path_factory.mktemp("tool"), "python3 -m venv dashboard")


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Tool:
    return installed(tmp_path_factory.mktemp("tool"), "python3 -m venv exporter")


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
    exporter: Tool, jobs: JobQueue, worker: LeaseWorker, port: int, tmp_path: Path
) -> None:
    submit(tmp_path, rows=40)
    fail_one(jobs, worker)
    assert worker.take(jobs.queue(MODEL.queue_name)) is not None
    with serving(port, *exporter.words(jobs.url, port)) as url:
        text = ask(f"{url}/metrics")
    pattern = r'^rq_jobs\{queue="([^"]+)",status="(\w+)"\} ([\d.]+)$'
    found = {(q, s): float(n) for q, s, n in re.findall(pattern, text, re.MULTILINE)}
    counts = by_status(jobs)
    assert counts == {"queued": 8, "started": 1, "failed": 1}
    assert {s: found[MODEL.queue_name, s] for s in counts} == counts
    workers = re.findall(r'^rq_workers\{name="([^"]+)".*state="(\w+)"\} 1.0$', text, re.MULTILINE)
    assert [name for name, _ in workers] == [worker.name]


@contextmanager
def dashboard_of(
    dashboard: Tool, jobs: JobQueue, port: int, *, deleting: bool = False
) -> Iterator[Any]:
    """The page's command; `deleting`: without the flag that forbids it."""
    command = dashboard.words(jobs.url, port)
    assert "--disable-delete" in command
    if deleting:
        command.remove("--disable-delete")
    with serving(port, *command) as url:

        def data(path: str) -> Any:
            return json.loads(ask(f"{url}/0/data/{path}.json"))

        yield url, data


def test_the_dashboard_shows_chunks_and_workers(
    dashboard: Tool, jobs: JobQueue, worker: LeaseWorker, port: int, tmp_path: Path
) -> None:
    job = submit(tmp_path, rows=40)
    failed = fail_one(jobs, worker)
    assert worker.take(jobs.queue(MODEL.queue_name)) is not None
    with dashboard_of(dashboard, jobs, port) as (url, data):
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
    dashboard: Tool,
    jobs: JobQueue,
    worker: LeaseWorker,
    port: int,
    tmp_path: Path,
    path: Callable[[str], str],
) -> None:
    job = submit(tmp_path, rows=12)
    failed = fail_one(jobs, worker)
    worker.close()
    with dashboard_of(dashboard, jobs, port) as (url, _):
        ask(f"{url}/{path(failed)}", post=True)
    work()
    assert job.status().state == "completed"


def test_a_queue_that_the_dashboard_empties_is_filled_again_by_resume(
    dashboard: Tool, jobs: JobQueue, port: int, tmp_path: Path
) -> None:
    job = submit(tmp_path, rows=12)
    with dashboard_of(dashboard, jobs, port, deleting=True) as (url, _):
        ask(f"{url}/queue/{MODEL.queue_name}/queued/empty", post=True)
    assert job.status().state == "failed", "no chunk of it is in the queue"
    assert api.resume(job) == 3
    work()
    assert job.status().state == "completed"


def test_a_worker_loses_the_lease_of_a_chunk_that_the_dashboard_deletes(
    dashboard: Tool, jobs: JobQueue, worker: LeaseWorker, port: int, tmp_path: Path
) -> None:
    job = submit(tmp_path, rows=12)
    lease = worker.take(jobs.queue(MODEL.queue_name))
    assert lease is not None and worker.holds(lease)
    with dashboard_of(dashboard, jobs, port, deleting=True) as (url, _):
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
    dashboard: Tool, jobs: JobQueue, port: int, tmp_path: Path
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
