"""Pruning: old jobs go, running ones stay, what killed commands have left is swept."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from echo_worker import EchoEngine
from pruning_tools import age, make_old, prune_one, segments
from waiting import wait_for

from trbatch import api, cli, job_status
from trbatch.errors import InputError
from trbatch.queue import JobQueue
from trbatch.storage import LocalFolder
from workers import submit, work, working, write_rows

pytestmark = pytest.mark.usefixtures("home")


# --- what killed commands have left ---


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
