"""Pruning: collected jobs become small and lose nothing, old ones go, running ones stay."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from echo_worker import EchoEngine
from test_control import Moody

from trbatch import api, chunk_files, cli, compaction, job_status
from trbatch.errors import InputError, JobFailed, Unreachable
from trbatch.job import JobFolder
from trbatch.joining import Joiner
from trbatch.queue import JobQueue
from trbatch.sinks import Group
from trbatch.storage import LocalFolder
from workers import submit, wait_for, work, working, write_rows

pytestmark = pytest.mark.usefixtures("home")


def segments(job: api.Job) -> list[str]:
    return job.folder.ledger.names()


def prune_one(*jobs: str, **settings: Any) -> dict[str, Any]:
    (found,) = api.prune(jobs, **settings)
    return {"action": found.action, "reason": found.reason, "bytes": found.bytes}


def make_old(job: api.Job, days: float) -> None:
    """Let all that happened to a job have happened long ago."""
    path = Path(job.path)
    manifest = json.loads((path / "manifest.json").read_text())
    then = time.time() - days * 86400
    manifest["created"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(then))
    (path / "manifest.json").write_text(json.dumps(manifest))
    for file in (path / "segments").glob("*.parquet"):
        file.rename(file.with_name(f"{file.name[:-24]}{int(then * 1e6):016d}.parquet"))
    control = path / "control.json"
    if control.exists():
        values = json.loads(control.read_text()) | {"since": then}
        control.write_text(json.dumps(values))


def dataset(job: api.Job) -> list[dict[str, Any]]:
    return pq.read_table(job.collect().output).to_pylist()


# --- compaction ---


def test_a_collected_job_keeps_one_segment_and_every_row(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"say {i}", "label": i} for i in range(40)]
    job = submit(tmp_path, [*rows, {"id": "unusable"}])
    with working(EchoEngine(0.05), publish_s=0.0):
        job.wait(timeout=30)
    before, progress = dataset(job), job.status().progress
    assert len(segments(job)) > 3
    assert prune_one(job.id)["action"] == "compacted"
    assert len(segments(job)) == 1
    again = api.Job.open(job.id)
    assert dataset(again) == before
    status = again.status()
    assert status.state == "completed"
    assert status.progress.completion_tokens == progress.completion_tokens
    assert status.progress.speedup == pytest.approx(progress.speedup)
    assert status.progress.busy_s == pytest.approx(progress.busy_s)
    assert again.folder.ledger.facts() == job.folder.ledger.facts()
    assert prune_one(job.id) == {"action": "kept", "reason": "is small already", "bytes": 0}


def test_a_big_job_keeps_several_segments_and_is_compacted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "SEGMENT_ROWS", 16)
    monkeypatch.setattr("trbatch.joining._GROUP_ROWS", 4)
    job = submit(tmp_path, 40)
    work(publish_s=0.0, chunks_in_flight=1)
    before, progress = dataset(job), job.status().progress
    assert len(segments(job)) == 10
    assert prune_one()["action"] == "compacted"
    assert len(segments(job)) == 3
    again = api.Job.open(job.id)
    assert dataset(again) == before
    assert again.status().progress.busy_s == pytest.approx(progress.busy_s)
    assert prune_one()["reason"] == "is small already"


def test_a_dry_run_tells_the_same_and_changes_nothing(tmp_path: Path) -> None:
    job = submit(tmp_path, 8)
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect()
    names = segments(job)
    found = prune_one(dry_run=True)
    assert (found["action"], segments(job)) == ("compacted", names)
    assert found["bytes"] > 0


def test_a_pruned_job_grows_as_before(tmp_path: Path) -> None:
    job = submit(tmp_path, 8)
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect()
    prune_one()
    grown = submit(tmp_path, 12)
    assert grown.folder.reread
    engine = EchoEngine()
    work(engine)
    assert len(grown.folder.ledger.names()) == 2
    receipt = grown.collect()
    assert (receipt.rows_ok, receipt.duplicates) == (12, 0)
    old_chunks = list((Path(job.path) / "chunks").iterdir())
    assert len(old_chunks) == 2
    prune_one()
    assert [path.name for path in (Path(job.path) / "chunks").iterdir()] == [
        grown.folder.manifest.chunk_folder.rpartition("/")[2]
    ]
    assert grown.collect().rows_ok == 12


def test_failures_that_were_retried_go_and_the_others_stay(tmp_path: Path) -> None:
    job = submit(tmp_path, [{"prompt": f"bad {'a' if i % 2 else 'b'} {i}"} for i in range(8)])
    engine = work(Moody())
    engine.willing = True
    job.retry(["a"])
    work(engine)
    job.collect()
    prune_one()
    again = api.Job.open(job.id)
    assert again.status().errors == {"b": 4}
    assert not (Path(job.path) / "retries").exists() or not list(
        (Path(job.path) / "retries").iterdir()
    )
    assert again.retry() == 4
    work(engine)
    assert again.status().progress.rows_ok == 8


def test_duplicates_of_a_zombie_go(tmp_path: Path) -> None:
    job = submit(tmp_path, 8)
    work(publish_s=0.0)
    name = segments(job)[0]
    copy = f"zombie-{name}"
    job.folder.folder.write(f"segments/{copy}", job.folder.folder.read(f"segments/{name}"))
    assert job.collect().duplicates > 0
    prune_one()
    receipt = api.Job.open(job.id).collect()
    assert (receipt.rows_ok, receipt.duplicates, receipt.complete) == (8, 0, True)


def test_a_reader_that_looked_before_finds_every_row_after(tmp_path: Path) -> None:
    job = submit(tmp_path, 16)
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect()
    early, late = JobFolder.open(job.path), JobFolder.open(job.path)
    names = late.ledger.names()
    assert early.progress().complete
    prune_one()
    assert early.progress().rows_ok == 16
    assert early.missing_chunks() == []
    stale = iter([names])  # it has listed the segments, and then they went
    real = late.ledger.names
    late.ledger.names = lambda: next(stale, None) or real()  # type: ignore[method-assign]
    assert late.missing_chunks() == []


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_collect_finds_every_row_when_its_segments_go_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    job = submit(tmp_path, 16)
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect()
    monkeypatch.setattr("trbatch.joining._GROUP_ROWS", 4)
    groups = Joiner.groups

    def pruned_after_the_first(joiner: Joiner) -> Iterator[Group]:
        found = groups(joiner)
        yield next(found)
        monkeypatch.setattr(Joiner, "groups", groups)
        assert prune_one()["action"] == "compacted"
        yield from found

    monkeypatch.setattr(Joiner, "groups", pruned_after_the_first)
    receipt = job.collect(tmp_path / f"out.{format}", format=format)
    assert (receipt.rows_ok, receipt.complete, receipt.duplicates) == (16, True, 0)
    assert receipt.stats["figures"]["rows_ok"] == 16
    assert not list(tmp_path.glob(".*"))


def test_a_collect_whose_segments_keep_going_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, 4)
    work()

    def gone(joiner: Joiner) -> Iterator[Group]:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Joiner, "groups", gone)
    with pytest.raises(JobFailed, match="segments of job job keep going"):
        job.collect(tmp_path / "a.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["job.jsonl"]


def test_of_two_prunes_at_once_one_leaves_the_job_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, 16)
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect()
    groups = Joiner.groups

    def overtaken(joiner: Joiner) -> Iterator[Group]:
        monkeypatch.setattr(Joiner, "groups", groups)
        assert prune_one()["action"] == "compacted"
        return groups(joiner)

    monkeypatch.setattr(Joiner, "groups", overtaken)
    assert prune_one()["reason"] == "is being compacted by another command"
    assert len(segments(job)) == 1
    assert api.Job.open(job.id).collect().rows_ok == 16


def test_a_collect_removes_what_killed_ones_left_beside_its_output(tmp_path: Path) -> None:
    job = submit(tmp_path, 4)
    work()
    old, young, other = (tmp_path / f".{n}" for n in ("a.parquet.01234567", "a.parquet.89abcdef",
                                                      "b.parquet.01234567"))  # fmt: skip
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        age(path, days=2)
    job.collect(tmp_path / "a.parquet")
    assert [path.exists() for path in (old, young, other)] == [False, True, True]


def test_nothing_goes_when_the_new_segment_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, 8)
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect()
    names = segments(job)
    monkeypatch.setattr(compaction, "_COUNTED", ["finish_reason"])
    whole = LocalFolder.open

    def half(self: LocalFolder, name: str) -> Any:
        file = whole(self, name)
        if "compact-" in name:
            file.close()
            (tmp_path / "half").write_bytes(b"PAR1")
            return (tmp_path / "half").open("rb")
        return file

    monkeypatch.setattr(LocalFolder, "open", half)
    with pytest.raises(JobFailed, match="cannot be read"):
        prune_one()
    assert set(names) <= set(segments(job))


def test_a_job_that_was_not_collected_keeps_its_segments(tmp_path: Path) -> None:
    job = submit(tmp_path, 8)
    work(publish_s=0.0, chunks_in_flight=1)
    names = segments(job)
    assert "not been collected" in prune_one()["reason"]
    assert segments(job) == names


# --- beside a submit of a grown input ---


@pytest.fixture
def reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reading]:
    """A completed, collected job, and a `submit` of its grown input that is in the middle."""
    job = submit(tmp_path, 8)
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect()
    found = Reading(tmp_path, job)
    check = chunk_files.ChunkWriter.check_repeats

    def rest(writer: Any, *args: Any) -> None:
        if threading.current_thread() is found.thread and not found.go_on.is_set():
            found.written.set()
            assert found.go_on.wait(30)
        check(writer, *args)

    monkeypatch.setattr(chunk_files.ChunkWriter, "check_repeats", rest)
    found.thread.start()
    assert found.written.wait(30)
    yield found
    found.go_on.set()
    found.thread.join(30)


class Reading:
    """A `submit` in a thread that waits before it writes the manifest."""

    def __init__(self, folder: Path, job: api.Job) -> None:
        self.job = job
        self.written, self.go_on = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._submit, args=[folder])
        self._grown: list[api.Job | Exception] = []

    def _submit(self, folder: Path) -> None:
        try:
            self._grown.append(submit(folder, 40))
        except Exception as error:  # noqa: BLE001  it is for who waits
            self._grown.append(error)

    def end(self) -> api.Job:
        self.go_on.set()
        self.thread.join(30)
        (found,) = self._grown
        if isinstance(found, Exception):
            raise found
        return found


def test_prune_takes_nothing_from_a_submit_that_reads_a_grown_input(reading: Reading) -> None:
    assert prune_one()["action"] == "compacted"
    assert prune_one(older_than="0s")["reason"].startswith("is being submitted")
    grown = reading.end()
    assert (grown.id, grown.folder.reread) == (reading.job.id, True)
    assert len(grown.folder.missing_chunks()) == 8
    work()
    receipt = grown.collect()
    assert (receipt.rows_ok, receipt.complete) == (40, True)


def test_a_job_removed_by_force_beneath_a_submit_is_no_half_job(reading: Reading) -> None:
    assert prune_one(older_than="0s", force=True)["action"] == "removed"
    with pytest.raises(Unreachable, match="removed chunks") as caught:
        reading.end()
    assert "submit again" in str(caught.value.hint)
    assert not Path(reading.job.path).exists()


def test_a_job_that_grows_while_it_is_compacted_keeps_its_segments(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = compaction._check

    def grow(*args: Any) -> None:
        check(*args)
        reading.end()

    monkeypatch.setattr(compaction, "_check", grow)
    names = segments(reading.job)
    assert prune_one()["reason"].startswith("is being submitted")
    assert segments(reading.job) == names


# --- what killed commands have left ---


def age(path: Path, days: float) -> None:
    """Let a file or a folder with all in it be so old."""
    then = time.time() - days * 86400
    for one in (*path.rglob("*"), path):
        os.utime(one, (then, then))


def test_what_killed_commands_left_in_a_job_goes_after_a_day(tmp_path: Path) -> None:
    job = submit(tmp_path, 8)
    path = Path(job.path)
    reading = path / "chunks" / "1-0123abcd"
    reading.mkdir()
    (reading / "00000.parquet").write_bytes(b"x" * 100)
    others = [path / ".stats.json.0123abcd", path / "segments" / ".w-1.parquet.0123abcd"]
    (path / "segments").mkdir()
    for other in others:
        other.write_bytes(b"x" * 10)
    assert prune_one()["action"] == "kept"
    for one in (reading, *others):
        age(one, days=2)
    assert prune_one(dry_run=True)["bytes"] == 120
    assert reading.exists()
    found = prune_one()
    assert (found["action"], found["bytes"]) == ("cleaned", 120)
    assert not any(one.exists() for one in (reading, *others))
    work()
    assert job.collect().rows_ok == 8


def test_a_folder_that_a_killed_submit_has_left_goes_after_a_day(
    tmp_path: Path, home: Path
) -> None:
    store = Path(submit(tmp_path, 4).path).parent
    left, foreign = store / "left", store / "foreign"
    for place in (left, foreign):
        (place / "chunks" / "0-0123abcd").mkdir(parents=True)
        (place / "chunks" / "0-0123abcd" / "00000.parquet").write_bytes(b"x" * 100)
    (foreign / "notes.txt").touch()
    assert {one.job for one in api.prune()} == {"job"}
    age(left, days=2)
    age(foreign, days=2)
    told = {one.job: (one.action, one.bytes) for one in api.prune(dry_run=True)}
    assert (told["left"], left.exists()) == (("removed", 100), True)
    assert {one.job: one.action for one in api.prune()} == {"left": "removed", "job": "kept"}
    assert (left.exists(), foreign.exists()) == (False, True)


def test_a_damaged_job_is_told_and_stops_nobody(tmp_path: Path) -> None:
    damaged, sound = submit(tmp_path, 8, name="damaged"), submit(tmp_path, 8, name="sound")
    work(publish_s=0.0, chunks_in_flight=1)
    for job in (damaged, sound):
        job.collect()
    damaged.folder.folder.remove(damaged.folder.manifest.chunk_name(0))
    found = {one.job: one for one in api.prune()}
    assert "00000.parquet is missing" in found["damaged"].reason
    assert found["sound"].action == "compacted"
    assert prune_one("damaged", older_than="0s", force=True)["action"] == "removed"


# --- removal ---


def test_old_jobs_that_ended_and_were_collected_are_removed(tmp_path: Path) -> None:
    old, young = submit(tmp_path, 4, name="old"), submit(tmp_path, 4, name="young")
    work()
    for job in (old, young):
        job.collect(tmp_path / f"{job.id}.parquet")
    make_old(old, days=31)
    told = {found.job: found.action for found in api.prune(older_than="30d", dry_run=True)}
    assert (told, Path(old.path).exists()) == ({"old": "removed", "young": "kept"}, True)
    done = {found.job: found.action for found in api.prune(older_than="30d")}
    assert done == {"old": "removed", "young": "kept"}
    assert not Path(old.path).exists()
    assert (tmp_path / "old.parquet").exists()
    assert young.status().state == "completed"
    with JobQueue.connect() as jobs:
        assert jobs.ids(old) == []
        assert jobs.ids(young) != []


@pytest.mark.parametrize("state", ["queued", "paused", "failed", "uncollected"])
def test_old_jobs_that_still_owe_something_stay_unless_it_is_forced(
    tmp_path: Path, state: str, redis_url: str
) -> None:
    job = submit(tmp_path, 4)
    if state == "paused":
        job.pause()
    elif state == "failed":
        with JobQueue.connect() as jobs:
            jobs.connection.flushall()
        job.collect()
    elif state == "uncollected":
        work()
    make_old(job, days=31)
    kept = prune_one(older_than="30d")
    assert kept["action"] == "kept"
    assert state in kept["reason"] or (state, "never collected" in kept["reason"]) == (
        "uncollected",
        True,
    )
    assert "--force" in kept["reason"]
    assert Path(job.path).exists()
    assert prune_one(older_than="30d", force=True)["action"] == "removed"
    assert not Path(job.path).exists()


def test_a_running_job_is_never_removed_by_its_age(tmp_path: Path) -> None:
    job = submit(tmp_path, 40)
    with working(EchoEngine(0.1)):
        wait_for(lambda: job.status().chunks.started)
        assert prune_one(older_than="0s")["reason"] == "is in_progress; --force removes it"
        assert Path(job.path).exists()
        job.wait(timeout=30)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_cancelled_and_expired_jobs_go_once_they_were_collected(tmp_path: Path, how: str) -> None:
    job = submit(tmp_path, 4, deadline="1s" if how == "deadline" else "")
    if how == "cancel":
        job.cancel()
    wait_for(lambda: job.status().finished)
    make_old(job, days=31)
    assert prune_one(older_than="30d")["action"] == "kept"
    job.collect()
    assert prune_one(older_than="30d")["action"] == "removed"


def test_a_removal_that_was_cut_short_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, 4)
    work()
    job.collect()
    make_old(job, days=31)
    real = LocalFolder.remove

    def cut_short(self: LocalFolder, name: str) -> None:
        if name == "":
            raise KeyboardInterrupt
        real(self, name)

    monkeypatch.setattr(LocalFolder, "remove", cut_short)
    with pytest.raises(KeyboardInterrupt):
        api.prune(older_than="30d")
    monkeypatch.setattr(LocalFolder, "remove", real)
    assert Path(job.path).exists()
    assert api.prune() == []
    assert not Path(job.path).exists()


def test_other_things_in_the_store_are_left_alone(tmp_path: Path, home: Path) -> None:
    job = submit(tmp_path, 4)
    store = Path(job.path).parent
    (store / "matrices" / "m").mkdir(parents=True)
    (store / "half-submitted" / "chunks").mkdir(parents=True)
    (store / "broken").mkdir()
    (store / "broken" / "manifest.json").write_text("{")
    found = {one.job: one.reason for one in api.prune(older_than="0s")}
    assert set(found) == {"job", "broken"}
    assert "damaged" in found["broken"]
    assert {path.name for path in store.iterdir()} == {
        "job", "matrices", "half-submitted", "broken",
    }  # fmt: skip


def test_a_job_that_is_not_there_is_named(home: Path) -> None:
    with pytest.raises(InputError, match="no job 'nothing'"):
        api.prune(["nothing"])


def test_a_store_in_an_object_store_is_pruned_too(tmp_path: Path) -> None:
    store = f"memory://prune-{time.time_ns()}"
    file = write_rows(tmp_path / "in.jsonl", 8)
    job = api.submit(file, model="org/echo", out=store, name="far", chunk_size=4)
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect(tmp_path / "far.parquet")
    assert len(segments(job)) > 1
    assert [found.action for found in api.prune(store=store)] == ["compacted"]
    assert len(segments(job)) == 1
    time.sleep(0.01)
    assert [found.action for found in api.prune(store=store, older_than="0s")] == ["removed"]
    assert api.prune(store=store) == []


def test_the_command_tells_what_it_did_in_words_and_in_json(tmp_path: Path) -> None:
    job = submit(tmp_path, 8)
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect()
    words = CliRunner().invoke(cli.commands, ["prune", "--dry-run"])
    assert words.exit_code == 0
    assert "compacted" in words.stdout
    assert "MiB would go" in words.stdout
    found = json.loads(CliRunner().invoke(cli.commands, ["prune", "--json"]).stdout)
    assert (found["dry_run"], found["jobs"][0]["action"]) == (False, "compacted")
    wrong = CliRunner().invoke(cli.commands, ["prune", "--older-than", "soon"])
    assert (wrong.exit_code, "30d" in wrong.stderr) == (2, True)


def test_states_that_have_ended_are_those_of_a_status() -> None:
    assert job_status.ENDED == ("completed", "failed", "cancelled", "expired")
