"""What docs/formats.md shows is what happens: its commands parse, its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import datasets
import doc_pages
import duckdb
import pandas
import polars
import pytest
from job_tools import decode, write_lines

from trbatch import cli
from trbatch.config import SAMPLING_FIELDS, JobSpec
from trbatch.job import JobFolder
from trbatch.openai_format import _IGNORED, _NEUTRAL, _OF_THE_CHAT_TEMPLATE
from trbatch.results import collect

PAGE = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
COMMANDS = re.findall(r"^\$ trbatch (.*)$", PAGE, re.MULTILINE)
COMMANDS += re.findall(r"`trbatch ([^`]+)`", PAGE)
SAID = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
BLOCKS = SAID.findall(PAGE)


def test_every_python_block_says_what_it_prints() -> None:
    assert len(BLOCKS) == PAGE.count("```python") >= 2


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    name, *words = shlex.split(line)
    above = click.Context(cli.commands)
    assert cli.commands.commands[name].make_context(name, words, parent=above).params


@pytest.mark.parametrize(("block", "said"), BLOCKS)
def test_every_python_block_prints_what_the_page_says(
    block: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chat = {"id": "a", "messages": [{"role": "user", "content": "Hi"}]}
    spec = JobSpec(input=str(write_lines(tmp_path / "in.jsonl", chat)), out="store", model="m")
    job = JobFolder.submit(spec)
    decode(job, 0)
    collect(job, "answers.parquet")
    collect(job, "results.jsonl", "jsonl")
    modules = (datasets, duckdb, pandas, polars)
    exec(block, {module.__name__: module for module in modules})
    assert re.fullmatch(doc_pages.pattern_of(said.splitlines()), capsys.readouterr().out)


def test_every_field_that_the_page_names_is_known() -> None:
    table = PAGE[PAGE.index("| field of the body") : PAGE.index("`--ignore-body-field NAME`")]
    named = set(re.findall(r"`([a-z_]+)`", table)) - {"unsupported_field", "other_model"}
    known = {"model", "metadata", "max_completion_tokens", "chat_template_kwargs"}
    assert named <= known | SAMPLING_FIELDS | _IGNORED | _NEUTRAL.keys() | _OF_THE_CHAT_TEMPLATE
