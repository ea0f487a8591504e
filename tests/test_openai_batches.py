"""OpenAI's batch files: vLLM's bodies in, lines that the package `openai` parses out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from job_tools import decode, write_lines
from openai.types import BatchError, Completion
from openai.types.chat import ChatCompletion

from trbatch import openai_format
from trbatch.config import DEFAULT_MODEL, SAMPLING_FIELDS, JobSpec
from trbatch.errors import UsageError
from trbatch.job import JobFolder
from trbatch.merging import BadRow
from trbatch.openai_results import result_line
from trbatch.prompts import read_rows
from trbatch.results import collect
from trbatch.rows import Row
from trbatch.shaping import Shaping
from trbatch.sinks import check_error_file

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
HELLO = [{"role": "system", "content": "Be helpful."}, {"role": "user", "content": "Hello world!"}]

# As vLLM's documentation has it, with what its protocol adds to OpenAI's.
FOR_VLLM = {
    "model": MODEL,
    "messages": HELLO,
    "max_completion_tokens": 1000,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "n": 2,
    "seed": 11,
    "stop": ["END"],
    "stop_token_ids": [128009],
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "tools": None,
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "stream": False,
    "stream_options": None,
    "user": "u",
    "service_tier": "auto",
    "use_beam_search": False,
    "length_penalty": 1.0,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "add_special_tokens": False,
    "truncate_prompt_tokens": None,
    "bad_words": [],
    "echo": False,
    "priority": 0,
    "request_id": "abc",
    "add_generation_prompt": True,
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": False},
}
NEUTRAL = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")


def chat(body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body,
    } | fields  # fmt: skip


def completion(body: dict[str, Any]) -> dict[str, Any]:
    return chat(body, url="/v1/completions")


def read(tmp_path: Path, line: dict[str, Any], **shaping: Any) -> Row:
    path = write_lines(tmp_path / "in.jsonl", line)
    ignored = frozenset(shaping.pop("ignored", ()))
    (row,) = read_rows(path, shaping=Shaping(ignored=ignored, **shaping))
    return row


def test_a_file_for_vllm_is_read_unchanged(tmp_path: Path) -> None:
    row = read(tmp_path, chat(dict(FOR_VLLM)), model=MODEL)
    assert row.error is None
    assert row.request is not None
    sampling = row.request["sampling"]
    for name in NEUTRAL:
        sampling.pop(name, None)  # fields of ours or not: they change nothing
    assert sampling == {
        "max_tokens": 1000, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "n": 2,
        "seed": 11, "stop": ["END"], "stop_token_ids": [128009], "ignore_eos": True,
        "structured": {},  # any text, whatever the job says
    }  # fmt: skip
    assert row.request["messages"] == HELLO
    assert row.request["chat_template_kwargs"] == {
        "add_generation_prompt": True, "reasoning_effort": "low", "enable_thinking": False,
    }  # fmt: skip


TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"seed": -1, "temperature": 1}, {"temperature": 1}),
        ({"best_of": 1}, {}),
        ({"best_of": 3, "n": 3}, {"n": 3}),
        ({"top_p": 0, "temperature": 0.8, "top_k": 9}, {"temperature": 0.0, "top_k": 9}),
        ({"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False}, {}),
        ({"functions": [{"name": "f"}], "function_call": "none"}, {}),
    ],
)
def test_what_says_nothing_here_is_taken_as_it_is_meant_there(
    tmp_path: Path, fields: dict[str, Any], sampling: dict[str, Any]
) -> None:
    row = read(tmp_path, chat({"messages": HELLO} | fields))
    assert row.error is None
    assert row.request == {"messages": HELLO} | ({"sampling": sampling} if sampling else {})


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"seed": -2}, "invalid_sampling"),
        ({"top_p": False}, "invalid_sampling"),
        ({"top_p": -0.1}, "invalid_sampling"),
        ({"best_of": 3, "n": 2}, "unsupported_field"),
        ({"tools": TOOLS, "tool_choice": "auto"}, "unsupported_field"),
        ({"tools": TOOLS, "function_call": "none"}, "unsupported_field"),
    ],
)
def test_what_says_something_is_not_passed_over(
    tmp_path: Path, fields: dict[str, Any], code: str
) -> None:
    row = read(tmp_path, chat({"messages": HELLO} | fields))
    assert row.error is not None
    assert row.error.code == code


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"tools": [{"type": "function"}]}, "chat_template_kwargs"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"max_token": 5}, "did you mean 'max_tokens'"),
        ({"extra_body": {"top_k": 5}}, "into the body itself"),
        ({"use_beam_search": True}, "not supported"),
        ({"truncate_prompt_tokens": 100}, "not supported"),
        ({"chat_template": "{{ messages }}"}, "the job's model has its own"),
        ({"zzz": 1}, "--ignore-body-field zzz"),
        ({"chat_template_kwargs": {"tokenize": True}}, "may not set tokenize"),
        ({"chat_template_kwargs": [1]}, "must be an object"),
    ],
)
def test_what_would_change_the_text_is_an_error_with_a_cure(
    tmp_path: Path, field: dict[str, Any], words: str
) -> None:
    row = read(tmp_path, chat({"messages": HELLO} | field))
    assert row.error is not None
    assert row.error.code in ("unsupported_field", "invalid_chat_template_kwargs")
    assert words in row.error.message


def test_a_field_can_be_passed_over(tmp_path: Path) -> None:
    body = {"messages": HELLO, "zzz": 1, "tools": [{"type": "function"}], "model": "other"}
    row = read(tmp_path, chat(body), ignored=["zzz", "tools", "model"], model=MODEL)
    assert row.request == {"messages": HELLO}


@pytest.mark.parametrize(
    ("ours", "named", "good"),
    [
        (MODEL, MODEL, True),
        (MODEL, None, True),
        ("/models/Meta-Llama-3-8B-Instruct", MODEL, True),  # the folder it was put into
        ("/models/Meta-Llama-3-8B-Instruct", "meta-llama-3-8b-instruct", True),
        (MODEL, MODEL.lower(), True),
        (MODEL, "meta-llama-3-8b-instruct", True),
        (DEFAULT_MODEL, "SmolLM2-135M-Instruct", True),
        (DEFAULT_MODEL, "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        (DEFAULT_MODEL, "HuggingFaceTB/SmolLM2-360M-Instruct", False),
        (MODEL, "other/Meta-Llama-3-8B-Instruct", False),
        (MODEL, "gpt-4o", False),
        (MODEL, 5, False),
    ],
)
def test_a_line_for_another_model_is_an_error_row(
    tmp_path: Path, ours: str, named: Any, good: bool
) -> None:
    row = read(tmp_path, chat({"messages": HELLO, "model": named}), model=ours)
    assert (row.error is None) is good
    if row.error is not None:
        assert row.error.code == "other_model"
        assert "--ignore-body-field model" in row.error.message


def test_the_models_name_is_checked_when_a_job_is_made(tmp_path: Path) -> None:
    lines = [chat({"model": m, "messages": HELLO}, custom_id=m) for m in ("m", "gpt-4o")]
    spec = {"input": str(write_lines(tmp_path / "in.jsonl", *lines)), "model": "m"}
    strict = JobFolder.submit(JobSpec.from_dict(spec | {"out": str(tmp_path / "a")}))
    assert strict.manifest.errors == {"other_model": 1}
    spec |= {"out": str(tmp_path / "b"), "ignore_body_fields": ["model"]}
    assert JobFolder.submit(JobSpec.from_dict(spec)).manifest.rows_failed == 0


def test_prompts_in_lists(tmp_path: Path) -> None:
    assert read(tmp_path, completion({"prompt": ["Hi"]})).request == {"prompt": "Hi"}
    for prompt, words in ((["a", "b"], "its own line"), ([1, 2], "token ids")):
        row = read(tmp_path, completion({"prompt": prompt}))
        assert row.error is not None
        assert words in row.error.message


def test_results_and_errors_are_what_the_openai_package_reads(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "in.jsonl",
        chat({"messages": HELLO, "n": 2}, custom_id="chat"),
        completion({"prompt": "Once"}) | {"custom_id": "raw"},
        chat({"messages": HELLO}, custom_id="bad", url="/v1/embeddings"),
        {"id": "plain", "prompt": "Twice", "topic": "t"},
    )
    job = JobFolder.submit(JobSpec(input=str(path), out=str(tmp_path / "store"), model="m"))
    decode(job, 0)
    receipt = collect(job, str(tmp_path / "out.jsonl"), "jsonl")
    lines = {
        line["custom_id"]: line
        for line in map(json.loads, Path(receipt.output).read_text().splitlines())
    }
    assert list(lines) == ["chat", "raw", "plain"]
    for line in lines.values():
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
    # `model_validate` checks every field, which the package itself does not do of an answer.
    both = ChatCompletion.model_validate(lines["chat"]["response"]["body"])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].message.content == "answer to chat"
    assert both.usage is not None
    assert both.usage.total_tokens == 3 + 2 * 9
    for name in ("raw", "plain"):
        raw = Completion.model_validate(lines[name]["response"]["body"])
        assert raw.choices[0].text == f"answer to {name}"
        assert raw.choices[0].finish_reason == "stop"
    (failed,) = map(json.loads, Path(receipt.errors_output).read_text().splitlines())
    assert failed["response"] is None
    error = BatchError.model_validate(failed["error"])
    assert (failed["custom_id"], error.code, error.line) == ("bad", "unsupported_url", 3)


def test_log_probabilities_take_the_forms_of_their_urls() -> None:
    top = [{"token": " yes", "token_id": 7, "logprob": -0.1}]
    tokens = [
        {"token": " yes", "token_id": 7, "logprob": -0.1, "rank": 1, "top": top},
        {"token": "!", "token_id": 8, "logprob": -1.5, "rank": 2, "top": []},
    ]
    row = {
        "custom_id": "a", "sample_index": 0, "text": " yes!", "finish_reason": "length",
        "request_fingerprint": "f", "model": "m", "prompt_tokens": 1, "completion_tokens": 2,
        "logprobs": tokens, "reasoning": "hm",
    }  # fmt: skip
    line, other = (result_line([row], {}, 5, is_chat=is_chat) for is_chat in (True, False))
    assert line is not None and other is not None
    of_chat = line["response"]["body"]
    chosen = ChatCompletion.model_validate(of_chat).choices[0]
    assert chosen.logprobs is not None and chosen.logprobs.content is not None
    assert [one.token for one in chosen.logprobs.content] == [" yes", "!"]
    assert chosen.logprobs.content[0].top_logprobs[0].bytes == list(b" yes")
    assert chosen.message.model_extra == {"reasoning": "hm"}
    logprobs = Completion.model_validate(other["response"]["body"]).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, 4]
    assert logprobs.top_logprobs == [{" yes": -0.1}, {}]


@pytest.mark.parametrize(
    ("line", "sampling"),
    [
        (chat({"messages": HELLO, "logprobs": True, "top_logprobs": 3}), {"logprobs": 3}),
        (chat({"messages": HELLO, "logprobs": True}), {"logprobs": 0}),
        (chat({"messages": HELLO, "logprobs": False, "top_logprobs": 0}), {}),
        (completion({"prompt": "Hi", "logprobs": 2}), {"logprobs": 2}),
        (completion({"prompt": "Hi", "logprobs": None}), {}),
    ],
)
def test_log_probabilities_are_asked_for_as_their_urls_do(
    line: dict[str, Any], sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_format, "SAMPLING_FIELDS", SAMPLING_FIELDS | {"logprobs"})
    fields = json.loads(json.dumps(line))
    assert openai_format.take_body(fields, Shaping()).sampling == sampling
    fields = chat({"messages": HELLO, "top_logprobs": 3})
    with pytest.raises(BadRow, match=r"needs body\.logprobs"):
        openai_format.take_body(fields, Shaping())


def one_row(tmp_path: Path, name: str, row: dict[str, Any]) -> JobFolder:
    """A job whose one row is done."""
    path = write_lines(tmp_path / f"{name}.jsonl", row)
    job = JobFolder.submit(JobSpec(input=str(path), out=str(tmp_path / "store"), model="m"))
    if row["prompt"]:  # without, it is a bad row, which needs no worker
        decode(job, 0)
    return job


def test_the_error_file_comes_and_goes_with_failed_rows(tmp_path: Path) -> None:
    left, output = tmp_path / "out.errors.jsonl", str(tmp_path / "out.jsonl")
    bad = one_row(tmp_path, "bad", {"id": "a", "prompt": ""})
    for _ in range(2):  # the second time over its own
        assert collect(bad, output, "jsonl").errors_output == str(left)
    assert left.exists()
    receipt = collect(one_row(tmp_path, "good", {"id": "a", "prompt": "x"}), output, "jsonl")
    assert receipt.errors_output == ""
    assert not left.exists()


@pytest.mark.parametrize("is_bad", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "notes\n",
        "",
        '{"id": "batch_req_1", "custom_id": "a", "response": null, "error": {"code": "x"}}\n',
        '{"custom_id": "a", "error": {}, "trbatch": {}}\nand a line of mine\n',
    ],
)
def test_an_error_file_that_trbatch_has_not_written_is_neither_replaced_nor_removed(
    tmp_path: Path, text: str, *, is_bad: bool
) -> None:
    own = tmp_path / "out.errors.jsonl"
    own.write_text(text)
    job = one_row(tmp_path, "in", {"id": "a", "prompt": "" if is_bad else "x"})
    with pytest.raises(UsageError, match=r"out\.errors\.jsonl was not written by trbatch"):
        collect(job, str(tmp_path / "out.jsonl"), "jsonl")
    assert own.read_text() == text
    assert not (tmp_path / "out.jsonl").exists(), "it is told before anything is written"
    assert collect(job, str(tmp_path / "out.parquet")).complete
    with pytest.raises(UsageError, match=r"was not written by trbatch"):
        check_error_file(str(tmp_path / "out.jsonl"), "jsonl")  # as `run` asks, before it decodes
