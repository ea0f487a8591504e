"""Columns that were probably meant as sampling fields: a warning for each, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from job_tools import write_lines

from trbatch import cli
from trbatch.config import DEFAULT_MODEL
from trbatch.misspelt import meant
from trbatch.schema import SCHEMA

ROWS = [
    {"id": "a", "prompt": "x", "temprature": 0.7, "topic": "t"},
    {"id": "b", "prompt": "y", "temprature": 0.9, "max_token": 5, "max_tokens": 3},
]


@pytest.fixture(autouse=True)
def no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not here, and a dry run does not look for its tokenizer anywhere else."""
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))


def invoke(*arguments: str | Path) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.commands, [*words, "--model", DEFAULT_MODEL])


@pytest.mark.parametrize(
    ("column", "field"),
    [
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("topp", "top_p"),
        ("top-k", "top_k"),
        ("maxTokens", "max_tokens"),
        ("max_token", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("repitition_penalty", "repetition_penalty"),
        ("logit_biases", "logit_bias"),
        ("stop_token_id", "stop_token_ids"),
    ],
)
def test_what_is_near_a_sampling_field_is_told(column: str, field: str) -> None:
    assert meant([column, "topic"]) == {column: field}


def test_ordinary_columns_and_those_of_an_earlier_dataset_are_not() -> None:
    ordinary = "speed seeds stops steps topic language reasoning template tokens temp rank text no"
    assert meant([*ordinary.split(), *SCHEMA.names]) == {}


@pytest.mark.parametrize("as_table", [False, True])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_submit_and_its_dry_run_warn_once_of_each_and_refuse_nothing(
    home: Path, tmp_path: Path, more: list[str], *, as_table: bool
) -> None:
    path = tmp_path / "in.parquet"
    if as_table:
        pq.write_table(pa.Table.from_pylist([{"max_token": None} | row for row in ROWS]), path)
    else:
        path = write_lines(tmp_path / "in.jsonl", *ROWS)
    result = invoke("submit", path, *more)
    assert result.exit_code == 0
    warnings = [line for line in result.stderr.splitlines() if line.startswith("WARNING: ")]
    assert warnings == [
        f"WARNING: {path}: the column {column!r} passes through and changes no text; did you mean "
        f"{field!r}?"
        for column, field in (("max_token", "max_tokens"), ("temprature", "temperature"))
    ]
    result = invoke("submit", path, *more, "--log-format", "json", "--name", "again")
    events = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    told = [(one["column"], one["field"]) for one in events if one.get("event") == "misspelt"]
    assert told == [("max_token", "max_tokens"), ("temprature", "temperature")]


def test_what_the_template_reads_is_no_slip(home: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", {"max_token": 5, "temprature": 1})
    result = invoke("submit", path, "--template", "At most {{ max_token }} words.")
    assert result.exit_code == 0
    assert "temprature" in result.stderr and "max_token" not in result.stderr
