"""Files on a disk: written whole, created by one, and clear words when it fails."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from job_tools import changed

from trbatch.config import JobSpec
from trbatch.errors import Unreachable
from trbatch.job import JobFolder
from trbatch.results import collect
from trbatch.storage import folder


def test_of_many_that_create_a_file_one_does(tmp_path: Path) -> None:
    ready = threading.Barrier(8)

    def create(number: int) -> bool:
        ready.wait()
        return folder(tmp_path).create("below/file", b"%d" % number)

    with ThreadPoolExecutor(8) as threads:
        created = list(threads.map(create, range(8)))
    assert created.count(True) == 1
    assert folder(tmp_path).read("below/file") == b"%d" % created.index(True)
    assert len(list((tmp_path / "below").iterdir())) == 1


def test_without_hard_links_a_file_is_created_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    assert folder(tmp_path).create("file", b"first")
    assert not folder(tmp_path).create("file", b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_a_reader_never_meets_half_a_file(tmp_path: Path) -> None:
    job = folder(tmp_path)

    def fail_half_way() -> None:
        with job.writing("a/b") as file:
            file.write(b"half")
            file.flush()
            assert job.names("a") == []
            raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        fail_half_way()
    assert list((tmp_path / "a").iterdir()) == []


def test_a_storage_that_cannot_be_written_is_unreachable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unreachable, match="cannot write"):
        folder(tmp_path / "file").write("below", b"x")


def test_a_place_where_no_folder_can_be_made_is_unreachable(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def makes_none(*_: Any, **__: Any) -> None:  # as below /proc, whoever asks
        raise FileNotFoundError(2, "No such file or directory")

    job = JobFolder.submit(spec)
    monkeypatch.setattr("os.makedirs", makes_none)
    with pytest.raises(Unreachable, match="cannot write"):
        JobFolder.submit(changed(spec, name="other"))
    with pytest.raises(Unreachable, match="cannot write"):
        collect(job, "/nowhere/out.parquet")


def test_a_file_that_is_missing_while_another_is_written_is_not_blamed_on_that(
    tmp_path: Path,
) -> None:
    store = folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="other"), store.writing("file") as file:
        file.write(store.read("other"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths in the order in which they are made safe from a power cut; renames between them."""
    paths: list[str] = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def record_sync(number: int) -> None:
        paths.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def record_rename(source: str, target: str) -> None:
        replace(source, target)
        paths.append(f"renamed {target}")

    def record_link(source: str, target: str) -> None:
        link(source, target)
        paths.append(f"renamed {target}")

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    monkeypatch.setattr(os, "link", record_link)
    return paths


@pytest.mark.parametrize("verb", ["write", "create"])
def test_a_durable_file_is_synced_before_its_name_and_its_folder_after(
    tmp_path: Path, synced: list[str], verb: str
) -> None:
    getattr(folder(tmp_path), verb)("a/b/file", b"x")
    renamed = synced.index(f"renamed {tmp_path}/a/b/file")
    assert any(path.startswith(f"{tmp_path}/a/b/.") for path in synced[:renamed])
    assert f"{tmp_path}/a/b" in synced[renamed:]
    assert {str(tmp_path), f"{tmp_path}/a"} <= set(synced), "folders that were made, too"


def test_chunks_are_safe_before_the_manifest_that_names_them(
    spec: JobSpec, synced: list[str]
) -> None:
    job = JobFolder.submit(spec)
    chunks = job.folder.join(job.manifest.chunk_folder)
    named = synced.index(f"renamed {job.path}/manifest.json")
    before = set(synced[:named])
    files = {f"{chunks}/{index:05d}.parquet" for index in range(3)}
    assert {*files, chunks, f"{job.path}/chunks", job.path, spec.out} <= before
    assert not files & set(synced[named:])


def test_a_filesystem_that_cannot_sync_folders_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def files_only(number: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(22, "Invalid argument")
        fsync(number)

    monkeypatch.setattr(os, "fsync", files_only)
    folder(tmp_path).write("a/file", b"x")
    assert folder(tmp_path).read("a/file") == b"x"


def test_only_old_temporary_files_count_as_abandoned(tmp_path: Path) -> None:
    names = [".a.bin.0123abcd", "..a.bin.0123abcd.89abcdef", ".b.bin.0123abcd", ".a.bin", "a.bin"]
    for name in [*names, ".a.bin.89abcdef"]:
        (tmp_path / name).touch()
    long_ago = time.time() - 90_000
    for name in names:
        os.utime(tmp_path / name, (long_ago, long_ago))
    here = folder(tmp_path)
    assert here.abandoned("", "a.bin") == ["..a.bin.0123abcd.89abcdef", ".a.bin.0123abcd"]
    assert len(here.abandoned("")) == 3
    assert here.abandoned("nowhere") == []


def test_the_newest_file_says_when_a_folder_changed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for path, age in ((tmp_path / "a" / ".x", 100), (tmp_path / "a", 500), (tmp_path, 900)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    assert time.time() - folder(tmp_path).last_change("") == pytest.approx(100, abs=50)
    assert folder(tmp_path).last_change("nowhere") == 0.0
    far = folder(f"memory://change-{time.time_ns()}")
    assert far.last_change("") == 0.0
    far.write("a/b", b"x")
    assert far.last_change("a") == pytest.approx(time.time(), abs=50)
