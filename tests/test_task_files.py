"""The files of tasks: unusable ones stop nobody, what workers counted adds up, cold begins once."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_tools import CPU, VOCAB, Room, cold

from trbatch import matrices
from trbatch.engine import saved
from trbatch.engine.calibration import Calibration
from trbatch.engine.paths import PathCounts
from trbatch.engine.sequence import TaskKey
from trbatch.errors import Unreachable
from trbatch.matrices import matrix_file
from trbatch.storage import LocalFolder

DAMAGES = ("empty", "noise", "truncated", "other names", "another vocabulary", "a token beyond it")


def spoil(file: Path, damage: str) -> bytes:
    whole = file.read_bytes()
    if damage == "other names":
        save_file({"lines": torch.zeros(VOCAB, 8, dtype=torch.int32)}, file)
    elif damage in ("another vocabulary", "a token beyond it"):
        parts = load_file(file)
        if damage == "another vocabulary":
            parts["rows"] = parts["rows"][:40].clone()
        else:
            parts["rows"][3, 2] = VOCAB
        save_file(parts, file, metadata=matrices.read(file).facts.to_metadata())
    else:
        texts = {"empty": b"", "noise": b"\x00\xff" * 99, "truncated": whole[: len(whole) // 2]}
        file.write_bytes(texts[damage])
    return file.read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_used_is_named_and_put_aside_and_stops_nobody(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = Room()
    old.write(old.tasks.open(TaskKey("news", tmp_path), busy=set()).index, 7, 20)
    old.tasks.save()
    file = matrix_file(tmp_path, "model", "news")
    spoiled = spoil(file, damage)
    new = Room()
    task = new.tasks.open(TaskKey("news", tmp_path), busy=set())
    assert task.age_s is None and not (new.rows(task.index) >= 0).any()
    aside = file.with_name(f"{file.name}.unusable")
    assert aside.read_bytes() == spoiled and not file.exists()
    assert str(file) in caplog.text and str(aside) in caplog.text
    new.write(task.index, 9, 30)
    new.tasks.save()
    assert Room().tasks.open(TaskKey("news", tmp_path), busy=set()).rows > 0
    assert [saved.file for saved in matrices.all_in(tmp_path)] == [file]


def test_damaged_counts_are_begun_anew() -> None:
    counts = PathCounts()
    for rank in (0, 0, 1):
        counts.count([], rank)
    kept = counts.to_tensors()
    for spoil in (
        {"paths": kept["paths"] + 100},
        {"paths": kept["paths"][:, :3]},
        {"path_counts": kept["path_counts"][1:]},
        {"path_counts": kept["path_counts"] * float("nan")},
    ):
        other = PathCounts()
        bad = kept | spoil
        other.restore(bad["paths"], bad["path_counts"])
        assert other.places == 0 and other.tree() == PathCounts().tree()
    calibration = Calibration(1, CPU)
    begin = calibration.listed(0)
    for bad in (
        torch.full_like(calibration.of_task(0), -1.0),
        torch.ones(3),
        torch.ones(2, 2).int(),
    ):
        calibration.restore(0, bad)
        assert calibration.listed(0) == begin


def test_what_workers_of_a_task_have_counted_adds_up_in_its_file(tmp_path: Path) -> None:
    """Their rows are equal copies; each has counted only its own."""
    key = TaskKey("news", tmp_path)
    rooms = [Room(), Room(), Room()]
    for room, times in zip(rooms, (40, 1, 0), strict=True):
        index = room.tasks.open(key, busy=set()).index
        room.write(index, 7, 20)
        for _ in range(times):
            room.paths[index].count([], 2)
            room.calibration.count_few([5], [True])
    for room in rooms * 2:  # what was saved once is not added again
        room.tasks.save()
        room.tasks.touch(room.tasks.get(key).index)
    late = Room()
    index = late.tasks.open(key, busy=set()).index
    assert late.paths[index].places == 41
    assert late.paths[index].to_tensors()["path_counts"].tolist() == [41, 41]
    true, seen = late.calibration.of_task(index)
    assert (true[5], seen[5]) == pytest.approx((41, 41), rel=0.01)


def test_what_many_workers_count_is_bounded(tmp_path: Path) -> None:
    one, other = Calibration(1, CPU), Calibration(1, CPU)
    for counts in (one, other):
        places = torch.full((50_000,), 3)
        counts.count(places, torch.arange(50_000) % 2 == 0)
    both = one.added_to(other.of_task(0), 0)
    assert both[1, 3] < 6000 and both[0, 3] / both[1, 3] == pytest.approx(0.5, rel=0.01)
    first, second = PathCounts(), PathCounts()
    for counts in (first, second):
        for _ in range(15_000):
            counts.count([], 1)
    kept = second.to_tensors()
    assert first.added_to(kept["paths"], kept["path_counts"]).places == 15_000


def test_a_cold_job_that_is_taken_up_again_another_day_begins_no_second_time(
    tmp_path: Path,
) -> None:
    first = Room()
    first.write(first.tasks.open(cold("news", tmp_path), busy=set()).index, 7, 20)
    first.tasks.save()
    second = Room()  # a night later, with another job
    warm = second.tasks.open(TaskKey("news", tmp_path), busy=set())
    second.write(warm.index, 9, 30)
    second.tasks.save()
    third = Room()
    task = third.tasks.open(cold("news", tmp_path), busy=set())
    assert not task.began_cold
    assert third.rows(task.index)[7, 0] == 20 and third.rows(task.index)[9, 0] == 30
    fourth = Room()  # another job is another matter
    task = fourth.tasks.open(cold("news", tmp_path, "other"), busy=set())
    assert task.began_cold and not (fourth.rows(task.index) >= 0).any()
    fourth.write(task.index, 11, 5)
    fourth.tasks.save()
    assert matrices.read(matrix_file(tmp_path, "model", "news")).facts.cold_jobs == ["job", "other"]


def test_a_task_whose_file_was_replaced_is_read_anew_and_not_saved_over_it(tmp_path: Path) -> None:
    room, other = Room(), Room()
    key = TaskKey("news", tmp_path)
    task = room.tasks.open(key, busy=set())
    room.write(task.index, 7, 20)
    other.write(other.tasks.open(cold("news", tmp_path), busy=set()).index, 9, 30)
    other.tasks.save()
    room.tasks.outdate(key)
    assert room.tasks.current(key) is None
    room.tasks.save()
    again = room.tasks.open(key, busy=set())
    assert room.rows(again.index)[9, 0] == 30 and room.rows(again.index)[7, 0] < 0


def test_an_empty_matrix_takes_its_place_as_soon_as_a_job_begins_cold(tmp_path: Path) -> None:
    """Before others are told to forget: who reads the file then must not find the old one."""
    warm, late, new = Room(), Room(), Room()
    key = TaskKey("news", tmp_path)
    warm.write(warm.tasks.open(key, busy=set()).index, 7, 20)
    warm.tasks.save()
    new.tasks.open(cold("news", tmp_path), busy=set())
    about = matrices.read(matrix_file(tmp_path, "model", "news")).facts
    assert (about.rows, about.cold_jobs) == (0, ["job"])
    assert not (late.rows(late.tasks.open(key, busy=set()).index) >= 0).any()
    # And whoever still holds what was there does not bring it back.
    warm.write(warm.tasks.open(key, busy=set()).index, 8, 20)
    warm.tasks.save()
    assert matrices.read(matrix_file(tmp_path, "model", "news")).facts.rows == 0
    assert warm.tasks.current(key) is None
    assert not (warm.rows(warm.tasks.open(key, busy=set()).index) >= 0).any()


@pytest.mark.parametrize("how", ["reset", "import"])
def test_what_was_reset_or_imported_is_not_undone_by_a_save(tmp_path: Path, how: str) -> None:
    room, other = Room(), Room()
    key = TaskKey("news", tmp_path)
    file = matrix_file(tmp_path, "model", "news")
    index = room.tasks.open(key, busy=set()).index
    room.write(index, 7, 20)
    room.tasks.save()
    if how == "reset":
        matrices.remove(matrices.find(tmp_path, "news"))
    else:
        other.write(other.tasks.open(TaskKey("mails", tmp_path), busy=set()).index, 9, 30)
        other.tasks.save()
        source = matrix_file(tmp_path, "model", "mails")
        matrices.import_file(source, tmp_path, task="news", force=True)
    there = file.read_bytes() if file.exists() else b""
    room.write(index, 8, 20)
    room.tasks.save()
    assert (file.read_bytes() if file.exists() else b"") == there
    again = room.tasks.open(key, busy={index})
    assert again.index != index, "running rows read on where they do"
    assert (room.rows(again.index)[[7, 8, 9], 0] >= 0).tolist() == [False, False, how == "import"]
    room.write(again.index, 11, 20)
    room.tasks.save()
    assert load_file(file)["rows"][11, 0] == 20


def test_a_cold_job_that_cannot_be_saved_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = Room()
    warm = room.tasks.open(TaskKey("news", tmp_path), busy=set())

    def fail(*_: object, **__: object) -> None:
        raise Unreachable("the disk is full")

    with monkeypatch.context() as full:
        full.setattr(LocalFolder, "write", fail)
        task = room.tasks.open(cold("news", tmp_path), busy=set())
    assert not task.began_cold and task.file is None
    assert not warm.outdated
    assert "is not saved: the disk is full" in caplog.text


def test_a_file_that_cannot_be_read_now_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Room(), Room()
    old.write(old.tasks.open(TaskKey("news", tmp_path), busy=set()).index, 7, 20)
    old.tasks.save()
    file = matrix_file(tmp_path, "model", "news")

    def fail(_: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(saved, "load_file", fail)
    task = new.tasks.open(TaskKey("news", tmp_path), busy=set())
    assert task.file is None and file.exists()
    assert not list(tmp_path.rglob("*.unusable"))


def test_a_sound_file_that_came_meanwhile_is_not_put_aside(tmp_path: Path) -> None:
    room = Room()
    room.write(room.tasks.open(TaskKey("news", tmp_path), busy=set()).index, 7, 20)
    room.tasks.save()
    file = matrix_file(tmp_path, "model", "news")
    seen = matrices.state_of(file)
    whole = file.read_bytes()
    file.unlink()
    assert matrices.put_aside(file, seen) is None, "somebody else has"
    file.write_bytes(whole + b"more")
    assert matrices.put_aside(file, seen) is None and file.exists()


def test_one_store_that_is_away_keeps_no_other_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room()
    for name in ("one", "two"):
        room.write(room.tasks.open(TaskKey(name, tmp_path / name), busy=set()).index, 7, 20)
    write = LocalFolder.write

    def fail(self: LocalFolder, *args: Any, **settings: Any) -> None:
        if "/one/" in f"{self.path}/":
            raise Unreachable("it is away")
        write(self, *args, **settings)

    monkeypatch.setattr(LocalFolder, "write", fail)
    with pytest.raises(Unreachable):
        room.tasks.save()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
