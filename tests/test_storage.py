"""Files on a disk: written whole, created by one, and clear words when it fails."""

from __future__ import annotations

import threading
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
