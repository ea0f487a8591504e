"""What people open a dataset with, and its card. Pushing to the hub: test_hub.py."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from casting_pairs import PAIRS
from click.testing import CliRunner, Result
from job_tools import decode, write_lines

from trbatch import api, cli
from trbatch.config import JobSpec
from trbatch.errors import UsageError
from trbatch.job import JobFolder
from trbatch.parquet_files import schema_of
from trbatch.schema import SCHEMA
from trbatch.storage import LocalFolder, folder
from trbatch.together import check_together

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


def pushed(name: str, *rows: dict[str, Any], to: Path) -> Result:
    """A job of these rows, decoded and pushed into a folder."""
    beside = to.parent
    path = write_lines(beside / f"{name}.jsonl", *rows)
    job = JobFolder.submit(JobSpec(input=str(path), out=f"{beside}/jobs", model="m", name=name))
    if job.missing(0):
        decode(job, 0)
    return invoke("collect", job.path, "-o", beside / f"{name}.parquet", "--push", f"file://{to}")


def loaded(place: Path) -> list[dict[str, Any]]:
    """The rows of a pushed folder as `datasets` reads them."""
    import datasets

    cache = tempfile.mkdtemp(dir=place.parent)
    rows = datasets.load_dataset(str(place), cache_dir=cache)["train"]
    found: list[dict[str, Any]] = rows.to_list()
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    ("first", "second", "read"),
    [
        ({"score": 1}, {"score": 2}, [1, 2]),
        ({"score": 1, "level": "hard"}, {"score": 2}, [1, 2]),
        ({"score": 1.5}, {"score": 2}, [1.5, 2.0]),
        ({"score": {"a": 1, "b": 2}}, {"score": {"b": 3}}, [{"a": 1, "b": 2}, {"a": None, "b": 3}]),
        ({"score": "one"}, {"score": 2}, ["one", "2"]),
    ],
    ids="same fewer wider struct text".split(),
)
def test_jobs_that_open_together_add_up(
    tmp_path: Path, offline: None, first: dict[str, Any], second: dict[str, Any], read: list[Any]
) -> None:
    place = tmp_path / "answers"
    for name, values in (("night-1", first), ("night-2", second)):
        assert pushed(name, {"id": name, "prompt": "x"} | values, to=place).exit_code == 0
    assert [row["score"] for row in loaded(place)] == read
    again = pushed("night-1", {"id": "night-1", "prompt": "x"} | first, to=place)
    assert again.exit_code == 0, "compared with the others, not with what it replaces"


@pytest.mark.parametrize(
    ("first", "second", "column", "types"),
    [
        ({}, {"level": "hard"}, "level", ("string", "not")),
        ({"score": 1}, {"score": 2.5}, "score", ("double", "int64")),
        ({"score": 1}, {"score": "two"}, "score", ("string", "int64")),
        ({"score": [1]}, {"score": [2.5]}, "score[]", ("double", "int64")),
        ({"score": {"a": 1}}, {"score": {"a": 1, "b": 2}}, "score.b", ("int64", "not")),
    ],
    ids="extra float text list struct".split(),
)
def test_a_job_that_would_not_open_with_the_others_is_not_pushed(
    tmp_path: Path, offline: None, first: dict[str, Any], second: dict[str, Any],
    column: str, types: tuple[str, str],
) -> None:  # fmt: skip
    place, apart = tmp_path / "answers", tmp_path / "answers" / "other"
    assert pushed("night-1", {"id": "a", "prompt": "x"} | first, to=place).exit_code == 0
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    refused = pushed("night-2", {"id": "b", "prompt": "x"} | second, to=place)
    assert refused.exit_code == 2, refused.output
    mine, theirs = "data/night-2.parquet", "data/night-1.parquet"
    assert f"the column '{column}' is {types[0]} in {mine} and {types[1]} in {theirs}" in (
        refused.stderr
    )
    _, hint = refused.stderr.splitlines()
    assert "a place of its own" in hint
    assert f"the dataset is whole in {tmp_path}/night-2.parquet" in hint
    assert pd.read_parquet(tmp_path / "night-2.parquet")["custom_id"].tolist() == ["b"]
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert [row["custom_id"] for row in loaded(place)] == ["a"]
    # And it is true: with this file there it would not open.
    shutil.copy(tmp_path / "night-2.parquet", place / "data")
    with pytest.raises(Exception, match="generating the dataset"):
        loaded(place)
    (place / "data" / "night-2.parquet").unlink()
    cured = invoke(
        "collect", tmp_path / "jobs" / "night-2", "-o", tmp_path / "night-2.parquet",
        "--push", f"file://{apart}",
    )  # fmt: skip
    assert cured.exit_code == 0, cured.output
    assert [row["custom_id"] for row in loaded(apart)] == ["b"]
    assert [row["custom_id"] for row in loaded(place)] == ["a"]


@pytest.mark.parametrize("new_is_first", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize(
    ("first", "second", "opens"), [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS]
)
def test_columns_are_refused_that_datasets_would_not_cast(
    tmp_path: Path, first: pa.Array, second: pa.Array, opens: bool, new_is_first: bool
) -> None:
    from datasets import Features
    from datasets.table import table_cast

    paths = [tmp_path / "data" / "1.parquet", tmp_path / "data" / "2.parquet"]
    paths[0].parent.mkdir()
    for path, values in zip(paths, (first, second), strict=True):
        pq.write_table(pa.table({"given": values}), path)
    told = ""
    try:  # as its reader of Parquet does
        features = Features.from_arrow_schema(pq.read_schema(paths[0]))
        table_cast(pq.ParquetFile(paths[1]).read(), features.arrow_schema)
    except (pa.ArrowException, TypeError, ValueError) as error:
        told = str(error)
    assert (not told) == opens, f"the table of pairs is wrong: {told}"
    new = paths[0 if new_is_first else 1].rename(tmp_path / "new.parquet")
    name = f"data/{1 if new_is_first else 2}.parquet"
    if opens:
        check_together(folder(str(tmp_path)), name, folder(str(tmp_path)), new.name)
        return
    with pytest.raises(UsageError, match=r"the column 'given.* in data/2\.parquet and") as refused:
        check_together(folder(str(tmp_path)), name, folder(str(tmp_path)), new.name)
    assert len(refused.value.message.splitlines()) == 1


def test_the_value_that_cannot_be_cast_is_told(tmp_path: Path) -> None:
    place = tmp_path / "answers"
    assert pushed("night-1", {"id": "a", "prompt": "x", "score": 1}, to=place).exit_code == 0
    refused = pushed("night-2", {"id": "b", "prompt": "x", "score": 2.5}, to=place)
    assert "the first file there (Float value 2.500000 was truncated" in refused.stderr
    assert pushed("night-3", {"id": "c", "prompt": "x", "score": 3.0}, to=place).exit_code == 0
    assert [row["score"] for row in loaded(place)] == [1, 3]


def small_files(place: Path, *names: str, **columns: Any) -> LocalFolder:
    """A place of datasets with files of these columns."""
    (place / "data").mkdir(parents=True, exist_ok=True)
    for name in names:
        pq.write_table(pa.table({"n": [1]} | columns), place / "data" / f"{name}.parquet")
    return LocalFolder(place)


def test_a_file_that_replaces_its_like_is_compared_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"night-{number}" for number in range(10, 90)]
    root, new = small_files(tmp_path / "set", *names), small_files(tmp_path, "new")
    read: list[str] = []
    tail = LocalFolder.tail

    def counted(folder: LocalFolder, name: str, size: int) -> bytes:
        read.append(name)
        return tail(folder, name, size)

    monkeypatch.setattr(LocalFolder, "tail", counted)
    check_together(root, "data/night-10.parquet", new, "data/new.parquet")
    assert read == ["data/new.parquet", "data/night-10.parquet"]
    small_files(tmp_path, "new", more=["x"])
    check_together(root, "data/night-10.parquet", new, "data/new.parquet")
    assert len(read) == 2 + 81, "of another schema: compared with all"


def test_footers_are_read_several_at_a_time_and_the_vanished_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"night-{number}" for number in range(16)]
    root, new = small_files(tmp_path / "set", *names), small_files(tmp_path, "new")
    small_files(tmp_path / "set", "odd", m=[1])
    together = threading.Barrier(8)
    tail = LocalFolder.tail

    def slow(folder: LocalFolder, name: str, size: int) -> bytes:
        if folder is root and "night-" in name:
            together.wait(timeout=30)
            if name.endswith("5.parquet"):
                (tmp_path / "set" / name).unlink()
        return tail(folder, name, size)

    monkeypatch.setattr(LocalFolder, "tail", slow)
    with pytest.raises(UsageError, match="column 'm' is int64 in data/odd"):
        check_together(root, "data/a.parquet", new, "data/new.parquet")
    assert not (tmp_path / "set" / "data" / "night-15.parquet").exists()


def test_the_first_file_is_the_first_that_has_not_vanished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, new = small_files(tmp_path / "set", "a", "b"), small_files(tmp_path, "new", m=[1])
    monkeypatch.setattr(LocalFolder, "names", lambda *_: ["_.parquet", "a.parquet", "b.parquet"])
    with pytest.raises(UsageError, match=r"not in data/a\.parquet, the first"):
        check_together(root, "data/c.parquet", new, "data/new.parquet")


def test_a_job_that_comes_first_by_name_is_compared_with_all(tmp_path: Path, offline: None) -> None:
    place = tmp_path / "answers"
    for number, values in ((2, {}), (3, {"level": "hard"})):
        job = {"id": f"r{number}", "prompt": "x", "kind": "k"} | values
        assert pushed(f"night-{number}", job, to=tmp_path / f"set-{number}").exit_code == 0
    shutil.copytree(tmp_path / "set-2", place)
    first = {"id": "a", "prompt": "x", "kind": "k"}
    assert pushed("night-1", first, to=place).exit_code == 0
    (place / "data" / "night-1.parquet").unlink()
    shutil.copy(tmp_path / "set-3" / "data" / "night-3.parquet", place / "data")
    refused = pushed("night-1", first, to=place)
    assert refused.exit_code == 2
    assert (
        "the column 'level' is string in data/night-3.parquet and not in data/night-1.parquet"
        in refused.stderr
    )


def test_a_card_that_says_which_files_belong_together_is_heeded(tmp_path: Path) -> None:
    place = tmp_path / "answers"
    assert pushed("night-1", {"id": "a", "prompt": "x"}, to=place).exit_code == 0
    more = {"id": "b", "prompt": "x", "level": "hard"}
    (place / "README.md").write_text("# Mine\n\ndata_files: as they come\n")
    assert pushed("night-2", more, to=place).exit_code == 2
    mine = "---\nconfigs:\n- config_name: one\n  data_files: data/night-1.parquet\n---\n# Mine\n"
    (place / "README.md").write_text(mine)
    assert pushed("night-2", more, to=place).exit_code == 0
    assert (place / "README.md").read_text() == mine


def test_a_damaged_file_there_is_named(tmp_path: Path) -> None:
    place = tmp_path / "answers"
    (place / "data").mkdir(parents=True)
    for damaged in (b"", b"no Parquet", b"\xff\xff\xff\x7fPAR1", b"????\x04\0\0\0PAR1"):
        (place / "data" / "a.parquet").write_bytes(damaged)
        refused = pushed("night-1", {"id": "a", "prompt": "x"}, to=place)
        assert refused.exit_code == 2, damaged
        assert f"{place}/data/a.parquet is no whole Parquet file" in refused.stderr
        assert "hint: remove it" in refused.stderr


@pytest.mark.parametrize("columns", [1, 5000], ids=["short", "long"])
@pytest.mark.parametrize("where", ["", "memory://"])
def test_a_schema_is_read_from_the_end_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int, where: str
) -> None:
    numbers = {f"number {i}": [i] for i in range(columns)}
    table = pa.table({"text": ["x" * 1_000_000]} | numbers)
    root = folder(f"{where}{tmp_path}")
    with root.writing("a.parquet") as file:
        pq.write_table(table, file, compression="none", use_dictionary=False)
    read = []
    tail = type(root).tail
    monkeypatch.setattr(type(root), "tail", lambda *given: read.append(tail(*given)) or read[-1])
    assert schema_of(root, "a.parquet") == table.schema
    assert len(read) == (1 if columns == 1 else 2)
    assert root.stat("a.parquet").size - len(read[-1]) > 900_000, "the rows are not read"
