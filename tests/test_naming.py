"""Names of jobs, models, tasks and files."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_tools import changed

from trbatch.config import JobSpec
from trbatch.errors import UsageError
from trbatch.job import JobFolder
from trbatch.naming import default_task, slug


@pytest.mark.parametrize("name", ["../up", "a/b", "matrices", ".hidden", "", "a b"])
def test_a_job_name_that_is_no_folder_name_is_refused(spec: JobSpec, name: str) -> None:
    if name == "":
        assert JobFolder.submit(changed(spec, name=name)).id.startswith("in-")
        return
    with pytest.raises(UsageError, match="cannot be named"):
        JobFolder.submit(changed(spec, name=name))


def test_a_local_model_is_named_by_its_absolute_path(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert JobFolder.submit(changed(spec, model="tiny")).manifest.model == str(tmp_path / "tiny")
    assert JobFolder.submit(changed(spec, model="big")).manifest.model == "big"


@pytest.mark.parametrize(
    "model", ["./nothere", "/not/here", "~/nothere", "~nobody/x", "..", "w.gguf", "./empty"]
)
def test_a_local_model_that_is_not_there_is_refused_when_the_job_is_made(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="there is no") as caught:
        JobFolder.submit(changed(spec, model=model))
    assert "config.json" in (caught.value.hint or "")
    assert not Path(spec.out).exists()


def test_a_folder_or_file_called_like_a_hub_name_does_not_hide_it(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2-135m-instruct").mkdir()
    (tmp_path / "gpt2").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m-instruct", "gpt2"):
        assert JobFolder.submit(changed(spec, model=name)).manifest.model == name


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("night-2026-08-02.jsonl", "proj-night"),
        ("night_20260802T0315.jsonl.gz", "proj-night"),
        ("2026-08-02-reviews.parquet", "proj-reviews"),
        ("2026-08.jsonl", "proj"),
        ("top10-v2.jsonl", "proj-top10-v2"),
        ("data/deep/q.jsonl", "proj-q"),
    ],
)
def test_a_task_is_named_after_project_and_file_without_dates(
    tmp_path: Path, path: str, task: str
) -> None:
    project = tmp_path / "proj"
    (project / "data" / "deep").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    assert default_task(str(project / path)) == task


@pytest.mark.parametrize("text", ["a b/c", "é", "..", "-x-", "a" * 200, "x--..y"])
def test_a_slug_is_a_safe_name_and_its_own_slug(text: str) -> None:
    assert slug(slug(text)) == slug(text)
    assert not set(slug(text)) & set("/ \\:")
    assert 0 < len(slug(text)) <= 80
