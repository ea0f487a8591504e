"""Settings of sampling from a command, a job or a row to the result's columns, wrong ones too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from job_tools import all_rows, changed, prompts, write_lines
from job_tools import result as result_of

from trbatch import api, cli
from trbatch.chunks import RowHasher
from trbatch.config import SAMPLING_FIELDS, JobSpec, SamplingParams
from trbatch.engine.sequence import Alternative, Completion, TokenLogprob
from trbatch.errors import ResumeRefused, UsageError
from trbatch.job import JobFolder
from trbatch.manifest import settings
from trbatch.naming import default_job_id
from trbatch.prompts import read_rows
from trbatch.results import SCHEMA, collect, result_row
from trbatch.rows import Row

GIVEN = (
    "--n 3 --temperature 0.8 --repetition-penalty 1.2 --presence-penalty 0.5 "
    "--frequency-penalty -0.5 --logit-bias 5=-100 --logit-bias 007=2.5 --min-tokens 4 "
    "--logprobs 0 --prompt-logprobs 2 --return-token-ids --reasoning-start [T] --reasoning-end [/T]"
).split()
WANTED = SamplingParams(
    n=3, temperature=0.8, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.5,
    logit_bias={"5": -100.0, "7": 2.5}, min_tokens=4, logprobs=0, prompt_logprobs=2,
    return_token_ids=True, reasoning_start="[T]", reasoning_end="[/T]",
)  # fmt: skip


def test_each_setting_has_its_option(home: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", *prompts(1))
    store = tmp_path / "store"
    arguments = ["submit", str(tmp_path / "in.jsonl"), "--store", str(store), *GIVEN]
    done = CliRunner().invoke(cli.commands, arguments)
    assert done.exit_code == 0, done.stderr
    job = JobFolder.find(done.stdout.strip(), str(store))
    assert job.spec.sampling == WANTED
    assert job.request(all_rows(job)[0], 0).sampling == WANTED
    shown = CliRunner().invoke(cli.commands, ["run", "-h"]).stdout
    missing = {f"--{name.replace('_', '-').removesuffix('s')}" for name in SAMPLING_FIELDS}
    missing -= {"--structured"}  # has options of its own: see `test_structured`
    assert {option for option in missing if option not in shown} == set()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--logit-bias", "5"], "'5' is not TOKEN_ID=NUMBER"),
        (["--logit-bias", "the=2"], "--logit-bias has 'the', which is no token id"),
        (
            ["--logit-bias", "5=101"],
            "--logit-bias of token 5 must be at least -100",
        ),
        (["--min-tokens", "9", "--max-tokens", "8"], "--min-tokens must be at most max_tokens"),
        (["--logprobs", "101"], "logprobs must be between 0 and 100"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be at least 0.01"),
        (["--presence-penalty", "2.5"], "--presence-penalty must be at least -2 and at most 2"),
        (["--reasoning-start", ""], "--reasoning-start must not be empty"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_made(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    write_lines(tmp_path / "in.jsonl", *prompts(1))
    store = tmp_path / "store"
    command = ["submit", str(tmp_path / "in.jsonl"), "--store", str(store), *arguments]
    done = CliRunner().invoke(cli.commands, command)
    assert (done.exit_code, says in done.stderr) == (2, True), done.stderr
    assert not store.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0),
        ("repetition_penalty", "high"),
        ("presence_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", 5),
        ("logit_bias", "5"),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"5": "much"}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {2**31: 1}),
        ("logit_bias", {"5" * 5000: 1}),
        ("logit_bias", {"5": 1e300}),
        ("logit_bias", [[5]]),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", 1.5),
        ("return_token_ids", 1),
        ("reasoning_end", None),
    ],
)
def test_a_wrong_value_makes_its_row_an_error_row(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams.from_dict({name: value})
    if value is None or value != value:
        return  # such a row has no value of its own
    path = write_lines(
        tmp_path / "in.jsonl", json.dumps({"prompt": "Hi", name: value}), *prompts(1)
    )
    bad, good = read_rows(path)
    assert bad.error is not None and bad.error.code == "invalid_sampling"
    assert bad.error.message.startswith(f"{path}:1: ") and name in bad.error.message
    assert good.error is None


@pytest.mark.parametrize(
    "bias",
    [{5: 1, 7.0: -2.0}, {"5": 1.0, "07": -2}, [[5, 1], [7, -2]], {"5": 1, "7": -2, "9": None}],
)
def test_a_bias_has_one_spelling(bias: Any) -> None:
    params = SamplingParams(logit_bias=bias)
    assert params.logit_bias == {"5": 1.0, "7": -2.0}
    assert hash(params) == hash(SamplingParams(logit_bias={7: -2, 5: 1}))
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params


def test_a_row_of_a_table_may_carry_them(tmp_path: Path) -> None:
    """A struct of all rows' tokens, or a map; whole numbers as the floats of a table."""
    biases = [{"5": 1.0, "7": None}, None, {"5": None, "7": -2.0}]
    columns = {
        "prompt": ["a", "b", "c"],
        "logit_bias": biases,
        "min_tokens": [2.0, None, 3.0],
        "logprobs": [None, 0.0, None],
    }
    pq.write_table(pa.table(columns), tmp_path / "struct.parquet")
    pairs = [None if bias is None else [(k, v) for k, v in bias.items() if v] for bias in biases]
    columns["logit_bias"] = pa.array(pairs, pa.map_(pa.string(), pa.float64()))
    pq.write_table(pa.table(columns), tmp_path / "map.parquet")
    for name in ("struct", "map"):
        rows = list(read_rows(tmp_path / f"{name}.parquet"))
        assert [row.error for row in rows] == [None] * 3
        own = [SamplingParams().merged((row.request or {}).get("sampling", {})) for row in rows]
        assert [one.logit_bias for one in own] == [{"5": 1.0}, {}, {"7": -2.0}]
        assert [one.min_tokens for one in own] == [2, 0, 3]
        assert [one.logprobs for one in own] == [None, 0, None]


def test_a_setting_that_decides_the_row_is_in_its_fingerprint() -> None:
    def fingerprint(**own: Any) -> str:
        row = Row(0, 1, "a", {"prompt": "Hi"} | ({"sampling": own} if own else {}), {})
        return RowHasher("m", "", SamplingParams(), 7).identify(row)[1]

    values: dict[str, Any] = {
        name: value for name, value in WANTED.to_dict().items() if name not in ("n", "temperature")
        and value != SamplingParams().to_dict()[name]
    }  # fmt: skip
    found = {name: fingerprint(**{name: value}) for name, value in values.items()}
    assert len(values) == 10
    assert len({*found.values(), fingerprint()}) == 11
    assert fingerprint(n=3) == fingerprint()
    assert fingerprint(logit_bias={"7": 1, "5": 2}) == fingerprint(logit_bias={"05": 2.0, "7": 1.0})


def test_what_was_named_before_there_were_so_many_settings_keeps_its_name() -> None:
    row = Row(0, 1, "a", {"prompt": "Hi", "sampling": {"top_k": 5}}, {})
    hasher = RowHasher("m", "", SamplingParams(max_tokens=9, stop=("END",)), 7)
    assert hasher.identify(row)[1] == "9319743654624a545697858bdda34940"
    spec = JobSpec(input="/in.jsonl", sampling=SamplingParams(max_tokens=9))
    decisive = settings(spec, "m") | {"sampling": spec.sampling.identity()}
    assert default_job_id("/in.jsonl", decisive) == "in-7da3ae91"


def test_a_job_is_not_continued_with_another_bias(spec: JobSpec) -> None:
    named = changed(spec, name="night")
    JobFolder.submit(named)
    with pytest.raises(ResumeRefused, match=r"logit_bias was {}, now {'5': -1\.0}"):
        JobFolder.submit(changed(named, sampling=SamplingParams(logit_bias={5: -1})))
    assert JobFolder.submit(named).continued


def test_samples_without_a_temperature_are_warned_of(home: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", *prompts(1))
    command = ["submit", str(tmp_path / "in.jsonl"), "--store", str(tmp_path / "store"), "--n", "2"]
    said = CliRunner().invoke(cli.commands, command).stderr
    assert "--n 2 without --temperature gives each row 2 equal samples" in said
    assert "--n" not in CliRunner().invoke(cli.commands, [*command, "--temperature", "1"]).stderr


def test_settings_stand_beside_those_of_the_job_in_python() -> None:
    spec = api.job_spec("in.jsonl", {"min_tokens": 3, "logit_bias": {9: 1}, "logprobs": 1})
    assert spec.sampling == SamplingParams(min_tokens=3, logit_bias={"9": 1.0}, logprobs=1)


def test_what_was_asked_for_goes_from_a_completion_to_the_dataset(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    said = TokenLogprob(
        "Hi",
        7,
        -0.5,
        2,
        [Alternative("He", 6, -0.25), Alternative("Hi", 7, -0.5, b"\xf0")],
        b"\xf0",
    )
    told = Completion(
        key=0, finish_reason="stop", text="Hi", reasoning="thought", token_ids=[7, 7],
        prompt_token_ids=[1, 2], logprobs=[said, said], prompt_logprobs=[None, said],
    )  # fmt: skip
    silent = Completion(key=0, finish_reason="stop", token_ids=[7] * 60)
    failed = Completion(key=0, finish_reason="error", error_code="e", error_message="e")
    rows = all_rows(job)
    made = [
        result_row(done, row, model="m", task="t", worker="w", attempts=1)
        for row, done in zip(rows, [told, silent, *[failed] * 8], strict=True)
    ]
    job.publish("w", made)
    receipt = collect(job)
    assert receipt.stats["figures"]["rows_repetitive"] == job.progress().rows_repetitive == 1
    first, second, *others = pq.read_table(receipt.output).to_pylist()
    alternatives = [
        {"token": "He", "token_id": 6, "logprob": -0.25, "bytes": None},
        {"token": "Hi", "token_id": 7, "logprob": -0.5, "bytes": b"\xf0"},
    ]
    entry = alternatives[1] | {"rank": 2, "top": alternatives}
    assert (first["text"], first["reasoning"], first["repetitive"]) == ("Hi", "thought", False)
    assert (first["prompt_token_ids"], first["token_ids"]) == ([1, 2], [7, 7])
    assert (first["logprobs"], first["prompt_logprobs"]) == ([entry, entry], [None, entry])
    assert first["cumulative_logprob"] == -1.0
    asked = ("prompt_token_ids", "token_ids", "logprobs", "prompt_logprobs", "cumulative_logprob")
    assert [second[name] for name in asked] == [None] * 5
    assert second["repetitive"] is True
    assert {row["repetitive"] for row in others} == {None}


def test_segments_from_before_a_column_came_are_collected(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    job.publish("w", [result_of(job, row) for row in all_rows(job)])
    (name,) = job.ledger.names()
    file = Path(job.path) / "segments" / name
    pq.write_table(pq.read_table(file).drop_columns(["repetitive", "logprobs"]), file)
    table = pq.read_table(collect(JobFolder.open(job.path)).output)
    assert set(SCHEMA.names) <= set(table.column_names)
    assert table["repetitive"].null_count == len(table) == 10
    assert table["completion_tokens"].to_pylist() == [9] * 10


def test_log_probabilities_from_before_they_had_bytes_are_collected(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    told = [{"token": "a", "token_id": 1, "logprob": -1.0, "rank": 1, "bytes": b"a", "top": []}]
    job.publish("w", [result_of(job, row, logprobs=told) for row in all_rows(job)])
    (name,) = job.ledger.names()
    file = Path(job.path) / "segments" / name
    table = pq.read_table(file)
    old = pa.list_(
        pa.struct([field for field in table.schema.field("logprobs").type.value_type
                   if field.name in ("token", "token_id", "logprob", "rank")])
    )  # fmt: skip
    without = [[{k: one[k] for k in one if k != "bytes"} for one in told]] * len(table)
    place = table.column_names.index("logprobs")
    pq.write_table(table.set_column(place, "logprobs", pa.array(without, old)), file)
    rows = pq.read_table(collect(JobFolder.open(job.path)).output)["logprobs"].to_pylist()
    assert rows[0] == [told[0] | {"bytes": None, "top": None}]


def test_the_guide_names_every_setting_and_what_it_is_by_default() -> None:
    text = (Path(__file__).parent.parent / "docs" / "sampling.md").read_text()
    table = text.partition("\n## ")[0].splitlines()
    rows = [line.split("|")[1:3] for line in table if line.startswith("| `")]
    told = {}
    for names, defaults in rows:
        values = [value.strip(" `") for value in defaults.split(",")]
        told |= dict(zip((name.strip(" `") for name in names.split(",")), values, strict=True))
    settings = SamplingParams().to_dict()
    assert set(settings) <= set(told)
    for name, value in settings.items():
        if isinstance(value, bool | int | float | str):
            assert told[name] == (f"{value:g}" if isinstance(value, float) else str(value).lower())
