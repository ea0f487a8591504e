"""A Redis that somebody hostile writes to: nothing is executed, nothing read outside the roots, and
the worker goes on with honest work.

One worker lives through all of it. What this process opens, unpickles, runs and connects to is
watched through Python's own audit events.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from rq import Queue
from rq.serializers import JSONSerializer
from waiting import wait_for
from worker_tools import Background, Loaded, expected, make_job, rows_of, texts_of

from trbatch import cli, server
from trbatch.chunk_job import LARGEST, ChunkJob, inflated
from trbatch.chunk_lease import BadChunk
from trbatch.confinement import Confinement
from trbatch.job import JobFolder
from trbatch.queue import FUNCTION, MODELS_KEY, JobQueue
from trbatch.queue_names import ModelKey, index_key
from trbatch.suspects import Suspects

MODEL = ModelKey("maker/echo")


class Watch:
    """Audit events while it is on. A hook cannot be removed, so there is one for ever."""

    def __init__(self) -> None:
        self.on = False
        self.outside = ""
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("open", "os.listdir", "os.scandir"):
            if self.outside in str(arguments[0]):
                self.seen.append(f"{event} {arguments[0]}")
        elif event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec"):
            self.seen.append(f"{event} {arguments}")
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            self.seen.append(f"{event} {arguments[1]}")


watch = Watch()


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/trbatch-was-here",)


@dataclass
class Scene:
    """A worker that may read one store, a secret job outside of it, and a hostile client."""

    folder: Path
    jobs: JobQueue
    hostile: redis.Redis
    worker: Background
    secret: JobFolder
    honest: int = 0
    queue: Queue = field(init=False)

    def __post_init__(self) -> None:
        self.queue = Queue(MODEL.queue_name, connection=self.hostile, serializer=JSONSerializer)

    def push(self, *arguments: Any, function: str = FUNCTION, **fields: Any) -> str:
        """An entry at the head of the worker's queue, with these fields written over its own."""
        job = Queue.prepare_data(function, args=list(arguments), timeout=-1, result_ttl=60)
        made = self.queue.enqueue_many([job])[0]
        for name, value in fields.items():
            self.hostile.hset(ChunkJob.key_for(made.id), name, value)
        return str(made.id)

    def push_id(self, raw: bytes) -> None:
        self.hostile.rpush(self.queue.key, raw)

    def honest_job_is_done(self, model: str = MODEL.name) -> None:
        """Another job goes through the same worker, every row once."""
        self.honest += 1
        job = make_job(self.folder, 6, name=f"honest-{self.honest}", model=model)
        self.jobs.enqueue(job, job.missing_chunks())
        wait_for(lambda: JobFolder.open(job.path).progress().complete)
        assert texts_of(job) == expected(6)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(tempfile.mkdtemp(prefix="trb-", dir="/tmp"))
        outside = Path(tempfile.mkdtemp(prefix="trb-secret-", dir="/tmp"))
        watch.outside = str(outside)
        patch.setenv("TRBATCH_HOME", str(folder / "home"))
        for name in ("TRBATCH_REDIS_URL", "REDIS_URL", "TRBATCH_STORE"):
            patch.delenv(name, raising=False)
        secret = make_job(outside, 4, name="secret")
        (folder / "store").mkdir()
        (folder / "store" / "link").symlink_to(secret.path)
        with JobQueue.connect() as jobs, redis.Redis.from_url(server.ensure()) as hostile:
            worker = Background(jobs.url, Loaded(), model="", roots=(str(folder / "store"),))
            found = Scene(folder, jobs, hostile, worker, secret)
            yield found
            worker.stop()
        server.stop()


@contextmanager
def watched() -> Iterator[None]:
    """Nothing is executed, nothing unpickled, nothing outside opened, nobody else called."""
    watch.seen.clear()
    watch.on = True
    try:
        yield
    finally:
        watch.on = False
    assert watch.seen == []
    assert not Path("/tmp/trbatch-was-here").exists()


def test_the_watch_sees_what_it_is_to_see(scene: Scene) -> None:
    watch.on = True
    try:
        rows_of(scene.secret)
        (Path(scene.secret.path) / "manifest.json").read_bytes()
        with pytest.raises(AttributeError):
            pickle.loads(b"cos\nno_such_name\n.")
    finally:
        watch.on = False
    assert any(event.startswith("open") for event in watch.seen)
    assert any(event.startswith("pickle.find_class") for event in watch.seen)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


BOMB = pickle.dumps(Bomb())
HOOKS = json.dumps(
    [{"url": "http://127.0.0.1:9/", "job_status": s} for s in ("finished", "failed", "started")]
)
CALLBACKS = {f"{when}_callback_name": "os.abort" for when in ("success", "failure", "stopped")}


def a_foreign_function(scene: Scene) -> None:
    scene.push("touch /tmp/trbatch-was-here", function="os.system")
    scene.push(function="trbatch.worker.load_engine")


def a_pickled_payload(scene: Scene) -> None:
    scene.push("/store", 0, 0, data=BOMB)
    scene.push("/store", 0, 0, data=zlib.compress(BOMB))


def poisoned_fields(scene: Scene) -> None:
    for name in (
        "meta", "result", "exc_info", "status", "origin", "timeout", "retries_left", "created_at",
        "dependency_ids", "webhooks", "worker_name", "enqueued_at", "ttl", "group_id",
    ):  # fmt: skip
        scene.push("/store", 0, 0, **{name: BOMB})


def callbacks_and_webhooks(scene: Scene) -> None:
    scene.push("/store", 0, 0, webhooks=HOOKS, **CALLBACKS)
    scene.push(scene.secret.path, 0, 0, webhooks=HOOKS, **CALLBACKS)


def paths_outside_the_root(scene: Scene) -> None:
    store = scene.folder / "store"
    secret = scene.secret.path
    for path in (
        secret, f"file://{secret}", f"{store}/../{secret}", f"{store}/link",
        f"{store}/../..{secret}",
        f"{store}", "/etc", "/proc/self", "~", ".", f"{store}/x\0", f"http://127.0.0.1:9{secret}",
        f"s3://bucket{secret}", f"simplecache::file://{secret}", f"{store}/a::file://{secret}",
        f"memory://x/../{secret}",
    ):  # fmt: skip
        scene.push(path, 0, 0)


def models_outside_the_root(scene: Scene) -> None:
    for name in (
        scene.secret.path, f"{scene.secret.path}/model.gguf", f"x/../..{scene.secret.path}",
        f"{scene.folder}/store/link", "../secret.gguf",
    ):  # fmt: skip
        model = ModelKey(name)
        scene.hostile.hset(MODELS_KEY, model.queue_name, json.dumps([name, ""]))
        queue = Queue(model.queue_name, connection=scene.hostile, serializer=JSONSerializer)
        queue.enqueue(FUNCTION, scene.secret.path, 0, 0)


def huge_payloads(scene: Scene) -> None:
    scene.push("x" * 2 * LARGEST, 0, 0)
    scene.push("/store", 0, 0, data=os.urandom(32 << 20))
    scene.push("/store", 0, 0, description=b"x" * (32 << 20))
    scene.push("/store", 0, 0, data=zlib.compress(bytes(256 << 20)))
    scene.push("/store", 0, 0, exc_info=zlib.compress(bytes(256 << 20)))
    scene.push_id(b"i" * (8 << 20))


def numbers_without_bounds(scene: Scene) -> None:
    for chunk, generation in ((10**300, 0), (0, 10**300), (1 << 63, 0), (True, False)):
        scene.push("/store", chunk, generation)


def deep_nesting(scene: Scene) -> None:
    scene.push("/store", 0, 0, data=nested(200_000))
    scene.push("/store", 0, 0, meta=nested(200_000))
    scene.hostile.hset(MODELS_KEY, "deep", nested(200_000))


def keys_of_another_type(scene: Scene) -> None:
    job = scene.push("/store", 0, 0)
    scene.hostile.delete(ChunkJob.key_for(job))
    scene.hostile.set(ChunkJob.key_for(job), b"no hash")
    job = scene.push("/store", 0, 0)
    scene.hostile.set(f"rq:executions:{job}", b"no set")
    scene.hostile.set(f"rq:results:{job}", b"no stream")


def ids_that_are_no_text(scene: Scene) -> None:
    scene.push_id(b"\xff\xfe\x00")
    scene.push_id(b"")
    scene.push_id(b"a:b:c\n\x1b[2J")
    scene.hostile.rpush(f"{scene.queue.key}:intermediate", b"\xff", b"nothing")


def models_that_are_none(scene: Scene) -> None:
    for name, value in (
        (b"\xff", b"\xff"), (b"a", b"{}"), (b"b", b"[1, 2]"), (b"c", b"null"), (b"d", BOMB),
        (b"e", b'["maker/echo", ""]'), (b"f", b'["a", "b", "c"]'),
    ):  # fmt: skip
        scene.hostile.hset(MODELS_KEY, name, value)


def commands_that_are_none(scene: Scene) -> None:
    channel = f"rq:pubsub:{scene.worker.worker.name}"
    for message in (b"", b"\xff", b"[]", b"null", BOMB, nested(100_000), b'{"command": 1}'):
        assert scene.hostile.publish(channel, message) == 1, "it still listens"


def abandoned_leases_of_poisoned_jobs(scene: Scene) -> None:
    job = scene.push("/store", 0, 0, status="started")
    scene.hostile.lrem(scene.queue.key, 0, job)
    scene.hostile.hset(ChunkJob.key_for(job), "created_at", BOMB)
    scene.hostile.zadd(f"rq:wip:{MODEL.queue_name}", {f"{job}:{'0' * 32}": 1, "none:none": 1})
    scene.hostile.set("rq:ratelimits", b"no set")


def dependents_that_are_poisoned(scene: Scene) -> None:
    job = scene.push("/store", 0, 0)
    other = scene.push("/store", 0, 0, data=BOMB, status=BOMB)
    scene.hostile.lrem(scene.queue.key, 0, other)
    scene.hostile.sadd(f"rq:job:{job}:dependents", other, b"\xff")


def a_job_in_the_queue_of_another_model(scene: Scene) -> None:
    job = make_job(scene.folder, 4, name="misplaced", model="maker/other")
    scene.push(job.path, 0, 0)


ATTACKS: list[Callable[[Scene], None]] = [
    a_foreign_function,
    a_pickled_payload,
    poisoned_fields,
    callbacks_and_webhooks,
    paths_outside_the_root,
    models_outside_the_root,
    huge_payloads,
    numbers_without_bounds,
    deep_nesting,
    keys_of_another_type,
    ids_that_are_no_text,
    models_that_are_none,
    commands_that_are_none,
    abandoned_leases_of_poisoned_jobs,
    dependents_that_are_poisoned,
    a_job_in_the_queue_of_another_model,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_comes_of_it(scene: Scene, attack: Callable[[Scene], None]) -> None:
    with watched():
        attack(scene)
        scene.honest_job_is_done()
    with watched():
        scene.honest_job_is_done("maker/another")  # the worker looks at all its queues again
    assert scene.worker.thread.is_alive()
    assert not list(Path(scene.secret.path).glob("segments/*"))
    assert not list((scene.folder / "store" / "misplaced").glob("segments/*"))


def test_the_commands_show_what_a_hostile_redis_says_and_obey_none_of_it(scene: Scene) -> None:
    """Also its names go to the terminal as letters, not as orders to it."""
    scene.hostile.sadd("rq:workers", "rq:worker:\x1b[2Jname", b"rq:worker:\xff", "rq:worker:list")
    scene.hostile.hset("rq:worker:\x1b[2Jname", mapping={"state": "\x1b]0;x\x07", "pid": "-1e9"})
    scene.hostile.set("rq:worker:list", b"no hash")
    with watched():
        shown = CliRunner().invoke(cli.commands, ["status"])
    assert shown.exit_code == 0, shown.output
    assert "\x1b" not in shown.output
    assert "name" in shown.output


def test_what_a_failed_chunk_said_is_read_without_unpacking_a_bomb(scene: Scene) -> None:
    job = make_job(scene.folder, 4, name="failing")
    scene.jobs.enqueue(job, [0])
    entry = next(iter(scene.hostile.smembers(index_key(job)))).decode()
    wait_for(lambda: scene.jobs.counts(job).finished)
    bomb = base64.b64encode(zlib.compress(bytes(64 << 20)))
    for exc_string in (bomb, b"%%%", BOMB, base64.b64encode(zlib.compress(b"\x1b[2J why"))):
        scene.hostile.hset(ChunkJob.key_for(entry), "status", "failed")
        scene.hostile.xadd(f"rq:results:{entry}", {"exc_string": exc_string, "return_value": BOMB})
        with watched():
            reasons = scene.jobs.failures(job)
        assert reasons == {0: "no reason given"} or reasons == {0: r"\x1b[2J why"}
    assert reasons == {0: r"\x1b[2J why"}


def test_a_queue_that_somebody_wrote_over_is_used_again_once_it_is_gone(scene: Scene) -> None:
    scene.hostile.set(scene.queue.key, b"mine now")
    time.sleep(1.5)
    assert scene.worker.thread.is_alive()
    scene.hostile.delete(scene.queue.key)
    scene.honest_job_is_done()


def test_a_chunk_that_promises_itself_a_million_retries_gets_what_all_get(scene: Scene) -> None:
    job = make_job(scene.folder, 4, name="greedy")
    (Path(job.path) / job.manifest.chunk_name(0)).write_bytes(b"no parquet")
    entry = scene.push(job.path, 0, 0, retries_left=10**6)
    key = ChunkJob.key_for(entry)
    wait_for(lambda: scene.hostile.hget(key, "status") == b"failed")
    scene.honest_job_is_done()


@pytest.mark.parametrize("number", ["9" * 5000, "99999999999", "-99999999999"])
@pytest.mark.parametrize("field", ["trbatch_lost", "retries_left"])
def test_numbers_beyond_all_bounds_stop_no_worker_and_spoil_no_row(
    scene: Scene, field: str, number: str
) -> None:
    scene.honest += 1
    job = make_job(scene.folder, 4, name=f"counted-{scene.honest}")
    scene.push(job.path, 0, 0, **{field: number})
    scene.honest_job_is_done()
    assert scene.worker.thread.is_alive()
    if number.isdecimal() and field == "retries_left" and len(number) > 4300:
        return  # an entry that cannot be read counts as absent
    wait_for(lambda: len(rows_of(job)) == 4)
    assert {1 <= row["attempts"] <= 4 for row in rows_of(job)} == {True}


def test_a_forged_verdict_costs_its_row_and_puts_only_letters_into_the_results(
    scene: Scene,
) -> None:
    """`docs/security.md` says that who writes to Redis can do this, and how it is undone."""
    job = make_job(scene.folder, 4, name="condemned")
    forged = json.dumps([[[[1, 0], [1, 0]]], [[0, 0, 10**18]], "\x1b[2J\x00\n" + "x" * 999])
    scene.push(job.path, 0, 0, trbatch_suspects=forged)
    wait_for(lambda: len(rows_of(job)) == 4)
    bad, *others = sorted(rows_of(job), key=lambda row: row["prompt_index"])
    assert [row["finish_reason"] for row in others] == ["stop"] * 3
    assert bad["error_code"] == "poison"
    assert r"times: \x1b[2J\x00\nx" in bad["error_message"]
    assert bad["error_message"].isprintable()
    assert len(bad["error_message"]) < 700
    scene.honest_job_is_done()


SUSPECTS = [
    b"[]", b"null", b"{}", b"[1, 2, 3]", b'[["ab"], [], ""]', b'[[[["1", 0]]], [], ""]',
    b'[[[[-1, 0]]], [], ""]', b'[[[[1e300, 0]]], [], ""]',
    b'[[[[18446744073709551615, 0]]], [], ""]',
    b'[[], [[0, 0, "9"]], ""]', b'[[], [[0, 0, -1]], ""]', b"\xff", nested(5000),
]  # fmt: skip


@pytest.mark.parametrize("text", SUSPECTS, ids=lambda text: text[:20].decode("ascii", "replace"))
def test_bookkeeping_that_is_none_suspects_nobody(text: bytes) -> None:
    assert Suspects.from_json(text) == Suspects()


def test_bookkeeping_with_counts_beyond_all_bounds_goes_on_after_a_crash() -> None:
    found = Suspects.from_json(b'[[[[5, 0], [5, 0]]], [[5, 0, 9223372036854775807]], "x"]')
    assert found.groups == (((5, 0),),)
    after = found.after_crash([(5, 0)], "SIGSEGV", alone=True)
    assert Suspects.from_json(after.to_json()).poison == {(5, 0)}


@pytest.mark.parametrize("data", [b"plain", zlib.compress(b"packed"), b""])
def test_small_things_are_inflated_whole(data: bytes) -> None:
    assert inflated(data) in (b"plain", b"packed", b"")


def test_nothing_is_inflated_beyond_the_limit() -> None:
    assert len(inflated(zlib.compress(bytes(LARGEST)))) == LARGEST
    with pytest.raises(ValueError, match="inflates to more"):
        inflated(zlib.compress(bytes(LARGEST + 1)))


# --- roots ---


@pytest.mark.parametrize(
    ("root", "place", "allowed"),
    [
        ("/srv/jobs", "/srv/jobs/a", True),
        ("/srv/jobs/", "/srv/jobs/a/b", True),
        ("/srv/jobs", "/srv/jobs", False),
        ("/srv/jobs", "/srv/jobs-of-others/a", False),
        ("/srv/jobs", "/srv/jobs/../other", False),
        ("/srv/jobs", "file:///srv/jobs/a", True),
        ("file:///srv/jobs", "/srv/jobs/a", True),
        ("/srv/jobs", "s3://srv/jobs/a", False),
        ("s3://b/jobs", "s3://b/jobs/a", True),
        ("s3://b/jobs", "s3://b/jobs", False),
        ("s3://b/jobs", "s3://b/jobs2/a", False),
        ("s3://b/jobs", "s3://b/jobs/../a", False),
        ("s3://b/jobs", "s3://b/jobs/a::file:///etc", False),
        ("s3://b/jobs", "gs://b/jobs/a", False),
        ("s3://b/jobs", "/b/jobs/a", False),
    ],
)
def test_a_folder_must_lie_below_a_root(root: str, place: str, allowed: bool) -> None:
    confinement = Confinement((root,))
    if allowed:
        confinement.check_folder(place)
        return
    with pytest.raises(BadChunk, match="outside what this worker may read"):
        confinement.check_folder(place)


def test_without_roots_another_redis_may_name_the_default_store_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRBATCH_STORE", "s3://bucket/jobs")
    foreign = Confinement(())
    foreign.check_folder("s3://bucket/jobs/a")
    with pytest.raises(BadChunk, match="start the worker with --root"):
        foreign.check_folder("/home/me/jobs/a")
    Confinement((), anywhere=True).check_folder("/home/me/jobs/a")
    with pytest.raises(BadChunk):
        Confinement(("/srv",), anywhere=True).check_folder("/home/me/jobs/a")


def test_hub_names_pass_and_paths_must_lie_below_a_root(tmp_path: Path) -> None:
    confinement = Confinement((str(tmp_path),))
    for name in ("maker/model-1.5B", "gpt2", str(tmp_path / "model"), str(tmp_path / "m.gguf")):
        confinement.check_model(name)
    for name in ("/etc", "../m", "a/b/c", "x/../../etc", "m.gguf", "~/m", ".", "tests", ""):
        with pytest.raises(BadChunk, match="--root"):
            confinement.check_model(name)
