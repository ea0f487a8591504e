"""Input that is broken in every way: never a traceback, never a good row lost."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_inputs import BREAKERS, FIELDS, MAX_ROW_BYTES, Case, corpus
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trbatch import cli
from trbatch.config import MAX_ROW_BYTES as DEFAULT_MAX_ROW_BYTES
from trbatch.config import JobSpec
from trbatch.dataset import collect
from trbatch.errors import InputError
from trbatch.job import JobFolder
from trbatch.parquet_bombs import may_explode
from trbatch.prompts import read_rows

CASES = 2000


def submitted(case: Case, folder: Path) -> JobFolder | InputError:
    path = folder / f"in{case.suffix}"
    path.write_bytes(case.data)
    spec = JobSpec(
        input=str(path),
        out=str(folder / "store"),
        model="org/echo",
        name=f"job-{case.name.partition(':')[0]}",
        chunk_size=3,
        max_row_bytes=MAX_ROW_BYTES,
    )
    try:
        return JobFolder.submit(spec)
    except InputError as error:
        return error


def result(row: Any, sample: int) -> dict[str, Any]:
    return {
        "custom_id": row.custom_id,
        "sample_index": sample,
        "prompt_index": row.prompt_index,
        "text": row.request.get("prompt"),
        "finish_reason": "stop",
        "request_fingerprint": row.fingerprint,
    }


def problem(case: Case, folder: Path, *, through: bool) -> str:
    """What is wrong with how a case is read and, if asked for, decoded and collected; or ""."""
    folder.mkdir()
    job = submitted(case, folder)
    if isinstance(job, InputError):
        if any(part in job.message for part in case.refusals) and case.suffix in job.message:
            return ""
        return f"refused: {job.message}"
    rows = [row for index in range(job.manifest.chunks) for row in job.chunk_rows(index)]
    lost = lost_rows(
        case, {row.custom_id: row.request.get("prompt") for row in rows if not row.error}
    )
    if lost:
        return lost
    if case.rows is not None and len(rows) != case.rows:
        return f"{len(rows)} rows instead of {case.rows}"
    silent = [row for row in rows if row.error and case.suffix not in row.error.message]
    if silent:
        return f"no place named: {silent[0].error}"
    return collected(case, job) if through else ""


def collected(case: Case, job: JobFolder) -> str:
    """What is wrong with the dataset of a case whose every prompt is its own answer; or ""."""
    for index in job.missing_chunks():
        job.publish("w", [result(row, sample) for row, sample in job.missing(index)])
    for form in ("jsonl", "parquet"):
        receipt = collect(job, format=form)
        if not receipt.complete or receipt.rows_in != job.manifest.samples:
            return f"{form}: {receipt}"
    table = pq.read_table(receipt.output)
    return lost_rows(
        case, dict(zip(*(table[name].to_pylist() for name in ("custom_id", "text")), strict=True))
    )


def lost_rows(case: Case, found: dict[str, Any]) -> str:
    lost = {name: text for name, text in case.good.items() if found.get(name) != text}
    return f"lost: {lost}" if lost else ""


def problems(folder: Path, seed: int, numbers: range, *, through: int) -> list[str]:
    """What is wrong with some cases of a corpus; every so many also go through to a dataset."""
    found = []
    for number, case in enumerate(corpus(CASES, seed)):
        if number in numbers:
            wrong = problem(case, folder / str(number), through=number % through == 0)
            found += [f"{case.name}: {wrong}"] if wrong else []
    return found


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in (1, 2, 3))]
)
def test_two_thousand_broken_inputs_lose_no_good_row(tmp_path: Path, part: int) -> None:
    assert problems(tmp_path, 0, range(part, CASES, 4), through=7) == []


@pytest.mark.long
@pytest.mark.torture
def test_two_thousand_others_lose_none_on_their_way_to_a_dataset(tmp_path: Path) -> None:
    assert problems(tmp_path, 1, range(CASES), through=1) == []


def test_the_corpus_is_the_same_every_time_and_has_everything_in_it() -> None:
    first, again = corpus(CASES), corpus(CASES)
    assert first == again
    names = " ".join(case.name for case in first)
    for word in (*BREAKERS, "duplicate id", "Parquet", "(cut)", "(flipped)", "(gz)", "(zst)"):
        assert names.count(word) >= 20, word
    assert sum(len(case.good) for case in first) > CASES
    unrefusable = [case for case in first if case.good and not case.refusals]
    assert len(unrefusable) > 0.4 * CASES, "their good rows must come out"
    assert {r for case in first if case.good for r in case.refusals} == {"have the same id"}


# --- one thing at a time, with what the message must say ---


def write(folder: Path, name: str, *lines: bytes) -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


GOOD = b'{"id": "good", "prompt": "fine"}'


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (b'{"prompt": "%b"}' % (b"x" * DEFAULT_MAX_ROW_BYTES), "row_too_large", "--max-row-bytes"),
        (b'{"prompt": "x", "a": %b1%b}' % (b"[" * 70, b"]" * 70), "too_deeply_nested", "64 levels"),
        (b'{"prompt": "x", "a": %b1%b}' % (b"[" * 2000, b"]" * 2000), "invalid_json", "not valid"),
        (b'{"prompt": "\\ud800"}', "invalid_json", "not valid JSON at character"),
        (b'{"prompt": "a\xff"}', "invalid_json", "not valid JSON"),
        (b'{"prompt": "a\\u0000"}', "invalid_characters", "NUL"),
        (b'{"prompt": "cut', "invalid_json", "one JSON object"),
        (b"\0\0\0", "invalid_json", "not valid JSON"),
    ],
)
def test_a_broken_row_is_named_with_file_line_and_cure_between_good_ones(
    tmp_path: Path, line: bytes, code: str, message: str
) -> None:
    path = write(tmp_path, "in.jsonl", GOOD, line, GOOD.replace(b"good", b"also good"))
    first, bad, last = read_rows(path)
    assert (first.error, last.error, last.id) == (None, None, "also good")
    assert bad.error is not None
    assert bad.error.code == code
    assert bad.error.message.startswith(f"{path}:2: ")
    assert message in bad.error.message


def test_deep_nesting_in_a_text_is_no_nesting(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "[" * 500 + "{" * 500}).encode()
    wide = json.dumps({"prompt": "x", "wide": [[1]] * 200}).encode()
    deep = b'{"prompt": "x", "a": %b1%b}' % (b"[" * 63, b"]" * 63)
    assert [row.error for row in read_rows(write(tmp_path, "in.jsonl", text, wide, deep))] == [
        None, None, None,
    ]  # fmt: skip


def test_a_limit_can_be_raised(tmp_path: Path) -> None:
    path = write(tmp_path, "in.jsonl", b'{"prompt": "%b"}' % (b"x" * 1000))
    assert [row.error is None for row in read_rows(path, max_row_bytes=500)] == [False]
    assert [row.error is None for row in read_rows(path, max_row_bytes=2000)] == [True]


def test_a_row_of_exactly_the_limit_is_taken(tmp_path: Path) -> None:
    line = b'{"prompt": "xyz"}'
    path = write(tmp_path, "in.jsonl", line, line + b" ")
    found = [row.error and row.error.code for row in read_rows(path, max_row_bytes=len(line) + 1)]
    assert found == [None, None]  # the line's own end does not count
    found = [row.error and row.error.code for row in read_rows(path, max_row_bytes=len(line))]
    assert found == [None, "row_too_large"]


def test_a_text_too_long_in_parquet_is_one_bad_row_in_whichever_column(tmp_path: Path) -> None:
    long = "x" * 1001
    table = {"prompt": ["a", long, "c", "d"], "note": ["n", "n", long, None], "id": list("wxyz")}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    rows = list(read_rows(tmp_path / "in.parquet", max_row_bytes=1000))
    assert [row.error and row.error.code for row in rows] == [
        None, "row_too_large", "row_too_large", None,
    ]  # fmt: skip
    assert rows[2].error is not None
    assert "row 3: column 'note' has more than 1,000 bytes" in rows[2].error.message
    assert rows[2].passthrough == {"note": None}


def test_fields_without_end_are_refused_with_file_line_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trbatch.chunk_files.MAX_COLUMNS", 20)
    rows = [json.dumps({"prompt": "x", f"key {i}": i}).encode() for i in range(50)]
    path = write(tmp_path, "in.jsonl", *rows)
    spec = JobSpec(input=str(path), out=str(tmp_path / "store"), model="m", chunk_size=8)
    with pytest.raises(
        InputError, match=r"in\.jsonl: by line 24 .* more than 20 different"
    ) as caught:
        JobFolder.submit(spec)
    assert "into one field" in (caught.value.hint or "")
    assert not list((tmp_path / "store").rglob("*.parquet"))


# --- bombs, in a process whose memory is measured ---


def read_in_a_process(path: Path, megabytes: int) -> dict[str, Any]:
    """What reading a file ends in, in a process that may not use more than so much memory."""
    code = f"""
        import json, re
        from pathlib import Path
        from trbatch.prompts import read_rows
        from trbatch.errors import InputError
        def highest():  # KiB; not ru_maxrss, which exec keeps from the parent
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        before = highest()
        try:
            found = [(row.id, row.error and row.error.code) for row in read_rows({str(path)!r})]
            end = {{"rows": found}}
        except InputError as error:
            end = {{"message": error.message, "hint": error.hint}}
        grown = highest() - before
        print(json.dumps(end | {{"grown_mb": grown / 1024}}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["grown_mb"] < megabytes
    return found


def test_a_line_of_100_mb_costs_no_memory_and_no_good_row(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b"\n" + b'{"prompt": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + GOOD.replace(b"good", b"last"))
    found = read_in_a_process(path, 40)
    assert found["rows"] == [["good", None], ["2", "row_too_large"], ["last", None]]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_refused_with_file_line_and_cure(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb.jsonl{suffix}"
    bomb = GOOD + b"\n" + b"0" * (100 << 20)
    if suffix == ".gz":
        path.write_bytes(gzip.compress(bomb, compresslevel=9, mtime=0))
    else:
        path.write_bytes(pa.compress(bomb, "zstd", asbytes=True))
    del bomb
    found = read_in_a_process(path, 60)
    assert found["message"].startswith(f"{path}:2: the file expands to")
    assert "decompress it first" in found["hint"]


def test_a_bomb_of_empty_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(pa.compress((b" " * 9999 + b"\n") * 8000, "zstd", asbytes=True))
    found = read_in_a_process(path, 60)
    assert "expands to" in found["message"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_rows_that_share_a_long_prompt_are_no_bomb(tmp_path: Path, suffix: str) -> None:
    system = "You are a careful assistant. " * 1000
    rows = "\n".join(json.dumps({"prompt": f"{system}Question {i}."}) for i in range(5000))
    path = tmp_path / f"in.jsonl{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(rows.encode(), mtime=0))
    else:
        path.write_bytes(pa.compress(rows.encode(), "zstd", asbytes=True))
    assert len(rows) > 100 * path.stat().st_size
    assert sum(row.error is None for row in read_rows(path)) == 5000


def test_rows_without_end_out_of_nearly_nothing_are_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.zst"
    row = b'{"prompt": "%b"}\n' % (b"x" * 100_000)
    path.write_bytes(pa.compress(row * 1500, "zstd", asbytes=True))
    with pytest.raises(InputError, match=r"bomb\.jsonl\.zst:\d+: the file expands to .* of rows"):
        list(read_rows(path))


@pytest.mark.parametrize("how", ["one value for all rows", "a value for each row"])
def test_a_parquet_file_of_huge_values_is_read_row_by_row(tmp_path: Path, how: str) -> None:
    path, value, rows = tmp_path / "bomb.parquet", "x" * (16 << 20), 30
    sound = pa.table({"prompt": ["fine"]}).cast(pa.schema([("prompt", pa.large_string())]))
    with pq.ParquetWriter(
        path,
        sound.schema,
        compression="zstd",
        use_dictionary=how == "one value for all rows",
        dictionary_pagesize_limit=1 << 30,
        write_statistics=False,
    ) as writer:
        writer.write_table(sound)
        for _ in range(3):  # 480 MB, if they were read at once
            large = pa.array([value], pa.large_string()).take(pa.array([0] * (rows // 3)))
            writer.write_table(pa.table([large], schema=sound.schema))
        writer.write_table(sound)
    assert path.stat().st_size < 1 << 20
    found = read_in_a_process(path, 350)
    codes = [code for _, code in found["rows"]]
    assert codes == [None, *["row_too_large"] * rows, None]


def test_dictionaries_of_a_usual_size_are_read_by_batches(tmp_path: Path) -> None:
    texts = [f"word {i % 5000} of many that are not all the same" for i in range(200_000)]
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "in.parquet")
    with (tmp_path / "in.parquet").open("rb") as file:
        metadata = pq.ParquetFile(file).metadata
        column = metadata.row_group(0).column(0)
        assert column.has_dictionary_page
        assert not may_explode(metadata, file, 300_000)
        assert may_explode(metadata, file, 1000)


# --- anything at all ---

QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".jsonl.gz", ".json.zst", ".parquet"]))
@QUICK
def test_any_bytes_are_rows_or_an_input_error(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_bytes(data)
    try:
        rows = list(read_rows(path, max_row_bytes=5000))
    except InputError as error:
        refusal = error
    else:
        assert all((row.request is None) == (row.error is not None) for row in rows)
        return
    assert path.name in refusal.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), JSON, max_size=6)


@given(st.lists(ROWS, min_size=1, max_size=5))
@QUICK
def test_any_fields_of_any_type_are_a_row_and_harm_no_other(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path / "any.jsonl"
    lines = [json.dumps(row).encode("utf-8", "surrogatepass") for row in rows]
    path.write_bytes(b"\n".join([GOOD.replace(b"good", b"the good one"), *lines]))
    first, *others = read_rows(path)
    assert (first.id, first.error) == ("the good one", None)
    assert len(others) == len(rows)


@pytest.mark.usefixtures("home")
def test_the_command_line_shows_no_traceback_for_any_of_a_hundred(tmp_path: Path) -> None:
    for number, case in enumerate(corpus(100, seed=7)):
        path = tmp_path / f"{number}{case.suffix}"
        path.write_bytes(case.data)
        result = CliRunner().invoke(cli.commands, ["submit", str(path), "--model", "org/echo"])
        assert result.exit_code in (0, 2), (case.name, result.exception)
        assert "Traceback" not in result.stderr
        assert result.exit_code == 0 or str(path) in result.stderr
