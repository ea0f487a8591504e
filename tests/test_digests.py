"""Digests of weights: of every byte, read once, and never stale."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

import pytest

from trbatch import digests, models
from trbatch.digests import file_digests


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is read, in order."""
    found: list[Path] = []

    def read(file: Path) -> str:
        found.append(file)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    monkeypatch.setattr(digests, "sha256_of", read)
    return found


def written(file: Path, data: bytes) -> Path:
    """A file that nobody has touched for a while."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    age(file)
    return file


def age(file: Path) -> None:
    # A file's ctime cannot be set: what counts as settled is moved instead.
    past = time.time() - 60
    os.utime(file, (past, past))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr(digests, "_SETTLED_S", -1.0)


def test_a_file_is_read_once(tmp_path: Path, reads: list[Path], settled: None) -> None:
    files = [written(tmp_path / name, name.encode()) for name in ("one", "two")]
    first = file_digests(files)
    assert first == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert file_digests(files) == first
    assert sorted(reads) == files


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_file_that_changed_is_read_again_also_when_its_time_was_put_back(
    tmp_path: Path, reads: list[Path], settled: None, keep_time: bool
) -> None:
    file = written(tmp_path / "weights", b"a" * 100)
    before, times = file_digests([file]), file.stat()
    with file.open("r+b") as stream:
        stream.seek(50)
        stream.write(b"b")  # in the middle, size as before
    if keep_time:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digests([file]) != before
    assert len(reads) == 2


def test_a_file_put_in_the_place_of_another_is_read(
    tmp_path: Path, reads: list[Path], settled: None
) -> None:
    file, other = written(tmp_path / "weights", b"a"), written(tmp_path / "other", b"b")
    before = file_digests([file])
    other.replace(file)
    assert file_digests([file]) != before


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a")
    file_digests([file])
    file_digests([file])
    assert len(reads) == 2


@pytest.mark.parametrize("kept", [b"", b"[]", b"{}", b'{"digest": 1}', b"\xff"])
def test_what_was_kept_and_is_damaged_is_made_again(
    tmp_path: Path, reads: list[Path], settled: None, cache: Path, kept: bytes
) -> None:
    file = written(tmp_path / "weights", b"a")
    before = file_digests([file])
    (remembered,) = (cache / "digests").iterdir()
    remembered.write_bytes(kept)
    assert file_digests([file]) == before
    assert json.loads(remembered.read_bytes())["digest"] == before[0]


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, settled: None, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("in the way")
    file = written(tmp_path / "weights", b"a")
    with caplog.at_level(logging.WARNING, "trbatch"):
        assert file_digests([file]) == [hashlib.sha256(b"a").hexdigest()]
    assert "will be read again the next time" in caplog.text


def test_one_bit_in_the_middle_of_the_weights_makes_another_model(tmp_path: Path) -> None:
    """The edges and the header alone would not tell."""
    folders = []
    for name, middle in (("one", b"\x00"), ("other", b"\x01")):
        half = bytes(3 << 20)
        written(tmp_path / name / "model.safetensors", half + middle + half)
        (tmp_path / name / "config.json").write_text("{}")
        folders.append(tmp_path / name)
    assert models.weights_digest(folders[0]) != models.weights_digest(folders[1])
