"""Prometheus metrics of a real worker on a tiny model, as a scrape sees them."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_sharing import LoadedTiny, prompts
from waiting import wait_for
from worker_tools import EchoEngine, Loaded, config, make_job, rows_of, submit

from trbatch import metrics as metrics_module
from trbatch.cli import commands
from trbatch.errors import UsageError
from trbatch.job import JobFolder
from trbatch.metrics import Metrics, Moment, metrics_on
from trbatch.queue import JobQueue, QueueInfo
from trbatch.queue_names import ModelKey
from trbatch.worker import BatchWorker

OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def served(port: int) -> Iterator[Metrics]:
    with metrics_on(port, "127.0.0.1") as found:
        yield found


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    with JobQueue.connect(redis_url) as found:
        yield found


def scrape(port: int) -> dict[str, float]:
    """Every sample by its name, labels behind it in the order of their names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={sample.labels[k]}" for k in sorted(sample.labels))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_scrape_tells_what_the_result_rows_tell(
    jobs: JobQueue, served: Metrics, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))
    rows = [*prompts(6), {"prompt": "5 " * 300}]  # the last one is too long
    job = submit(jobs, tmp_path, rows, sampling={"max_tokens": 12})
    worker = BatchWorker(config(jobs.url), jobs, LoadedTiny(), metrics=served)
    assert worker.run() == 0
    got, decoded = scrape(port), rows_of(job)

    def total(column: str) -> float:
        return sum(row[column] or 0 for row in decoded)

    ok = [row for row in decoded if row["finish_reason"] != "error"]
    assert got["trbatch_rows_total{outcome=ok}"] == len(ok) >= 6
    assert got["trbatch_rows_total{outcome=failed}"] == len(decoded) - len(ok) == 1
    assert got["trbatch_prompt_tokens_total"] == total("prompt_tokens")
    assert got["trbatch_completion_tokens_total"] == total("completion_tokens")
    assert got["trbatch_decode_forwards_total"] == total("num_spec_steps")
    assert got["trbatch_draft_tokens_total"] == total("num_draft_tokens") > 0
    assert got["trbatch_accepted_draft_tokens_total"] == total("num_accepted_draft_tokens")
    assert got["trbatch_decode_seconds_total"] == pytest.approx(total("decode_s"))
    progress = JobFolder.open(job.path).progress()
    assert got["trbatch_mean_acceptance_length"] == pytest.approx(progress.mean_acceptance_length)
    assert got["trbatch_draft_acceptance_ratio"] == pytest.approx(progress.draft_acceptance_rate)
    assert got["trbatch_speedup_ratio"] == pytest.approx(progress.speedup)
    assert got["trbatch_chunks_finished_total"] == job.manifest.chunks
    assert got["trbatch_leases_lost_total"] == got["trbatch_chunk_retries_total"] == 0
    (info,) = [name for name in got if name.startswith("trbatch_worker_info")]
    assert f"worker={worker.name}" in info
    assert "model=maker/echo" in info


def test_a_scrape_in_the_middle_of_work_sees_queue_pages_and_rows_in_flight(
    jobs: JobQueue, served: Metrics, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics_module, "QUEUES_S", 0.0)
    monkeypatch.setattr(metrics_module, "MOMENT_S", 0.0)
    monkeypatch.setattr("trbatch.engine_thread.STATS_S", 0.0)
    seen: list[dict[str, float]] = []
    submit(jobs, tmp_path, prompts(12), sampling={"max_tokens": 60, "ignore_eos": True})
    worker = BatchWorker(config(jobs.url, chunks_in_flight=1), jobs, LoadedTiny(), metrics=served)
    finish = worker._finish_chunks
    began = time.monotonic()

    def looking() -> None:
        seen.append(scrape(port))
        finish()

    monkeypatch.setattr(worker, "_finish_chunks", looking)
    worker.run()
    labels = "model=maker/echo,priority=normal"
    states = [f"trbatch_queue_chunks{{{labels},state={s}}}" for s in ("queued", "started")]
    assert {one.get(states[0]) for one in seen} >= {2.0, 1.0, 0.0}
    assert 1.0 in {one.get(states[1]) for one in seen}
    assert max(one["trbatch_rows_in_flight"] for one in seen) == 4
    assert max(one["trbatch_chunks_in_flight"] for one in seen) == 1
    used = [one["trbatch_kv_cache_usage_ratio"] for one in seen]
    assert 0 < max(value for value in used if not math.isnan(value)) <= 1
    busy = [one["trbatch_engine_busy_seconds_total"] for one in seen]
    assert busy == sorted(busy) and 0 < busy[-1] < time.monotonic() - began
    assert seen[-1]["trbatch_last_beat_timestamp_seconds"] > 1.7e9


@dataclass
class Queues:
    """Queues of one model that are said to hold so many chunks."""

    waiting: dict[str, int]  # by priority

    def queues(self) -> list[QueueInfo]:
        model = ModelKey("maker/echo")
        return [
            QueueInfo(model.queue_of(priority), model, priority, count, 1, 2, 1)
            for priority, count in sorted(self.waiting.items())
        ]


def test_the_queues_of_a_model_are_counted_by_priority_and_forgotten_when_they_are_gone(
    served: Metrics, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_module, "QUEUES_S", 0.0)
    monkeypatch.setattr(metrics_module, "MOMENT_S", 0.0)

    def counted(state: str) -> dict[str, float]:
        got = scrape(port)
        pattern = re.compile(rf"trbatch_queue_chunks\{{model=.*,priority=(.*),state={state}\}}")
        found = {name: pattern.fullmatch(name) for name in got}
        return {match[1]: got[name] for name, match in found.items() if match}

    queues = Queues({"high": 5, "normal": 100, "low": 0})
    served.moment(Moment(0, 0, 0, 0, {}), queues)
    assert counted("queued") == queues.waiting
    assert counted("started") == dict.fromkeys(queues.waiting, 1)
    assert counted("failed") == dict.fromkeys(queues.waiting, 2)
    served.moment(Moment(0, 0, 0, 0, {}), Queues({"normal": 7}))
    assert counted("queued") == {"normal": 7}
    served.moment(Moment(0, 0, 0, 0, {}), Queues({}))
    assert counted("queued") == counted("failed") == {}


def test_busy_seconds_go_on_when_another_engine_counts_anew(
    served: Metrics, port: int, monkeypatch: pytest.MonkeyPatch, jobs: JobQueue
) -> None:
    monkeypatch.setattr(metrics_module, "MOMENT_S", 0.0)
    for busy_s in (2.0, 5.0, 1.0, 1.5):  # the third is a new engine's first
        served.moment(Moment(0, 0, 0, 0, {"busy_s": busy_s}), jobs)
    assert scrape(port)["trbatch_engine_busy_seconds_total"] == 6.5


def test_failures_are_counted(
    jobs: JobQueue, served: Metrics, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_module, "MOMENT_S", 0.0)
    job = make_job(tmp_path, 8)
    jobs.enqueue(job, [0, 1])
    publish, failures = JobFolder.publish, [OSError("no space left")] * 2

    def sometimes(self: JobFolder, *args: object, **settings: object) -> str:
        if failures:
            raise failures.pop()
        return publish(self, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(JobFolder, "publish", sometimes)
    worker = BatchWorker(
        config(jobs.url), jobs, Loaded(lambda: EchoEngine(step_s=0.01)), metrics=served
    )
    lost: list[str] = []
    beat = worker._leases.beat

    def losing() -> list[object]:
        """The first lease is taken away once."""
        held = list(worker._leases.leases.values())
        if held and not lost:
            lost.append(held[0].id)
            jobs.connection.zrem(
                held[0].job.started_job_registry.key, held[0].execution.composite_key
            )
            worker._leases._last_beat -= 10
            retry = jobs.queue(held[0].queue.name)
            result = beat()
            held[0].job.retries_left = 2
            held[0].job.save()
            retry.enqueue_job(held[0].job)
            return list(result)
        return list(beat())

    monkeypatch.setattr(worker._leases, "beat", losing)
    worker.run()
    got = scrape(port)
    assert got["trbatch_publish_failures_total"] == 2
    assert got["trbatch_leases_lost_total"] == 1
    assert got["trbatch_chunk_retries_total"] == 1
    texts = {row["prompt_index"] for row in rows_of(job)}
    assert texts == set(range(8))


def test_a_port_that_is_taken_is_told(served: Metrics, port: int) -> None:
    with pytest.raises(UsageError, match=f"--metrics-port {port} on 127.0.0.1") as caught:
        metrics_on(port, "127.0.0.1")
    assert "a port of its own" in (caught.value.hint or "")


def test_without_a_port_nothing_listens_and_prometheus_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert type(metrics_on(0, "127.0.0.1")) is Metrics
    with pytest.raises(UsageError, match="prometheus_client"):
        metrics_on(1, "127.0.0.1")


def test_a_port_is_given_back(port: int) -> None:
    for _ in range(2):
        with metrics_on(port, "127.0.0.1"):
            scrape(port)


def test_the_worker_command_serves_them(redis_url: str, port: int, tmp_path: Path) -> None:
    """A process, from the command line to the scrape."""
    with JobQueue.connect(redis_url) as jobs:
        submit(jobs, tmp_path, 3)
    command = [sys.executable, str(Path(__file__).with_name("echo_worker.py")), "worker"]
    command += ["--model", "maker/echo", "--metrics-port", str(port)]
    environment = os.environ | {"TRBATCH_REDIS_URL": redis_url}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as worker:

        def done() -> bool:
            try:
                return scrape(port).get("trbatch_rows_total{outcome=ok}") == 3
            except OSError:
                return False

        try:
            wait_for(done, timeout=60)
            assert scrape(port)["process_resident_memory_bytes"] > 1e7
        finally:
            worker.terminate()
            assert worker.wait(60) == 143


def test_names_keep_to_the_conventions_and_are_documented(served: Metrics, port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    ours = {family.name: family for family in families if family.name.startswith("trbatch_")}
    assert len(ours) >= 20
    documented = set(re.findall(r"^\| `(trbatch_\w+)", OPERATIONS.read_text(), re.MULTILINE))
    assert documented == {
        name + ("_total" if family.type == "counter" else "") for name, family in ours.items()
    }
    for name, family in ours.items():
        assert re.fullmatch(r"trbatch(_[a-z]+)+", name)
        assert family.documentation.endswith(".")
        assert not re.search(r"_(ms|mb|percent|count)$", name)


def test_the_help_names_the_option() -> None:
    assert "worker" in commands.commands
    options = {option for p in commands.commands["worker"].params for option in p.opts}
    assert {"--metrics-port", "--metrics-host", "--log-format"} <= options
