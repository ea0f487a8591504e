"""A Redis of others: the documented users can do what trbatch does and nothing more; and TLS."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import redis
import trustme
from click.testing import CliRunner, Result
from redis_server import Terminator, redis_server
from test_sharing import LoadedTiny, prompts
from waiting import wait_for
from worker_tools import Background

from trbatch import api, cli
from trbatch.config import WorkerConfig
from trbatch.control import Control
from trbatch.lease import LeaseWorker
from trbatch.queue import JobQueue
from trbatch.worker import run_worker

RULES = Path(__file__).parent.parent / "docker" / "redis-users.acl"
SECRETS = {"client": "client-s3cret", "worker": "worker-s3cret"}


@dataclass
class Place:
    """Where the queue listens, as its clients and its workers name it."""

    client: str
    worker: str
    port: int


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A server with the users of the documented file."""
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRBATCH_STORE", str(tmp_path / "store"))
    rules = RULES.read_text()
    for role, secret in SECRETS.items():
        rules = rules.replace(f"REPLACE-{role}-password", secret)
    assert "REPLACE" not in rules
    (tmp_path / "users.acl").write_text(rules)
    with redis_server(tmp_path, "--aclfile", str(tmp_path / "users.acl")) as port:
        urls = {
            role: f"redis://trbatch-{role}:{secret}@127.0.0.1:{port}/0"
            for role, secret in SECRETS.items()
        }
        yield Place(urls["client"], urls["worker"], port)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.commands, arguments)


def submit(tmp_path: Path, url: str, name: str = "job") -> api.Job:
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in prompts(8)))
    return api.submit(
        file, redis_url=url, name=name, model="maker/tiny", task="t", chunk_size=2, max_tokens=8
    )


def work(url: str, load: LoadedTiny | None = None) -> int:
    config = WorkerConfig(redis_url=url, burst=True, publish_s=0.05, model="maker/tiny")
    return run_worker(config, load=load or LoadedTiny())


def test_the_documented_users_can_do_all_that_trbatch_does(place: Place, tmp_path: Path) -> None:
    job = submit(tmp_path, place.client)
    assert work(place.worker) == 0
    assert job.wait(10).state == "completed"
    output = tmp_path / "out.parquet"
    assert job.collect(output).complete
    assert pq.read_table(output).num_rows == 8
    assert job.resume() == 0
    failing = submit(tmp_path, place.client, "failing")
    chunk = Path(failing.path) / failing.folder.manifest.chunk_name(0)
    chunk.write_bytes(b"no parquet")
    assert work(place.worker) == 0
    shown = invoke("status", "failing", "--redis-url", place.client, "--json")
    assert list(json.loads(shown.stdout)["failures"]) == ["0"]
    assert invoke("status", "--redis-url", place.client).exit_code == 0
    matrix = str(tmp_path / "t.safetensors")
    assert invoke("matrix", "export", "t", "-o", matrix).exit_code == 0
    for command in (["reset", "t"], ["import", matrix]):
        done = invoke("matrix", *command, "--redis-url", place.client)
        assert done.exit_code == 0, done.output


def test_the_documented_client_controls_its_jobs(place: Place, tmp_path: Path) -> None:
    job = submit(tmp_path, place.client)
    url = ["--redis-url", place.client]
    for command in (
        ["pause", job.id], ["continue", job.id], ["cancel", job.id], ["resume", job.id],
        ["retry", job.id, "--failed"], ["prune"],
    ):  # fmt: skip
        done = invoke(*command, *(url if command[0] != "prune" else []))
        assert done.exit_code == 0, (command, done.output)
    assert work(place.worker) == 0
    assert job.wait(10).state == "completed"


def test_a_worker_of_these_rights_brings_back_what_a_dead_one_left(
    place: Place, tmp_path: Path
) -> None:
    """Recovery, matrices shared through the stream, and the commands that workers listen to."""
    job = submit(tmp_path, place.client)
    with JobQueue.connect(place.worker) as jobs:
        queue = jobs.queue(next(iter(jobs.models())))
        dead = LeaseWorker(jobs.connection, "dead", [queue])
        dead.open()
        lease = dead.take(queue)
        assert lease is not None
        assert jobs.connection.publish("rq:pubsub:dead", b"{}") == 1
        dead.pubsub_thread.stop()
        dead.pubsub_thread.join()
        jobs.connection.zadd(queue.started_job_registry.key, {lease.execution.composite_key: 1})
        worker = Background(place.worker, LoadedTiny(), model="maker/tiny")  # type: ignore[arg-type]
        try:
            wait_for(lambda: jobs.counts(job).finished == 4, timeout=30)
            assert stream_keys(place)
        finally:
            worker.stop()
    assert job.status().state == "completed"


def test_a_worker_of_these_rights_takes_an_expired_job_out_of_the_queue(
    place: Place, tmp_path: Path
) -> None:
    job = submit(tmp_path, place.client)
    Control(deadline=time.time() - 1, deadline_asked="then").write(job.folder.folder)
    assert work(place.worker) == 0
    assert job.status().state == "expired"
    with JobQueue.connect(place.client) as jobs:
        assert len(jobs.ids(job)) == 1, "the one that was taken"


def stream_keys(place: Place) -> list[bytes]:
    """The keys of shared matrices; found by scanning, which these users may."""
    with redis.Redis.from_url(place.client) as client:
        return list(client.scan_iter("trbatch:matrix:*"))


@pytest.mark.parametrize("role", SECRETS)
@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",), ("FLUSHDB",), ("KEYS", "*"), ("CONFIG", "GET", "*"), ("SHUTDOWN",),
        ("GET", "other"), ("SET", "other", "1"), ("DEL", "other"), ("PUBLISH", "other", "1"),
        ("EVAL", "return redis.call('GET', 'other')", "0"), ("FUNCTION", "LOAD", "#!lua name=x"),
        ("SCRIPT", "FLUSH"), ("ACL", "LIST"), ("MONITOR",), ("REPLICAOF", "127.0.0.1", "1"),
        ("RESTORE", "rq:x", "0", "x"), ("CLIENT", "KILL", "ID", "1"), ("SAVE",),
        ("BLPOP", "rq:x", "1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_these_users_can_do_nothing_else(
    shared_place: Place, role: str, command: tuple[str, ...]
) -> None:
    url = {"client": shared_place.client, "worker": shared_place.worker}[role]
    with redis.Redis.from_url(url) as client, pytest.raises(redis.ResponseError) as caught:
        client.execute_command(*command)
    assert "permission" in str(caught.value).lower() or "ACL" in str(caught.value)


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("acl")
    rules = RULES.read_text()
    for role, secret in SECRETS.items():
        rules = rules.replace(f"REPLACE-{role}-password", secret)
    (folder / "users.acl").write_text(rules)
    with redis_server(folder, "--aclfile", str(folder / "users.acl")) as port:
        urls = [f"redis://trbatch-{r}:{s}@127.0.0.1:{port}/0" for r, s in SECRETS.items()]
        yield Place(*urls, port)


@pytest.mark.parametrize("who", ["", "trbatch-client:wrong@", ":client-s3cret@"])
def test_nobody_else_is_let_in(home: Path, shared_place: Place, who: str) -> None:
    done = invoke("status", "--redis-url", f"redis://{who}127.0.0.1:{shared_place.port}/0")
    assert done.exit_code == 75
    assert "s3cret" not in done.output
    assert ":wrong" not in done.output


# --- TLS ---


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def terminator(authority: trustme.CA, port: int, *, name: str = "localhost") -> Terminator:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return Terminator(context, port)


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tmp_path / "ca.pem"


def tls_url(place: Place, role: str, port: int, ca_file: Path, host: str = "localhost") -> str:
    plain = {"client": place.client, "worker": place.worker}[role]
    who = plain.removeprefix("redis://").partition("@")[0]
    return f"rediss://{who}@{host}:{port}/0?ssl_ca_certs={ca_file}"


def test_a_job_goes_all_its_way_over_tls_and_no_secret_is_on_the_wire(
    place: Place, authority: trustme.CA, ca_file: Path, tmp_path: Path
) -> None:
    with terminator(authority, place.port).running() as tls:
        job = submit(tmp_path, tls_url(place, "client", tls.port, ca_file))
        assert work(tls_url(place, "worker", tls.port, ca_file)) == 0
        assert job.wait(10).state == "completed"
        assert len(tls.sent) > 10_000
        for secret in (*SECRETS.values(), "rq:queue", str(tmp_path)):
            assert secret.encode() not in tls.sent
    assert job.collect(tmp_path / "out.parquet").complete


def test_a_server_of_another_authority_is_not_spoken_to(place: Place, ca_file: Path) -> None:
    with terminator(trustme.CA(), place.port).running() as tls:
        done = invoke("status", "--redis-url", tls_url(place, "client", tls.port, ca_file))
    assert done.exit_code == 75
    assert "certificate verify failed" in done.stderr
    assert "s3cret" not in done.output


def test_a_server_of_another_name_is_not_spoken_to(
    place: Place, authority: trustme.CA, ca_file: Path
) -> None:
    with terminator(authority, place.port, name="elsewhere.example").running() as tls:
        done = invoke("status", "--redis-url", tls_url(place, "client", tls.port, ca_file))
    assert done.exit_code == 75
    assert "Hostname mismatch" in done.stderr


def test_a_client_without_tls_is_not_let_in(place: Place, authority: trustme.CA) -> None:
    with terminator(authority, place.port).running() as tls:
        plain = place.client.replace(str(place.port), str(tls.port))
        done = invoke("status", "--redis-url", plain)
    assert done.exit_code == 75
    assert "s3cret" not in done.output


def test_a_server_may_ask_for_the_clients_certificate(
    place: Place, authority: trustme.CA, ca_file: Path, tmp_path: Path
) -> None:
    ours = authority.issue_cert("worker@example.org")
    ours.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "own.pem"))
    front = terminator(authority, place.port)
    front.context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(front.context)
    with front.running() as tls:
        url = tls_url(place, "client", tls.port, ca_file)
        assert invoke("status", "--redis-url", url).exit_code == 75
        own = f"&ssl_certfile={tmp_path}/own.pem&ssl_keyfile={tmp_path}/own.pem"
        done = invoke("status", "--redis-url", url + own)
    assert done.exit_code == 0, done.output
