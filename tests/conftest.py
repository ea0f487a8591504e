"""What several test files share: a home of their own with its own embedded server."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import redis
import s3_server
from job_tools import prompts, write_lines
from queue_tools import open_worker

from trbatch import server
from trbatch.config import JobSpec
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue

if not Path("/dev/nvidiactl").exists():
    # The kernels run in Triton's interpreter, which must be known before anyone imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Under nohup. What tests start would ignore it as well; a handler is not passed on.
    signal.signal(signal.SIGHUP, lambda *_: None)

OUTSIDE = ("TRBATCH_REDIS_URL", "REDIS_URL", "TRBATCH_MODEL", "TRBATCH_STORE", "TRBATCH_SERVER")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make` looks for these marks in the files and imports no others."""
    for item in items:
        for mark in {"long", "alone", "torture"} & {mark.name for mark in item.iter_markers()}:
            if f"pytest.mark.{mark}" not in _text_of(item.path):
                raise pytest.UsageError(f"{item.nodeid}: spell pytest.mark.{mark} out in its file")


@cache
def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def nobodys_home() -> Iterator[None]:
    """What a test without a `home` of its own would start or leave is not in the user's."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        patch.setenv("TRBATCH_HOME", folder)
        yield
        server.stop()


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private `TRBATCH_HOME` with nothing of the user's; its server, if started, is stopped."""
    folder = Path(tempfile.mkdtemp(prefix="trb-", dir="/tmp"))
    monkeypatch.setenv("TRBATCH_HOME", str(folder))
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    yield folder
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def redis_url(home: Path) -> str:
    """The URL of a running embedded server that belongs to this test alone."""
    return server.ensure()


@pytest.fixture
def jobs(redis_url: str) -> Iterator[JobQueue]:
    """A connection to that server's queue."""
    with JobQueue.connect(redis_url) as found:
        yield found


@pytest.fixture
def worker(jobs: JobQueue) -> Iterator[LeaseWorker]:
    """What a worker says to the queue, without its loop; `other` is a second one."""
    yield from open_worker(jobs, "worker")


@pytest.fixture
def other(jobs: JobQueue) -> Iterator[LeaseWorker]:
    yield from open_worker(jobs, "other")


@pytest.fixture
def full_disk(redis_url: str) -> Iterator[str]:
    """A server that could not save, and refuses what writes as it does when its disk is full."""
    in_the_way = server.status().folder / "dump.rdb"
    (in_the_way / "below").mkdir(parents=True)
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("save", "3600 1")
        client.bgsave()
        while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
            pass
        yield redis_url


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A job of 10 rows in chunks of 4."""
    path = write_lines(tmp_path / "in.jsonl", *prompts(10))
    return JobSpec(input=str(path), out=str(tmp_path / "store"), model="m", chunk_size=4)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3Server]:
    """A server of the S3 protocol for all tests; `bucket` is a place of one's own in it."""
    with s3_server.running(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def bucket(s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty bucket; this process and its children find the server by themselves."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # a test before may have asked without credentials
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{secrets.token_hex(4)}"
    s3.make_bucket(name)
    return name


@pytest.fixture(scope="session")
def small_model() -> Path:
    """The folder of the small real model; fetched and converted by the first test that needs it."""
    from trbatch import models  # its own imports are light; torch comes with the first conversion

    return models.small_model()


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a tiny model, and a cache of its own; see `tiny_files`."""
    from tiny_files import write_model  # it imports torch

    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tiny-model"
    write_model(folder)
    return folder


@pytest.fixture
def own_costs(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that has the models and no step costs: they are timed when they are used."""
    folder, kept = tmp_path / "cache", small_model.parent.parent
    folder.mkdir()
    for name in ("models", "bigrams"):  # which take minutes
        (kept / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(kept / name)
    monkeypatch.setenv("TRBATCH_CACHE", str(folder))
    return folder


ROOT = Path(__file__).parent.parent
SPEC_BENCH = ROOT.parent / "shared" / "data" / "spec_bench.jsonl"


@pytest.fixture(scope="session")
def spec_bench() -> Path:
    """The prompts of Spec-Bench, which do not come with the repository."""
    if not SPEC_BENCH.is_file():
        pytest.skip("shared/data/spec_bench.jsonl is absent beside the repository")
    return SPEC_BENCH


@pytest.fixture(scope="session")
def real_prompts() -> Path:
    """Spec-Bench, else the hundred prompts that come with the repository."""
    own = ROOT / "docs" / "measurements" / "prompts-of-another-kind.jsonl"
    return SPEC_BENCH if SPEC_BENCH.is_file() else own
