"""Job folders in an object store, against a real server of the S3 protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from child import Child
from click.testing import CliRunner, Result
from echo_worker import EchoEngine
from s3_server import S3Server
from waiting import wait_for

from trbatch import api, cli
from trbatch.config import WorkerConfig
from trbatch.errors import Unreachable, UsageError
from trbatch.job import JobFolder
from trbatch.object_storage import RemoteFolder
from trbatch.queue import JobQueue
from trbatch.storage import folder
from trbatch.worker import run_worker

TESTS = Path(__file__).parent


def write_prompts(tmp_path: Path, count: int) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(count)))
    return file


def submit(tmp_path: Path, bucket: str, count: int = 20, **settings: Any) -> api.Job:
    values = {"out": f"s3://{bucket}/jobs", "name": "job", "model": "maker/echo", "chunk_size": 4}
    return api.submit(write_prompts(tmp_path, count), **(values | settings))


def work(**settings: Any) -> int:
    config = WorkerConfig(burst=True, publish_s=0.05, model="maker/echo", **settings)
    return run_worker(config, load=lambda model: EchoEngine())


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.commands, arguments)


def collected(job: api.Job, file: Path) -> list[str]:
    receipt = job.collect(file)
    assert receipt.complete
    return [str(text) for text in pq.read_table(file)["text"].to_pylist()]


def expected(count: int) -> list[str]:
    return [f"SAY {i}" for i in range(count)]


def test_a_job_goes_all_its_way_in_a_bucket(
    home: Path, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    job = submit(tmp_path, bucket)
    assert work() == 0
    output = f"s3://{bucket}/answers/out.parquet"
    receipt = job.collect(output)
    assert str(receipt) == "complete: 20 rows in = 20 ok + 0 failed + 0 cancelled, each id once"
    parent, name = folder(f"s3://{bucket}/answers"), "out.parquet"
    with parent.open(name) as file:
        assert pq.read_table(file)["text"].to_pylist() == expected(20)
    assert folder(job.path).exists("_SUCCESS")


def test_the_end_of_an_object_is_read_alone(s3: S3Server, bucket: str) -> None:
    root = folder(f"s3://{bucket}/ends")
    root.write("a", bytes(range(100)))
    assert root.tail("a", 3) == bytes([97, 98, 99])
    assert root.tail("a", 1000) == bytes(range(100)), "of a shorter one all"
    with pytest.raises(FileNotFoundError):
        root.tail("b", 3)


def test_every_object_is_one_put_and_nothing_is_copied_or_renamed(
    home: Path, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    submit(tmp_path, bucket)
    work()
    asked = s3.requests(bucket)
    puts = Counter(path for verb, path in asked if verb == "PUT")
    assert set(puts.values()) == {1}
    assert {path.split("/")[2] for path in puts} == {"manifest.json", "chunks", "segments"}
    assert not [path for verb, path in asked if verb in ("POST", "DELETE")]
    assert len([path for path in puts if path.startswith("jobs/job/segments/")]) >= 1


def test_what_a_killed_worker_published_is_not_decoded_again(
    redis_url: str, bucket: str, tmp_path: Path
) -> None:
    job = submit(tmp_path, bucket, 40, chunk_size=40)
    command = [sys.executable, str(TESTS / "echo_worker.py"), "worker", "--model", "maker/echo"]
    environment = os.environ | {"ECHO_STEP_S": "0.8", "TRBATCH_REDIS_URL": redis_url}
    with Child(
        [*command, "--publish-seconds", "0.2"], env=environment, stderr=subprocess.DEVNULL
    ) as worker:
        wait_for(lambda: JobFolder.open(job.path).progress().rows_ok >= 8)
        worker.kill()
    time.sleep(0.5)  # its children go with it
    kept = JobFolder.open(job.path).progress().rows_ok
    assert 8 <= kept < 40
    with JobQueue.connect(redis_url) as jobs:
        jobs.connection.flushall()  # the queue is lost as well: the folder is the truth
    assert api.Job.open(job.path).resume() == 1
    decoded: list[EchoEngine] = []

    def load(model: object) -> EchoEngine:
        decoded.append(CountingEngine())
        return decoded[-1]

    run_worker(WorkerConfig(burst=True, publish_s=0.05, model="maker/echo"), load=load)
    assert decoded[0].asked == 40 - kept  # type: ignore[attr-defined]
    assert collected(api.Job.open(job.path), tmp_path / "out.parquet") == expected(40)


class CountingEngine(EchoEngine):
    """Counts the requests that it is given."""

    asked = 0

    def add(self, request: Any) -> None:
        self.asked += 1
        super().add(request)


def test_the_store_of_the_environment_may_be_a_bucket(
    home: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_STORE", f"s3://{bucket}/nightly")
    done = invoke("submit", str(write_prompts(tmp_path, 3)), "--name", "n", "--model", "maker/echo")
    assert (done.exit_code, done.stdout) == (0, "n\n"), done.output
    work()
    status = json.loads(invoke("status", "n", "--json").stdout)
    assert status["path"] == f"s3://{bucket}/nightly/n"
    assert status["state"] == "completed"
    assert invoke("collect", "n", "-o", str(tmp_path / "out.parquet")).exit_code == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 3


def test_the_input_may_lie_in_the_bucket_too(home: Path, bucket: str, tmp_path: Path) -> None:
    text = write_prompts(tmp_path, 3).read_bytes()
    folder(f"s3://{bucket}/in").write("prompts.jsonl", text)
    settings = {"out": f"s3://{bucket}/jobs", "model": "maker/echo", "name": "job"}
    job = api.submit(f"s3://{bucket}/in/prompts.jsonl", **settings)
    work()
    assert collected(job, tmp_path / "out.parquet") == expected(3)
    assert api.submit(f"s3://{bucket}/in/prompts.jsonl", **settings).folder.continued


def test_of_many_that_create_an_object_one_does(bucket: str) -> None:
    """Also when nobody sees it coming: all of them ask before any of them writes."""
    place = f"s3://{bucket}/race"
    ready = threading.Barrier(8)
    won: list[bytes] = []

    def create(data: bytes) -> None:
        here = folder(place)
        ready.wait()
        if here.create("manifest.json", data):
            won.append(data)

    threads = [threading.Thread(target=create, args=(b"%d" % i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [folder(place).read("manifest.json")]


def test_an_object_whose_put_was_answered_too_late_is_ours_all_the_same(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder(f"s3://{bucket}/late")
    assert isinstance(here, RemoteFolder)
    put = here._files.pipe_file

    def twice(*arguments: Any, **settings: Any) -> None:
        """What a library does that got no answer to its first put."""
        put(*arguments, **settings)
        put(*arguments, **settings)

    monkeypatch.setattr(here._files, "pipe_file", twice)
    assert here.create("manifest.json", b"mine")
    assert not here.create("manifest.json", b"another's")
    assert here.read("manifest.json") == b"mine"


def test_a_folder_in_a_bucket_lists_and_removes(bucket: str) -> None:
    here = folder(f"s3://{bucket}/job")
    assert here.names("chunks") == here.folders("") == []
    for name in ("b", "a", "deep/c"):
        here.write(f"chunks/{name}", b"xyz")
    assert here.names("chunks") == ["a", "b"]
    assert here.folders("chunks") == ["deep"]
    assert here.stat("chunks/a").size == 3
    assert abs(here.stat("chunks/a").modified - time.time()) < 60
    here.remove("chunks")
    here.remove("chunks")
    assert here.names("chunks") == []
    with pytest.raises(FileNotFoundError):
        here.stat("chunks/a")


def test_a_file_in_a_bucket_appears_only_when_it_is_whole(bucket: str) -> None:
    here = folder(f"s3://{bucket}/job")

    def interrupted() -> None:
        with here.writing("data") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not here.exists("data")


def test_a_bucket_that_is_not_there_is_unreachable(home: Path, bucket: str, tmp_path: Path) -> None:
    arguments = ("submit", str(write_prompts(tmp_path, 3)), "--model", "maker/echo")
    done = invoke(*arguments, "--store", "s3://no-such-bucket/jobs")
    assert done.exit_code == 75
    assert "cannot write s3://no-such-bucket/jobs/" in done.stderr
    assert "Traceback" not in done.output


def test_a_server_that_is_away_is_unreachable(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    away = s3fs.S3FileSystem(
        endpoint_url="http://127.0.0.1:1",
        config_kwargs={"retries": {"max_attempts": 0}, "connect_timeout": 1},
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    away.retries = 1
    here = folder(f"s3://{bucket}/job")
    monkeypatch.setattr(here, "_files", away)
    for ask in (here.exists, here.read, here.names, here.remove, here.stat):
        with pytest.raises(Unreachable, match=f"s3://{bucket}/job/x: .*127.0.0.1:1"):
            ask("x")
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1"):
        here.create("x", b"")


def test_a_kind_of_store_that_is_not_installed_says_what_to_install() -> None:
    with pytest.raises(UsageError, match="gs://") as caught:
        folder("gs://bucket/jobs")
    assert caught.value.hint == "pip install gcsfs"
