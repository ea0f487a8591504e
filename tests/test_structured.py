"""What a text has to be, in everybody's spelling: one form, checked before anything is decoded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner
from job_tools import write_lines
from schemas import SCHEMAS

from trbatch import chunks, structured
from trbatch.cli import commands
from trbatch.config import JobSpec, SamplingParams
from trbatch.errors import MissingExtra, UsageError
from trbatch.job import JobFolder
from trbatch.merging import SamplingMerger
from trbatch.rows import Row, RowChecker

PERSON = SCHEMAS["a person"]


def checked(fields: dict[str, Any], **sampling: Any) -> Row:
    checker = RowChecker(lambda line: f"in.jsonl:{line}", sampling=SamplingParams(**sampling))
    return checker.row(fields, 0, 7)


def asked(fields: dict[str, Any], **sampling: Any) -> Any:
    """The form that a row ends in, over the job's."""
    base = SamplingParams(**sampling)
    row = checked(fields, **sampling)
    assert row.error is None, row.error
    return base.merged((row.request or {}).get("sampling", {})).structured


def body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Invent one."}]
    return {"url": "/v1/chat/completions", "body": {"messages": messages, **fields}}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_schema_of_the_tests_can_be_kept_to(schema: dict[str, Any]) -> None:
    form = structured.normalised({"json": schema})
    assert form == {"json": orjson.dumps(schema).decode()}
    structured.check(form)
    assert structured.normalised(form) == form


def test_one_form_of_many_spellings() -> None:
    text = orjson.dumps(PERSON).decode()
    for spelling in (
        {"json": PERSON}, {"json": text}, orjson.dumps({"json": PERSON}).decode(),
        {"json": PERSON, "regex": None, "choice": None},  # as a Parquet struct has it
    ):  # fmt: skip
        assert structured.normalised(spelling) == {"json": text}
    assert structured.normalised({"json": True}) == {"json": "{}"}
    assert structured.normalised({"choice": ("a", "b", "a")}) == {"choice": ["a", "b"]}
    assert structured.normalised({}) is structured.normalised(None) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1], "must be an object"),
        ("{", "no JSON"),
        ({"xml": "a"}, "takes one of json, regex, choice"),
        ({"json": {}, "regex": "a"}, "takes one of"),
        ({"json": 3}, "must be a JSON schema"),
        ({"json": "nonsense"}, "no JSON"),
        ({"regex": ""}, "must be a text"),
        ({"regex": "a" * (1 << 19)}, "at most"),
        ({"choice": []}, "list of texts"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": [f"{i}" for i in range(10_001)]}, "at most 10000"),
    ],
)
def test_what_is_no_form_at_all_is_refused(value: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        structured.normalised(value)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"json": {"type": "objekt"}}, "structured.json: Invalid type: objekt"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        (
            {"json": {"type": "string", "maxlength": 3}},
            "'maxlength' is no keyword of JSON schemas; did you mean 'maxLength'?",
        ),
        ({"json": {"type": "object", "propertys": {}}}, "did you mean 'properties'?"),
        ({"json": {"prompt": "hello"}}, "'prompt' is no keyword"),
        ({"json": {"name": "x", "schema": {}}}, "'name' is no keyword"),
        ({"json": {"nullable": True}}, '{"type": ["string", "null"]}'),
        (
            {"json": {"properties": {"a": {"items": {"minimun": 1}}}}},
            "'minimun' in #/properties/a/items is no keyword",
        ),
        ({"json": {"anyOf": [{"type": "null"}, {"maximun": 1}]}}, "'maximun' in #/anyOf/1"),
        ({"json": {"patternProperties": {"^a": {"typ": "null"}}}}, "did you mean 'type'"),
        ({"json": {"$ref": "#/parts/a", "parts": {"a": {"typ": "null"}}}}, "'typ' in #/parts/a"),
        ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
        ({"json": {"$ref": "http://example.com/schema"}}, "does not fetch"),
        ({"json": {"minimum": 5, "maximum": 3, "type": "integer"}}, "Unsatisfiable"),
        ({"regex": "(a"}, "structured.regex: unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": r"\bno\b"}, "lookarounds not supported"),
    ],
)
def test_what_no_grammar_can_be_made_of_is_told_in_short(form: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        structured.check(structured.normalised(form) or {})
    assert said in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 350


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "a", "description": "b", "default": 1, "examples": [{"typ": 1}], "$id": "x:y",
         "$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": "c",
         "deprecated": True, "readOnly": False, "writeOnly": False, "x-order": 1},
        {"properties": {"typ": {"type": "null"}, "uniqueItems": {"const": False}}},
        {"enum": [{"typ": 1}], "$defs": {"typ": {"type": "null"}}},
        {"$ref": "#/parts/a", "parts": {"a": {"type": "null"}}},
        {"type": "array", "uniqueItems": False, "items": {"type": "array", "uniqueItems": False}},
        {"type": "string", "format": "date"},
    ],
)  # fmt: skip
def test_words_that_change_nothing_may_be_there(schema: dict[str, Any]) -> None:
    structured.check(structured.normalised({"json": schema}) or {})


def test_a_schema_as_deep_as_any_row_is_an_error_and_nothing_worse() -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(UsageError, match="recursion limit"):
        structured.check(structured.normalised({"json": deep}) or {})


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "json_object"}}, {"json": '{"type":"object"}'}),
        (
            {"response_format": {
                "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}},
            }},
            {"json": '{"type":"null"}'},
        ),
        ({"guided_json": {"type": "null"}}, {"json": '{"type":"null"}'}),
        ({"guided_regex": "a+", "guided_decoding_backend": "x"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"choice": ["a"], "json": None}}, {"choice": ["a"]}),
        ({"structured_outputs": {"json_object": True}}, {"json": '{"type":"object"}'}),
        ({"structured": {"regex": "b"}}, {"regex": "b"}),
        ({"response_format": {"type": "text"}, "guided_regex": "c"}, {"regex": "c"}),
    ],
)  # fmt: skip
def test_bodies_spell_it_as_openai_and_vllm_do(fields: Any, form: Any) -> None:
    assert asked(body(**fields)) == form


def test_a_row_wins_over_the_job_and_may_be_free_of_its_form() -> None:
    job = {"structured": {"regex": "[0-9]+"}}
    assert asked({"prompt": "a"}, **job) == {"regex": "[0-9]+"}
    assert asked({"prompt": "a", "structured": {"choice": ["x"]}}, **job) == {"choice": ["x"]}
    assert asked({"prompt": "a", "sampling": {"structured": {}}}, **job) is None
    assert asked(body(response_format={"type": "text"}), **job) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "a", "structured": {"json": {"not": {}}}}, 'Unimplemented keys: ["not"]'),
        ({"prompt": "a", "structured": {"regex": "("}}, "unclosed group"),
        ({"prompt": "a", "structured": {"regex": "b"}, "ignore_eos": True}, "ignore_eos"),
        (body(response_format={"type": "yaml"}), "json_object or json_schema"),
        (body(response_format={"type": "json_schema"}), "no 'schema'"),
        (body(structured_outputs={"grammar": "x"}), "grammar is not supported"),
        (body(guided_regex="a", guided_choice=["b"]), "contradict each other"),
        (body(guided_json="["), "no JSON"),
    ],
)
def test_a_bad_one_is_the_row_s_own_error(fields: dict[str, Any], said: str) -> None:
    row = checked(fields)
    assert row.error is not None and row.request is None
    assert row.error.code == "invalid_sampling"
    assert row.error.message.startswith("in.jsonl:7: ") and said in row.error.message


def test_it_is_part_of_the_fingerprint_and_so_is_the_order_of_properties() -> None:
    def mark(form: Any) -> str:
        hasher = chunks.RowHasher("m", "", SamplingParams(), 1)
        row = checked({"prompt": "a", "structured": form} if form else {"prompt": "a"})
        return hasher.identify(row)[1]

    ab, ba = (
        {"json": {"properties": {n: {"type": "null"} for n in names}}} for names in ("ab", "ba")
    )
    marks = [mark(form) for form in (None, ab, ba, {"regex": "a"}, {"choice": ["a"]})]
    assert len(set(marks)) == len(marks)
    assert mark(ab) == marks[1]
    merger = SamplingMerger(SamplingParams())
    assert merger.merge({"structured": ab})[1] != merger.merge({"structured": ba})[1]


def test_a_missing_library_is_no_row_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trbatch.structured.importlib.util.find_spec", lambda name: None)
    structured._check.cache_clear()
    with pytest.raises(MissingExtra) as caught:
        checked({"prompt": "a", "structured": {"regex": "a"}})
    assert caught.value.hint == "pip install 'trbatch[structured]'"
    assert caught.value.exit_code == 2
    assert checked({"prompt": "a"}).error is None, "rows without it need no library"


def test_checking_imports_no_torch() -> None:
    code = (
        "import sys; from trbatch import structured; "
        "structured.check({'json': '{}'}); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json-schema", "FILE"], "person.json: Unimplemented keys"),
        (["--json-schema", "/nowhere/x.json"], "/nowhere/x.json cannot be read"),
        (["--regex", "(a"], "--regex: unclosed group"),
        (["--regex", ""], "--regex is empty"),
        (["--json-schema", ""], "--json-schema is empty"),
        (["--choice", ""], "none of them empty"),
        (["--regex", "", "--choice", "b"], "--regex and --choice contradict each other"),
        (["--regex", "a", "--choice", "b"], "--regex and --choice contradict each other"),
    ],
)
def test_a_bad_option_is_told_before_there_is_a_job(
    home: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    schema = tmp_path / "person.json"
    schema.write_text('{"uniqueItems": true}', encoding="utf-8")
    file = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    given = [str(schema) if one == "FILE" else one for one in arguments]
    store = tmp_path / "store"
    done = CliRunner().invoke(commands, ["submit", str(file), "--store", str(store), *given])
    assert done.exit_code == 2, done.output
    assert said in done.output.replace("\n", " ")
    assert not store.exists(), "nothing was made"


def test_a_job_keeps_what_its_options_asked_for(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b", "structured": {"json": {"if": 1}}}
    )
    spec = JobSpec(
        input=str(file), out=str(tmp_path / "store"), model="m",
        sampling=SamplingParams(structured={"choice": ["yes", "no"]}),
    )  # fmt: skip
    folder = JobFolder.open(JobFolder.submit(spec).path)
    assert folder.manifest.spec.sampling.structured == {"choice": ["yes", "no"]}
    with _chunk(folder) as chunk:
        good, bad = chunks.read_rows(chunk)
    assert good.sampling(spec.sampling).structured == {"choice": ["yes", "no"]}
    assert bad.error is not None and bad.error.message.startswith(f"{file}:2: structured.json")


def _chunk(folder: JobFolder) -> Any:
    return next(Path(folder.path).glob("chunks/*/00000.parquet")).open("rb")
