"""What people open a dataset with, and its card. Pushing to the hub: test_hub.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pytest
import yaml
from click.testing import CliRunner, Result
from job_tools import decode, write_lines

from trbatch import api, cli
from trbatch.config import JobSpec
from trbatch.job import JobFolder
from trbatch.schema import SCHEMA

ROWS = [
    {"id": "a", "prompt": "x", "topic": "sea", "meta": {"lang": "en"}, "tags": ["t", "u"], "n": 2},
    {"id": "b", "prompt": "y", "topic": None, "score": 0.5},
    {"id": "c"},
]


@pytest.fixture
def job(tmp_path: Path) -> api.Job:
    path = write_lines(tmp_path / "in.jsonl", *ROWS)
    spec = JobSpec(
        input=str(path), out=str(tmp_path / "store"), model="org/m", name="night", seed=7,
        system_prompt="Be ``brief``.", chat_template_kwargs={"style": "a|b"},
    )  # fmt: skip
    made = JobFolder.submit(spec)
    decode(made, 0)
    return api.Job(made)


def header(text: str) -> dict[str, Any]:
    _, found, _ = text.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(found)
    return values


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])


def test_pandas_polars_and_duckdb_open_the_output(job: api.Job, tmp_path: Path) -> None:
    path = job.collect(tmp_path / "out.parquet").output
    of_pandas = pd.read_parquet(path)
    of_polars = pl.read_parquet(path)
    of_duckdb = duckdb.sql(f"select * from '{path}' order by prompt_index, sample_index")
    names = list(of_pandas.columns)
    assert set(names) == {*SCHEMA.names, "topic", "meta", "tags", "score"}
    assert of_polars.columns == names
    assert of_duckdb.columns == names
    texts = ["answer to a", "answer to a", "answer to b", None]
    assert of_pandas["text"].tolist()[:3] == texts[:3]
    assert of_pandas["text"].isna().tolist() == [False, False, False, True]
    assert of_polars["text"].to_list() == texts
    assert [row[names.index("text")] for row in of_duckdb.fetchall()] == texts
    assert of_polars["tags"].to_list() == [["t", "u"], ["t", "u"], None, None]
    assert of_polars["acceptance_histogram"].to_list()[0] == [1, 2, 1]
    assert duckdb.sql(f"select meta.lang from '{path}' limit 1").fetchall() == [("en",)]
    assert pl.scan_parquet(path).filter(pl.col("error_code").is_null()).collect().height == 3
    assert of_pandas["completion_tokens"].sum() == 27


def test_datasets_opens_the_output_and_a_pushed_folder_by_its_card(
    job: api.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    kept = {"cache_dir": str(tmp_path / "cache")}
    path = job.collect(tmp_path / "alone" / "out.parquet", card=True).output
    rows = datasets.load_dataset("parquet", data_files=path, **kept)["train"]
    assert rows["text"] == ["answer to a", "answer to a", "answer to b", None]
    assert rows[0]["tags"] == ["t", "u"]
    beside = datasets.load_dataset(str(tmp_path / "alone"), **kept)  # finds the files by the card
    assert list(beside) == ["train"]
    assert beside["train"].num_rows == 4
    api.collect(job, tmp_path / "out.parquet", push=f"file://{tmp_path}/pushed")
    pushed = datasets.load_dataset(str(tmp_path / "pushed"), **kept)["train"]
    assert pushed.to_list() == rows.to_list()


def test_the_card_says_how_the_texts_were_made(job: api.Job, tmp_path: Path) -> None:
    receipt = job.collect(tmp_path / "set" / "answers.parquet", card=True)
    assert receipt.card == f"{tmp_path}/set/README.md"
    text = Path(receipt.card).read_text()
    assert header(text) == {
        "pretty_name": "night",
        "tags": ["synthetic", "trbatch"],
        "size_categories": ["n<1K"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "answers.parquet"}],
            }
        ],
    }
    assert "3 texts written by `org/m`, 27 tokens" in text
    assert str(receipt) in text
    assert "```\nBe ``brief``.\n```" in text
    assert '`{"style":"a\\|b"}`' in text
    assert '`{"max_tokens":256,"temperature":0.0}`' in text
    assert "| job seed | 7 |" in text
    assert "| `topic` | string | of the input |" in text
    assert "| `text` | string | the generated text; null for an error row |" in text
    assert str(tmp_path) not in text, "a card tells nothing of the machine"


def test_a_card_never_replaces_one_of_another_hand(job: api.Job, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    result = invoke("collect", job.path, "-o", tmp_path / "out.parquet", "--card")
    assert result.exit_code == 2
    assert "was not written by trbatch" in result.stderr
    assert not (tmp_path / "out.parquet").exists()
    for _ in range(2):  # its own it writes anew
        job.collect(tmp_path / "apart" / "out.parquet", card=True)
