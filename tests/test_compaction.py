"""Compaction: a collected job has few segments, with each row once, whatever goes on beside."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from echo_worker import EchoEngine
from pruning_tools import age, dataset, prune_one, segments
from test_control import Moody

from trbatch import api, chunk_files, compaction
from trbatch.errors import JobFailed, Unreachable
from trbatch.job import JobFolder
from trbatch.joining import Joiner
from trbatch.retries import Retries
from trbatch.sinks import Group
from trbatch.storage import LocalFolder
from workers import submit, work, working

pytestmark = pytest.mark.usefixtures("home")


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


def test_progress_is_the_same_afterwards(tmp_path: Path) -> None:
    looping = " ".join(["round"] * 60)  # whose echo has one token only
    prompts = [*(f"say {i}" for i in range(8)), looping, f"{looping} again", "refuse"]
    job = submit(tmp_path, [{"prompt": prompt} for prompt in prompts])
    work(publish_s=0.0, chunks_in_flight=1)
    job.collect()
    before = api.Job.open(job.id).status().progress
    assert (before.rows_ok, before.rows_failed, before.rows_repetitive) == (10, 1, 2)
    assert prune_one()["action"] == "compacted"
    after = api.Job.open(job.id).status().progress
    assert dataclasses.asdict(after) == pytest.approx(dataclasses.asdict(before))


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


def test_a_retry_asked_for_while_failures_move_to_another_segment_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, [{"prompt": f"bad a {i}"} for i in range(4)] + [{"prompt": "good"}])
    engine = work(Moody(), publish_s=0.0, chunks_in_flight=1)
    job.collect()
    check, remove = compaction._check, compaction._remove
    asked: list[int] = []

    def before(*args: Any) -> None:
        check(*args)
        if not asked:
            asked.append(api.Job.open(job.id).retry())

    monkeypatch.setattr(compaction, "_check", before)
    assert prune_one()["reason"] == "has rows that are to be decoded again"
    assert asked == [4]
    work(engine)  # it fails again
    job.collect()

    def between(*args: Any) -> None:
        remove(*args)
        if len(asked) == 1:
            # By one that has looked at the segments before they went.
            folder = api.Job.open(job.id).folder
            folder.ledger.retries.ask(seen, [])
            asked.append(0)

    seen = segments(job)
    monkeypatch.setattr(compaction, "_remove", between)
    assert prune_one()["action"] == "compacted"
    assert len(asked) == 2
    engine.willing = True
    again = api.Job.open(job.id)
    assert again.status().progress.rows_failed == 0
    again.resume()
    work(engine)
    assert again.status().progress.rows_ok == 5


def test_a_retry_that_names_segments_which_go_in_that_moment_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(tmp_path, [{"prompt": f"bad a {i}"} for i in range(4)] + [{"prompt": "good"}])
    work(Moody(), publish_s=0.0, chunks_in_flight=1)
    job.collect()
    ask, asked = Retries.ask, []

    def late(self: Retries, names: Any, codes: Any) -> None:
        asked.append(list(names))
        if len(asked) == 1:
            assert compaction.compact(JobFolder.open(job.path)) > 1
        ask(self, names, codes)

    monkeypatch.setattr(Retries, "ask", late)
    assert api.Job.open(job.id).retry() == 4
    assert len(asked) == 2 and asked[1] == segments(job)
    assert api.Job.open(job.id).status().progress.rows_failed == 0
