"""What a row of the input may look like, and what becomes of one that may not."""

from __future__ import annotations

import datetime
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trbatch.config import SamplingParams
from trbatch.errors import InputError
from trbatch.ids import RepeatCheck
from trbatch.prompts import Row, read_batches, read_rows


def write_lines(path: Path, *rows: Any) -> Path:
    """Each row as a line of JSON; bytes and texts as they are."""
    with path.open("wb") as file:
        for row in rows:
            text = row if isinstance(row, str | bytes) else json.dumps(row)
            file.write((text if isinstance(text, bytes) else text.encode()) + b"\n")
    return path


def rows_of(tmp_path: Path, *rows: Any, **options: Any) -> list[Row]:
    return list(read_rows(write_lines(tmp_path / "in.jsonl", *rows), **options))


def only_row(tmp_path: Path, row: Any, **options: Any) -> Row:
    (found,) = rows_of(tmp_path, row, **options)
    return found


def test_a_prompt_row_keeps_its_text_and_passes_the_rest_through(tmp_path: Path) -> None:
    row = only_row(tmp_path, {"id": "a", "prompt": " Say hi.\n", "topic": {"x": [1]}, "n_words": 3})
    assert row == Row(0, 1, "a", {"prompt": " Say hi.\n"}, {"topic": {"x": [1]}, "n_words": 3})


def test_messages_are_kept_with_their_extra_keys(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi", "name": "Al"}]
    assert only_row(tmp_path, {"messages": messages}).request == {"messages": messages}


def test_text_parts_of_a_message_become_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    row = only_row(tmp_path, {"messages": [{"role": "user", "content": parts}]})
    assert row.request == {"messages": [{"role": "user", "content": "one\ntwo"}]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"custom_id": "c", "id": "i"}, "c"),
        ({"custom_id": None, "id": 7}, "7"),
        ({"id": "i"}, "i"),
        ({}, "1"),
    ],
)
def test_an_id_is_custom_id_else_id_else_the_row_number(
    tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    assert only_row(tmp_path, fields | {"prompt": "Hi"}).id == expected


def test_the_id_column_can_be_named(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path, {"key": "k", "id": 1, "prompt": "Hi"}, {"prompt": "Hi"}, id_column="key"
    )
    assert (rows[0].id, rows[0].passthrough) == ("k", {"id": 1})
    assert rows[1].error is not None
    assert rows[1].error.code == "invalid_id"


def test_the_prompt_column_can_be_named(tmp_path: Path) -> None:
    row = only_row(tmp_path, {"question": "Why?", "prompt": "kept"}, prompt_column="question")
    assert row.request == {"prompt": "Why?"}
    assert row.passthrough == {"prompt": "kept"}


def test_sampling_fields_stand_beside_the_prompt_or_in_an_object(tmp_path: Path) -> None:
    row = only_row(
        tmp_path,
        {"prompt": "Hi", "max_tokens": 5, "top_p": None, "sampling": {"max_tokens": 6, "seed": 1}},
    )
    assert row.request == {"prompt": "Hi", "sampling": {"max_tokens": 6, "seed": 1}}
    assert row.passthrough == {}


def test_an_openai_batch_line_is_a_row(tmp_path: Path) -> None:
    body = {
        "model": "gpt-x",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "stop": "END",
        "presence_penalty": 0,
        "metadata": {"batch": "b"},
    }
    line = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body}
    row = only_row(tmp_path, line)
    assert row.id == "c"
    assert row.request == {
        "messages": [{"role": "user", "content": "Hi"}],
        "sampling": {"temperature": 0.5, "stop": "END", "presence_penalty": 0, "max_tokens": 9},
    }
    assert row.passthrough == {"metadata": {"batch": "b"}}


def openai_line(body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"custom_id": "c", "url": "/v1/completions", "body": body} | fields


BAD_ROWS = [
    ('{"prompt": "Hi"', "invalid_json"),
    (b'{"prompt": "\xff"}', "invalid_json"),
    ('{"prompt": "\\ud800"}', "invalid_json"),
    ('{"prompt": NaN}', "invalid_json"),
    ("[1, 2]", "not_an_object"),
    ("null", "not_an_object"),
    ({"question_id": 81, "turns": ["Hi", "Ho"]}, "missing_prompt"),
    ({"prompt": None}, "missing_prompt"),
    ({"prompt": "Hi", "messages": []}, "prompt_and_messages"),
    ({"prompt": ""}, "empty_prompt"),
    ({"prompt": " \n\t"}, "empty_prompt"),
    ({"prompt": 5}, "invalid_prompt"),
    ({"prompt": ["Hi"]}, "invalid_prompt"),
    ({"prompt": "a\0b"}, "invalid_characters"),
    ({"messages": []}, "invalid_messages"),
    ({"messages": "Hi"}, "invalid_messages"),
    ({"messages": ["Hi"]}, "invalid_messages"),
    ({"messages": [{"content": "Hi"}]}, "invalid_messages"),
    ({"messages": [{"role": "user"}]}, "invalid_messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "invalid_messages"),
    ({"messages": [{"role": "user", "content": ""}]}, "empty_prompt"),
    ({"messages": [{"role": "user", "content": "a\0"}]}, "invalid_characters"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "unsupported_content",
    ),
    ({"prompt": "Hi", "temperature": -1}, "invalid_sampling"),
    ({"prompt": "Hi", "temperature": "hot"}, "invalid_sampling"),
    ({"prompt": "Hi", "max_tokens": 0}, "invalid_sampling"),
    ({"prompt": "Hi", "max_tokens": True}, "invalid_sampling"),
    ({"prompt": "Hi", "seed": -1}, "invalid_sampling"),
    ({"prompt": "Hi", "seed": 2**63}, "invalid_sampling"),
    ({"prompt": "Hi", "seed": 1.5}, "invalid_sampling"),
    ({"prompt": "Hi", "stop": 5}, "invalid_sampling"),
    ({"prompt": "Hi", "sampling": {"max_tokenz": 5}}, "invalid_sampling"),
    ({"prompt": "Hi", "sampling": "greedy"}, "invalid_sampling"),
    ({"prompt": "Hi", "id": 1.5}, "invalid_id"),
    ({"prompt": "Hi", "id": ""}, "invalid_id"),
    ({"prompt": "Hi", "id": True}, "invalid_id"),
    ({"prompt": "Hi", "id": ["a"]}, "invalid_id"),
    ({"prompt": "Hi", "id": "a\0"}, "invalid_id"),
    (openai_line({"prompt": "Hi"}, url="/v1/embeddings"), "unsupported_url"),
    (openai_line({"prompt": "Hi"}, method="GET"), "unsupported_method"),
    (openai_line({"messages": [{"role": "user", "content": "Hi"}]}), "missing_prompt"),
    (openai_line({}, url=None), "missing_prompt"),
    (openai_line({"prompt": "Hi", "logit_bias": {"the": 1}}), "invalid_sampling"),
    (openai_line({"prompt": "Hi", "top_p": 2}), "invalid_sampling"),
    (openai_line({"prompt": [1, 2, 3]}), "invalid_prompt"),
    ({"custom_id": "c", "body": "Hi"}, "missing_prompt"),
]


@pytest.mark.parametrize(("row", "code"), BAD_ROWS)
def test_a_bad_row_becomes_an_error_row_and_the_rest_goes_on(
    tmp_path: Path, row: Any, code: str
) -> None:
    before, bad, after = rows_of(tmp_path, {"prompt": "one"}, row, {"prompt": "three"})
    assert bad.error is not None
    assert bad.error.code == code
    assert bad.error.message.startswith(f"{tmp_path / 'in.jsonl'}:2: ")
    assert bad.request is None
    assert (before.id, after.id) == ("1", "3")
    assert before.error is after.error is None


def test_a_bad_row_keeps_the_id_and_the_columns_that_can_be_read(tmp_path: Path) -> None:
    row = only_row(tmp_path, {"id": "a", "turns": ["x"]})
    assert (row.id, row.passthrough) == ("a", {"turns": ["x"]})


def test_a_misspelt_sampling_field_is_told_the_right_one(tmp_path: Path) -> None:
    row = only_row(tmp_path, {"prompt": "Hi", "sampling": {"max_tokenz": 5}})
    assert row.error is not None
    assert "did you mean 'max_tokens'" in row.error.message


def test_a_row_is_checked_against_the_job_sampling(tmp_path: Path) -> None:
    row = only_row(tmp_path, {"prompt": "Hi", "n": 2}, sampling=SamplingParams(max_tokens=3))
    assert row.request == {"prompt": "Hi", "sampling": {"n": 2}}


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "", {"prompt": "a"}, "  ", {"prompt": "b"})
    assert [(row.index, row.line, row.id) for row in rows] == [(0, 2, "1"), (1, 4, "2")]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path) -> None:
    assert only_row(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}').request == {"prompt": "a"}


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_compressed_files_read_like_plain_ones(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    data = b"".join(b'{"prompt": "p%d"}\n' % i for i in range(3000))
    if compression == ".gz":  # two members, as concatenated files have
        data = gzip.compress(data[:13]) + gzip.compress(data[13:])
    if compression == ".zst":
        path = tmp_path / "whole"
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
        data = path.read_bytes()
    path = tmp_path / f"in{suffix}{compression}"
    path.write_bytes(data)
    requests = [row.request for row in read_rows(path)]
    assert requests == [{"prompt": f"p{i}"} for i in range(3000)]


@pytest.mark.parametrize("cut", [4, 60])
def test_a_truncated_compressed_file_is_an_input_error(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a long enough text"}\n' * 50)[:-cut])
    with pytest.raises(InputError, match=r"cannot read .*in\.jsonl\.gz"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["in.csv", "in", "in.parquet.gz", "in.jsonl.bz2"])
def test_an_unknown_kind_of_file_is_an_input_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InputError, match="unknown kind") as caught:
        list(read_rows(tmp_path / name))
    assert ".parquet" in str(caught.value.hint)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(read_rows(tmp_path / "in.jsonl"))


def test_a_folder_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").mkdir()
    with pytest.raises(InputError, match="is a folder, not a file"):
        list(read_rows(tmp_path / "in.jsonl"))


def test_a_file_without_rows_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no rows"):
        list(read_rows(write_lines(tmp_path / "in.jsonl", "", " ")))


@pytest.mark.parametrize("text", ['[{"prompt": "a"}]', '[\n{"prompt": "a"}\n]'])
def test_a_json_array_is_an_input_error_with_the_cure(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="one JSON array") as caught:
        list(read_rows(write_lines(tmp_path / "in.json", text)))
    assert "jq" in str(caught.value.hint)


def test_batches_have_the_size_that_was_asked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", *({"prompt": "a"} for _ in range(10)))
    assert [len(batch.rows) for batch in read_batches(path, 4)] == [4, 4, 2]


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_rows_keep_the_types_of_other_columns(tmp_path: Path) -> None:
    day = datetime.date(2026, 8, 2)
    path = write_parquet(
        tmp_path / "in.parquet",
        {
            "id": [7, 8],
            "prompt": ["a", None],
            "messages": [None, [{"role": "user", "content": "b"}]],
            "max_tokens": pa.array([5, None], pa.int64()),
            "day": [day, None],
        },
    )
    one, two = read_rows(path)
    assert one == Row(
        0, 1, "7", {"prompt": "a", "sampling": {"max_tokens": 5}}, {"day": day}, None, True
    )
    assert two.request == {"messages": [{"role": "user", "content": "b"}]}
    batch = next(read_batches(path, 10))
    assert batch.columns is not None
    assert batch.columns.type == pa.struct([("day", pa.date32())])


def test_whole_numbers_that_a_table_made_floats_are_whole_again(tmp_path: Path) -> None:
    nan = float("nan")
    columns = {
        "prompt": ["a", "b", "c", "d"],
        "id": [3.0, None, nan, 2.5],
        "max_tokens": [3.0, nan, None, None],
        "temperature": [nan, 0.5, None, None],
        "sampling": [{"seed": 4.0, "n": None}, {"seed": nan, "n": 2.0}, None, None],
        "score": [1.0, 2.0, 3.0, 4.0],
    }
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path)
    rows = list(read_rows(path))
    assert [row.id for row in rows] == ["3", "2", "3", "4"]
    assert [row.error and row.error.code for row in rows] == [None, None, None, "invalid_id"]
    samplings = [row.request["sampling"] for row in rows[:2] if row.request]
    assert samplings == [{"max_tokens": 3, "seed": 4}, {"temperature": 0.5, "n": 2}]
    assert rows[2].request == {"prompt": "c"}
    assert rows[0].passthrough == {"score": 1.0}


def test_an_id_that_is_a_float_in_json_is_none(tmp_path: Path) -> None:
    row = only_row(tmp_path, {"id": 3.0, "prompt": "a", "max_tokens": 3.0})
    assert row.error is not None
    assert row.error.code == "invalid_id"


def test_a_row_that_asks_for_far_too_much_is_a_bad_row(tmp_path: Path) -> None:
    for name in ("n", "max_tokens", "top_k"):
        row = only_row(tmp_path, {"prompt": "a", name: 3_000_000_000})
        assert row.error is not None
        assert row.error.code == "invalid_sampling"
        assert name in row.error.message


def test_parquet_batches_do_not_follow_row_groups(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "in.parquet", {"prompt": [f"p{i}" for i in range(10)]}, row_group_size=3
    )
    batches = list(read_batches(path, 4))
    assert [len(batch.rows) for batch in batches] == [4, 4, 2]
    prompts = [row.request for batch in batches for row in batch.rows]
    assert prompts == [{"prompt": f"p{i}"} for i in range(10)]


def test_a_struct_key_of_another_row_is_not_part_of_a_parquet_message(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "b", "name": "Al"}],
    ]
    path = write_parquet(tmp_path / "in.parquet", {"messages": messages})
    assert [row.request for row in read_rows(path)] == [{"messages": m} for m in messages]


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", b"fine"]).cast(pa.string(), safe=False)
    path = write_parquet(tmp_path / "in.parquet", {"prompt": texts})
    rows = list(read_rows(path))
    assert [row.error and row.error.code for row in rows] == [None, "invalid_characters", None]
    assert rows[1].error is not None
    assert f"{path}, row 2: " in rows[1].error.message


def test_parquet_without_a_prompt_column_names_the_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "in.parquet", {"question": ["a"], "answer": ["b"]})
    with pytest.raises(InputError, match="neither a column 'prompt'") as caught:
        list(read_rows(path))
    assert "question, answer" in str(caught.value.hint)


def test_a_file_that_is_not_parquet_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="cannot read"):
        list(read_rows(path))


def test_repeated_ids_are_found_among_many() -> None:
    check = RepeatCheck()
    check.add(str(i) for i in range(5000))
    assert check.repeated() == frozenset()
    check.add(["4999", "17", "new"])
    assert check.repeated() == {hash("4999"), hash("17")}


def peak_memory(path: Path) -> int:
    """Most bytes held at a time, Python's and Arrow's, while reading and checking a file."""
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        check = RepeatCheck()
        for batch in read_batches(path, 256):
            check.add(row.id for row in batch.rows)
        assert check.repeated() == frozenset()
        return tracemalloc.get_traced_memory()[1] + (pool.max_memory() or 0)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def test_reading_and_checking_grow_by_at_most_24_bytes_a_row(tmp_path: Path) -> None:
    peaks = []
    for rows in (10_000, 60_000):
        path = tmp_path / f"{rows}.jsonl"
        path.write_bytes(b"".join(b'{"prompt": "some text %d"}\n' % i for i in range(rows)))
        peaks.append(peak_memory(path))
    assert (peaks[1] - peaks[0]) / 50_000 <= 24


def test_a_row_with_a_bad_id_brings_no_columns_that_a_good_one_does_not(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = write_lines(
        tmp_path / "in.jsonl",
        {"id": True, "prompt": "x", "temperature": 0.5, "sampling": {}, "tag": 1},
        {"id": [], "messages": chat, "chat_template_kwargs": {}, "tag": 2},
        {"custom_id": 1.5, "url": "/v1/completions", "method": "POST", "body": {"prompt": "x"}},
    )
    (batch,) = read_batches(str(rows), 8)
    assert [row.error.code for row in batch.rows if row.error] == ["invalid_id"] * 3
    assert [row.passthrough for row in batch.rows] == [{"tag": 1}, {"tag": 2}, {}]
