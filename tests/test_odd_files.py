"""Inputs and outputs that are no plain files, or whose names are no text: refused in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from job_tools import changed, prompts, write_lines

from trbatch import cli
from trbatch.config import JobSpec
from trbatch.errors import InputError, UsageError
from trbatch.job import JobFolder
from trbatch.prompts import read_rows
from trbatch.results import collect

NOT_TEXT = os.fsdecode(b"bad\xff")


def test_a_name_that_is_no_text_is_refused_and_shown(spec: JobSpec, tmp_path: Path) -> None:
    write_lines(tmp_path / f"{NOT_TEXT}.jsonl", *prompts(3))
    for name, value in (
        ("input", str(tmp_path / f"{NOT_TEXT}.jsonl")),
        ("output", str(tmp_path / f"{NOT_TEXT}.parquet")),
        ("out", str(tmp_path / NOT_TEXT)),
    ):
        with pytest.raises(UsageError, match=r"bad\\udcff.* is not valid UTF-8") as caught:
            JobFolder.submit(changed(spec, **{name: value}))
        assert str(caught.value).encode()
    with pytest.raises(UsageError, match="not valid UTF-8"):
        collect(JobFolder.submit(spec), str(tmp_path / f"{NOT_TEXT}.parquet"))


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_the_command_shows_no_traceback_for_it(
    tmp_path: Path, home: Path, arguments: list[str]
) -> None:
    file = write_lines(tmp_path / f"{NOT_TEXT}.jsonl", *prompts(3))
    found = CliRunner().invoke(cli.commands, ["submit", str(file), "--model", "m/m", *arguments])
    assert (found.exit_code, found.stderr.startswith("error: ")) == (2, True)


def test_a_pipe_is_refused_before_anything_waits_for_it(spec: JobSpec, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="is no file but a pipe") as caught:
        JobFolder.submit(changed(spec, input=str(pipe)))
    assert "write it to a file first" in str(caught.value.hint)
    with pytest.raises(InputError, match="is no file but a pipe"):
        list(read_rows(pipe))
    assert not Path(spec.out).exists()


def test_a_dash_is_no_file_but_a_word_for_streams_and_is_refused(
    spec: JobSpec, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_lines(tmp_path / "in.jsonl", *prompts(3))
    for words in (["submit", "-"], ["submit", "-", "--dry-run"]):
        found = CliRunner().invoke(cli.commands, [*words, "--model", "m/m"], input="{}")
        assert (found.exit_code, found.stdout) == (2, "")
        assert "- cannot be the input: a job is continued by its file" in found.stderr
        assert "hint: write it to a file first" in found.stderr
    job = JobFolder.submit(spec)
    for words in (
        ["submit", str(file), "-o", "-"],
        ["run", str(file), "-o", "-", "--format", "jsonl"],
        ["collect", job.path, "-o", "-", "--format", "jsonl"],
        ["collect", job.path, "-o", "-"],
    ):
        found = CliRunner().invoke(cli.commands, words)
        assert (found.exit_code, found.stdout) == (2, "")
        assert "- cannot be the output: a dataset appears when it is whole" in found.stderr
        assert "&& cat answers.jsonl; a file of that name is ./-" in found.stderr
    assert not (tmp_path / "-").exists()
    assert not list((home / "jobs").glob("*"))


def test_a_device_is_refused(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is no file but a device"):
        JobFolder.submit(changed(spec, input=str(tmp_path / "zero.jsonl")))


def test_a_link_to_a_file_is_a_file(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(spec.input)
    assert JobFolder.submit(changed(spec, input=str(tmp_path / "link.jsonl"))).manifest.rows == 10
