"""From segments to one dataset: every row once, in order, with the receipt that proves it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trbatch import cli, passthrough
from trbatch.config import JobSpec, SamplingParams
from trbatch.engine.sequence import Completion
from trbatch.errors import JobFailed, UsageError
from trbatch.job import ChunkRow, JobFolder
from trbatch.report_page import page
from trbatch.reporting import make_report
from trbatch.results import SCHEMA, Receipt, collect, result_row, schema_table


def make_job(tmp_path: Path, *rows: Any, **settings: Any) -> JobFolder:
    path = tmp_path / "in.jsonl"
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{text}\n" for text in texts))
    values = {"out": str(tmp_path / "store"), "model": "m", "chunk_size": 2} | settings
    return JobFolder.submit(JobSpec.from_dict({"input": str(path)} | values))


def prompts(*names: str) -> list[dict[str, Any]]:
    return [{"id": name, "prompt": f"About {name}."} for name in names]


def completion(row: ChunkRow, sample: int = 0, **values: Any) -> Completion:
    defaults: dict[str, Any] = {
        "finish_reason": "stop",
        "text": f"{row.custom_id}/{sample}",
        "token_ids": [1, 2, 3],
        "prompt_tokens": 4,
        "decode_s": 0.5,
        "num_spec_steps": 1,
    }
    return Completion(key=0, sample_index=sample, **(defaults | values))


def result(row: ChunkRow, sample: int = 0, **values: Any) -> dict[str, Any]:
    done = completion(row, sample, **values)
    return result_row(done, row, model="m", task="t", worker="w", attempts=1)


def decode_all(job: JobFolder, **values: Any) -> None:
    """Publish everything that is missing, the last chunk first."""
    for index in reversed(job.missing_chunks()):
        job.publish("w", [result(row, sample, **values) for row, sample in job.missing(index)])


def rows_of(receipt: Receipt) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(receipt.output).to_pylist()
    return rows


def test_a_result_row_has_exactly_the_columns_of_the_schema(tmp_path: Path) -> None:
    row = make_job(tmp_path, *prompts("a")).chunk_rows(0)[0]
    assert list(result(row)) == SCHEMA.names


def test_rates_count_decoding_alone(tmp_path: Path) -> None:
    row = make_job(tmp_path, *prompts("a")).chunk_rows(0)[0]
    made = result(
        row,
        token_ids=list(range(9)),
        prefill_s=7.0,
        decode_s=2.0,
        baseline_decode_s=4.0,
        num_spec_steps=4,
        num_draft_tokens=16,
        num_accepted_draft_tokens=4,
    )
    assert made["tokens_per_s"] == 4.0
    assert made["baseline_tokens_per_s"] == 2.0
    assert made["speedup"] == 2.0
    assert made["mean_acceptance_length"] == 2.0
    assert made["draft_acceptance_rate"] == 0.25


def test_a_rate_that_is_undefined_is_null(tmp_path: Path) -> None:
    row = make_job(tmp_path, *prompts("a")).chunk_rows(0)[0]
    made = result(row, token_ids=[1], decode_s=0.0, num_spec_steps=0)
    undefined = ["tokens_per_s", "speedup", "mean_acceptance_length", "draft_acceptance_rate"]
    assert [made[name] for name in undefined] == [None] * 4


def test_every_row_comes_once_in_input_order(tmp_path: Path) -> None:
    job = make_job(tmp_path, *prompts("a", "b", "c", "d", "e"))
    decode_all(job)
    receipt = collect(job)
    assert [row["text"] for row in rows_of(receipt)] == ["a/0", "b/0", "c/0", "d/0", "e/0"]
    assert [row["prompt_index"] for row in rows_of(receipt)] == [0, 1, 2, 3, 4]
    assert str(receipt) == ("complete: 5 rows in = 5 ok + 0 failed + 0 cancelled, each id once")
    assert receipt.exit_code == 0


def test_where_rows_have_several_samples_these_are_counted_and_called_so(tmp_path: Path) -> None:
    job = make_job(tmp_path, {"id": "a", "prompt": "x", "n": 4}, {"id": "b"}, *prompts("c"))
    decode_all(job)
    receipt = collect(job)
    words = "complete: 6 samples of 3 rows in = 5 ok + 1 failed + 0 cancelled, each sample once"
    assert str(receipt) == words
    assert (receipt.rows_in, receipt.input_rows, receipt.sampled) == (6, 3, True)
    done = CliRunner().invoke(
        cli.commands, ["collect", job.path, "-o", str(tmp_path / "d" / "o.parquet"), "--card"]
    )
    assert f"\nreceipt                 {words}\n" in done.stdout
    assert done.stdout.startswith("samples                 5 ok, 1 failed, of 3 rows\n")
    assert words in (tmp_path / "d" / "README.md").read_text()
    shown = page(make_report(job))
    assert "Complete: 1 failed of 6 samples" in shown
    assert "5 ok, 1 failed, of 3 rows" in shown
    assert words[1:] in shown


def test_bad_rows_and_failed_rows_are_rows_of_the_dataset(tmp_path: Path) -> None:
    job = make_job(tmp_path, *prompts("a", "b"), "not json", {"id": "d", "prompt": ""})
    row = job.chunk_rows(0)[1]
    failed: dict[str, Any] = {
        "finish_reason": "error",
        "error_code": "too_long",
        "error_message": "too long",
    }
    job.publish("w", [result(row, **failed)])
    decode_all(job)
    receipt = collect(job)
    rows = rows_of(receipt)
    assert [row["custom_id"] for row in rows] == ["a", "b", "3", "d"]
    assert [row["finish_reason"] for row in rows] == ["stop", "error", "error", "error"]
    assert [row["text"] for row in rows] == ["a/0", None, None, None]
    codes = [None, "too_long", "invalid_json", "empty_prompt"]
    assert [row["error_code"] for row in rows] == codes
    assert (receipt.rows_ok, receipt.rows_failed, receipt.exit_code) == (1, 3, 3)
    errors = [json.loads(line) for line in Path(job.path, "errors.jsonl").read_text().splitlines()]
    assert [(error["custom_id"], error["line"]) for error in errors] == [
        ("b", 2),
        ("3", 3),
        ("d", 4),
    ]


def test_a_job_of_bad_rows_alone_is_complete(tmp_path: Path) -> None:
    receipt = collect(make_job(tmp_path, "not json", "{}"))
    assert receipt.complete
    assert [row["finish_reason"] for row in rows_of(receipt)] == ["error", "error"]


def test_a_missing_row_makes_the_receipt_say_so(tmp_path: Path) -> None:
    job = make_job(tmp_path, *prompts("a", "b", "c"))
    job.publish("w", [result(row) for row, _ in job.missing(0)])
    receipt = collect(job)
    assert not receipt.complete
    assert receipt.rows_missing == 1
    assert receipt.exit_code not in (0, 3)
    assert "NOT complete: 3 rows in" in str(receipt)
    assert "1 missing" in str(receipt)
    assert Path(job.path, "_PARTIAL").exists()
    decode_all(job)
    assert collect(job).complete
    assert Path(job.path, "_SUCCESS").exists()
    assert not Path(job.path, "_PARTIAL").exists()


def test_an_empty_collect_is_a_valid_file(tmp_path: Path) -> None:
    receipt = collect(make_job(tmp_path, *prompts("a")))
    assert rows_of(receipt) == []
    assert receipt.rows_missing == 1


def test_the_first_of_two_results_wins_and_the_other_is_counted(tmp_path: Path) -> None:
    job = make_job(tmp_path, *prompts("a", "b"))
    rows = job.chunk_rows(0)
    job.publish("z", [result(rows[0], text="first"), result(rows[1])])
    job.publish("a", [result(rows[0], text="second")])
    receipt = collect(job)
    assert rows_of(receipt)[0]["text"] == "first"
    assert receipt.duplicates == 1
    assert receipt.complete
    assert "1 duplicates left out" in str(receipt)


def test_a_text_wins_over_an_earlier_failure(tmp_path: Path) -> None:
    job = make_job(tmp_path, *prompts("a"))
    row = job.chunk_rows(0)[0]
    for reason in ("cancelled", "error", "length"):
        job.publish("w", [result(row, finish_reason=reason)])
    assert rows_of(collect(job))[0]["finish_reason"] == "length"


def test_samples_of_a_row_stand_together(tmp_path: Path) -> None:
    job = make_job(tmp_path, {"id": "a", "prompt": "x", "n": 3}, *prompts("b"))
    decode_all(job)
    receipt = collect(job)
    assert [row["text"] for row in rows_of(receipt)] == ["a/0", "a/1", "a/2", "b/0"]
    assert (receipt.rows_in, receipt.rows_ok) == (4, 4)


def test_a_changed_input_decides_which_rows_and_in_which_order(tmp_path: Path) -> None:
    decode_all(make_job(tmp_path, *prompts("a", "b", "c")))
    newer = make_job(tmp_path, *prompts("c", "d", "a"))
    decode_all(newer)
    receipt = collect(newer)
    rows = [(row["custom_id"], row["prompt_index"]) for row in rows_of(receipt)]
    assert rows == [("c", 0), ("d", 1), ("a", 2)]
    assert receipt.stats["rows_outdated"] == 1
    assert receipt.complete


def test_columns_of_the_input_are_joined_by_key_and_keep_their_types(tmp_path: Path) -> None:
    rows = [row | {"n_words": i, "tags": [{"k": i}]} for i, row in enumerate(prompts(*"abcde"))]
    job = make_job(tmp_path, *rows)
    decode_all(job)
    table = pq.read_table(collect(job).output)
    assert table.column_names[:6] == [
        "custom_id",
        "sample_index",
        "prompt_index",
        "n_words",
        "tags",
        "text",
    ]
    assert table.schema.field("n_words").type == pa.int64()
    assert table["n_words"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["tags"].to_pylist() == [[{"k": i}] for i in range(5)]


def test_columns_of_different_chunks_get_one_type(tmp_path: Path) -> None:
    extras: list[dict[str, Any]] = [
        {"score": 1, "mixed": 1, "late": None, "obj": {"a": 1}},
        {"score": 2, "mixed": 2, "late": None, "obj": {"a": 2}},
        {"score": 2.5, "mixed": "three", "late": "yes", "obj": {"b": "x"}, "new": True},
        {"score": None, "mixed": [4], "big": 2**63, "empty": {}, "nothing": None},
    ]
    job = make_job(tmp_path, *(p | e for p, e in zip(prompts(*"abcd"), extras, strict=True)))
    decode_all(job)
    receipt = collect(job)
    rows = rows_of(receipt)
    assert [row["score"] for row in rows] == [1.0, 2.0, 2.5, None]
    assert [row["mixed"] for row in rows] == ["1", "2", '"three"', "[4]"]
    assert [row["late"] for row in rows] == [None, None, "yes", None]
    assert rows[0]["obj"] == {"a": 1, "b": None}
    assert rows[2]["obj"] == {"a": None, "b": "x"}
    assert [row["new"] for row in rows] == [None, None, True, None]
    assert json.loads(rows[3]["big"]) == 2**63
    assert rows[3]["empty"] == "{}"
    assert rows[3]["nothing"] is None


def test_a_column_with_a_name_of_ours_gets_a_prefix(tmp_path: Path) -> None:
    row = prompts("a")[0] | {"text": "theirs", "input_text": "too", "line": 7, "model": "gpt"}
    job = make_job(tmp_path, row)
    decode_all(job)
    (found,) = rows_of(collect(job))
    assert (found["text"], found["model"], found["line"]) == ("a/0", "m", 7)
    assert found["input_text"] == "too"
    assert found["input_input_text"] == "theirs"
    assert found["input_model"] == "gpt"


def test_parquet_columns_come_out_as_they_went_in(tmp_path: Path) -> None:
    moment = datetime.datetime(2026, 8, 2, 3, 15, tzinfo=datetime.UTC)
    columns = {
        "id": ["a", "b", "c"],
        "prompt": ["x", "y", "z"],
        "when": pa.array([moment, None, moment], pa.timestamp("ms", "UTC")),
        "price": pa.array([1, 2, 3], pa.decimal128(10, 2)),
        "raw": pa.array([b"\0\xff", b"", None]),
        "kind": pa.array(["u", "v", "u"]).dictionary_encode(),
        "vector": pa.array([[0.5], [], None], pa.list_(pa.float32())),
    }
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    spec = JobSpec(input=str(path), out=str(tmp_path / "store"), model="m", chunk_size=2)
    job = JobFolder.submit(spec)
    decode_all(job)
    table = pq.read_table(collect(job).output)
    for name in ("when", "price", "raw", "vector"):
        assert table[name].to_pylist() == pa.chunked_array([columns[name]]).to_pylist()
        assert table.schema.field(name).type == columns[name].type
    assert table["kind"].to_pylist() == ["u", "v", "u"]


def test_duckdb_reads_the_dataset(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    extra = {"topic": "sea", "deep": {"a": [1, 2]}, "unknown": None, "none": [None]}
    job = make_job(tmp_path, *(row | extra for row in prompts("a", "b", "c")), "not json")
    decode_all(job, acceptance_histogram=[1, 2])
    output = collect(job).output
    query = f"select finish_reason, count(*), sum(completion_tokens) from '{output}' group by 1"
    with duckdb.connect() as database:
        assert sorted(database.execute(query).fetchall()) == [("error", 1, None), ("stop", 3, 9)]
        (row,) = database.execute(f"select * from '{output}' limit 1").fetchall()
    assert row[:4] == ("a", 0, 0, "sea")


def test_the_file_says_what_made_it(tmp_path: Path) -> None:
    job = make_job(tmp_path, *prompts("a", "b"), revision="v1", sampling=SamplingParams(top_k=5))
    rows = job.chunk_rows(0)
    for row, dtype in zip(rows, ("float32", "bfloat16"), strict=True):
        job.publish("w", [result(row)], facts={"dtype": dtype})
    metadata = pq.read_schema(collect(job).output).metadata
    assert metadata[b"trbatch.model"] == b"m"
    assert metadata[b"trbatch.revision"] == b"v1"
    assert metadata[b"trbatch.dtype"] == b"bfloat16, float32"
    assert metadata[b"trbatch.job"] == job.id.encode()
    assert json.loads(metadata[b"trbatch.sampling"])["top_k"] == 5
    assert b"trbatch.version" in metadata


def test_stats_hold_the_receipt_and_the_figures(tmp_path: Path) -> None:
    job = make_job(tmp_path, *prompts("a", "b"))
    decode_all(job, baseline_decode_s=1.0)
    receipt = collect(job)
    stats = json.loads(Path(job.path, "stats.json").read_text())
    assert stats == receipt.stats
    assert stats["receipt"]["complete"] is True
    assert stats["receipt"]["in_words"] == str(receipt)
    assert stats["figures"]["completion_tokens"] == 6
    assert stats["speedup"] == 2.0
    assert stats["mean_acceptance_length"] == 2.0


def test_jsonl_output_is_openai_batch_lines(tmp_path: Path) -> None:
    job = make_job(
        tmp_path,
        {"id": "a", "prompt": "x", "n": 2, "topic": "sea", "mixed": 1},
        {"id": "b", "prompt": "y", "mixed": "s"},
        "not json",
    )
    decode_all(job)
    receipt = collect(job, str(tmp_path / "out.jsonl"), "jsonl")
    lines = [json.loads(line) for line in Path(receipt.output).read_text().splitlines()]
    failed = [json.loads(line) for line in Path(receipt.errors_output).read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b"]
    assert receipt.errors_output == str(tmp_path / "out.errors.jsonl")
    body = lines[0]["response"]["body"]
    assert [choice["text"] for choice in body["choices"]] == ["a/0", "a/1"]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    assert lines[0]["error"] is None
    assert lines[0]["trbatch"]["input"] == {"topic": "sea", "mixed": 1}
    assert [line["custom_id"] for line in failed] == ["3"]
    assert failed[0]["response"] is None
    assert failed[0]["error"]["code"] == "invalid_json"
    assert failed[0]["error"]["line"] == 3
    assert receipt.complete


def test_the_output_goes_where_it_was_asked_for(tmp_path: Path) -> None:
    job = make_job(tmp_path, *prompts("a"), output=str(tmp_path / "deep" / "own.parquet"))
    assert collect(job).output == str(tmp_path / "deep" / "own.parquet")
    (tmp_path / "folder").mkdir()
    assert collect(job, str(tmp_path / "folder")).output == (
        f"{tmp_path / 'folder'}/{job.id}.parquet"
    )


def test_an_output_can_lie_in_an_object_store(tmp_path: Path) -> None:
    import fsspec

    job = make_job(tmp_path, *prompts("a"), out="memory://store-of-results")
    decode_all(job)
    receipt = collect(job, "memory://results/out.parquet")
    with fsspec.open(receipt.output, "rb") as file:
        assert pq.read_table(file).num_rows == 1
    assert job.folder.exists("_SUCCESS")


def test_an_output_that_would_mislead_or_overwrite_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, *prompts("a"))
    with pytest.raises(UsageError, match="would be a Parquet file"):
        collect(job, str(tmp_path / "out.jsonl"))
    with pytest.raises(UsageError, match="is the job's input"):
        collect(job, job.manifest.input.path, "jsonl")
    with pytest.raises(UsageError, match="format must be one of"):
        collect(job, None, "csv")
    with pytest.raises(UsageError, match="would be lines of JSON"):
        collect(job, str(tmp_path / "out.PARQUET"), "jsonl")
    with pytest.raises(UsageError, match="would be a Parquet file"):
        collect(job, str(tmp_path / "out.jsonl.gz"))


def test_the_other_format_leaves_the_jobs_own_file_alone(tmp_path: Path) -> None:
    own = tmp_path / "own.parquet"
    job = make_job(tmp_path, *prompts("a"), output=str(own))
    decode_all(job)
    collect(job)
    before = own.read_bytes()
    assert collect(job, None, "jsonl").output == f"{job.path}/results.jsonl"
    assert own.read_bytes() == before
    lines = make_job(tmp_path, *prompts("a"), output=str(tmp_path / "own.jsonl"), name="lines")
    assert collect(lines).output == f"{lines.path}/results.parquet"
    assert collect(lines, None, "jsonl").output == str(tmp_path / "own.jsonl")


def test_an_output_that_no_format_may_have_is_refused_when_the_job_is_made(tmp_path: Path) -> None:
    for name in ("out.csv", "in.jsonl"):
        with pytest.raises(UsageError, match=name):
            make_job(tmp_path, *prompts("a"), output=str(tmp_path / name))
    assert not (tmp_path / "store").exists()
    (tmp_path / "folder.csv").mkdir()
    make_job(tmp_path, *prompts("a"), output=str(tmp_path / "folder.csv"))


@pytest.mark.parametrize("where", ["footer", "page"])
def test_a_damaged_segment_is_named_and_the_old_output_stays(tmp_path: Path, where: str) -> None:
    job = make_job(tmp_path, *prompts("a"))
    decode_all(job)
    output = Path(collect(job).output)
    before = output.read_bytes()
    segment = job.ledger.names()[0]
    whole = job.folder.read(f"segments/{segment}")
    damaged = whole[:-9] + b"x" * 9 if where == "footer" else whole[:40] + bytes(8) + whole[48:]
    job.folder.write(f"segments/{segment}", damaged)
    with pytest.raises(JobFailed, match=f"{segment} is damaged"):
        collect(job)
    assert output.read_bytes() == before


def test_groups_of_rows_join_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trbatch.joining._GROUP_ROWS", 3)
    names = [f"r{i}" for i in range(11)]
    job = make_job(tmp_path, *prompts(*names))
    rows = [row for index in range(job.manifest.chunks) for row in job.chunk_rows(index)]
    for start in range(4):  # every segment has rows of every group
        job.publish("w", [result(row) for row in rows[start::4]])
    receipt = collect(job)
    assert [row["text"] for row in rows_of(receipt)] == [f"{name}/0" for name in names]
    assert receipt.complete


def test_the_schema_table_has_every_column_with_its_meaning() -> None:
    table = schema_table()
    assert all(f"| `{name}` |" in table for name in SCHEMA.names)
    assert all(field.metadata[b"description"].decode() in table for field in SCHEMA)
    assert table.splitlines()[5].startswith("| … |")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xy"), inner),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.sampled_from("abc"), json_values), min_size=1, max_size=6))
def test_any_json_passes_through_whatever_the_chunks(rows: list[dict[str, Any]]) -> None:
    halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    parts = [passthrough.columns_of(half) for half in halves if half]
    schema = passthrough.unified(part.schema for part in parts)
    assert set(schema.types) == {name for row in rows for name in row}
    columns = [passthrough.cast(part, schema) for part in parts]
    for i, name in enumerate(schema.types):
        found = [value for part in columns for value in part[i].to_pylist()]
        given_values = [row.get(name) for row in rows]
        if name in schema.as_json:
            found = [None if value is None else json.loads(value) for value in found]
        assert [without_nulls(v) for v in found] == [without_nulls(v) for v in given_values]


def without_nulls(value: Any) -> Any:
    """A struct's absent key and its null are one thing in Parquet."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if without_nulls(v) is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
