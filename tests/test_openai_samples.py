"""OpenAI's lines of what is not one good ASCII text: parts of characters, and samples that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from job_tools import result, write_lines
from openai.types import BatchError, Completion
from openai.types.chat import ChatCompletion
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trbatch.config import JobSpec
from trbatch.engine.sequence import Likelihood
from trbatch.engine.spelling import spelled
from trbatch.job import JobFolder
from trbatch.openai_results import error_lines, result_line
from trbatch.results import SCHEMA, collect

TEXT = "é 😀!"


def byte_level() -> PreTrainedTokenizerFast:
    """A token for each byte, in the letters that GPT-2 gave them."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def byte_fallback() -> PreTrainedTokenizerFast:
    """A token for each letter, and one for each byte of what has none, as Llama 2 has it."""
    words = ["<unk>", "é", "!", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def told(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """What the result row of TEXT has in `logprobs`: at each token the two parts of a 😀, too."""
    ids = tokenizer(TEXT)["input_ids"]
    smile = tokenizer("😀")["input_ids"]
    top = [(smile[1], -0.5), (smile[2], -1.5)]
    return [
        {
            "token": one.token, "token_id": one.token_id, "logprob": one.logprob, "rank": one.rank,
            "bytes": one.raw, "top": [
                {"token": o.token, "token_id": o.token_id, "logprob": o.logprob, "bytes": o.raw}
                for o in one.top
            ],
        }
        for one in spelled(tokenizer, [Likelihood(token, -1.0, 3, top) for token in ids])
    ]  # fmt: skip


def row(**fields: Any) -> dict[str, Any]:
    return dict.fromkeys(SCHEMA.names) | {
        "custom_id": "a", "sample_index": 0, "text": TEXT, "finish_reason": "length",
        "request_fingerprint": "f", "model": "m", "prompt_tokens": 1, "completion_tokens": 2,
    } | fields  # fmt: skip


def body(samples: list[dict[str, Any]], *, is_chat: bool) -> dict[str, Any]:
    line = result_line(samples, {}, 5, is_chat=is_chat)
    assert line is not None
    found: dict[str, Any] = json.loads(json.dumps(line))["response"]["body"]
    return found


both_kinds = pytest.mark.parametrize(
    "tokenizer", [byte_level(), byte_fallback()], ids=["bpe", "sp"]
)


@both_kinds
def test_the_bytes_of_a_chats_tokens_are_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = body([row(logprobs=told(tokenizer))], is_chat=True)
    choice = ChatCompletion.model_validate(asked).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert b"".join(bytes(one.bytes or []) for one in content).decode() == TEXT
    parts = [bytes(top.bytes or []) for top in content[0].top_logprobs]
    assert parts == ["😀".encode()[1:2], "😀".encode()[2:3]]


@both_kinds
def test_a_completions_tokens_have_names_and_places(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = body([row(logprobs=told(tokenizer))], is_chat=False)
    found = Completion.model_validate(asked).choices[0].logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert found.tokens[-5:] == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80", "!"]
    assert found.text_offset[-5:] == [2, 2, 2, 2, 3]
    assert TEXT[found.text_offset[-1]] == "!"
    assert found.top_logprobs is not None
    assert found.top_logprobs[0] == {r"bytes:\x9f": -0.5, r"bytes:\x98": -1.5}


def test_of_alternatives_that_are_spelt_alike_the_likeliest_counts() -> None:
    top = [{"token": "a", "token_id": i, "logprob": -float(i), "bytes": None} for i in (1, 2)]
    token = {"token": "a", "token_id": 1, "logprob": -1.0, "rank": 1, "bytes": None, "top": top}
    found = body([row(logprobs=[token])], is_chat=False)["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{"a": -1.0}]
    chat = body([row(logprobs=[token])], is_chat=True)["choices"][0]["logprobs"]
    assert [one["logprob"] for one in chat["content"][0]["top_logprobs"]] == [-1.0, -2.0]


def test_the_prompts_bytes_are_numbers_beside_the_figures() -> None:
    line = result_line([row(prompt_logprobs=[None, *told(byte_level())])], {}, 5, is_chat=True)
    assert line is not None
    figures = json.loads(json.dumps(line))["trbatch"]["samples"][0]["prompt_logprobs"]
    assert figures[0] is None and figures[-2]["bytes"] == [0x80] and "bytes" not in figures[-1]


def test_a_row_of_good_and_bad_samples_has_a_line_for_each_reason() -> None:
    samples = [
        row(sample_index=0, seed=7),
        row(sample_index=1, text=None, finish_reason="error", error_code="x", error_message="no"),
        row(sample_index=2, seed=8),
        row(sample_index=3, text=None, finish_reason="cancelled"),
    ]
    line = result_line(samples, {"topic": "t"}, 5, is_chat=True)
    assert line is not None and line["error"] is None
    choices = ChatCompletion.model_validate(line["response"]["body"]).choices
    assert [choice.index for choice in choices] == [0, 2]
    assert [one["sample_index"] for one in line["trbatch"]["samples"]] == [0, 2]
    first, second = failed = error_lines(samples, {"topic": "t"}, line=9)
    assert [one["response"] for one in failed] == [None, None]
    errors = [BatchError.model_validate(one["error"]) for one in failed]
    assert [(one.code, one.message, one.line) for one in errors] == [
        ("x", "no", 9), ("cancelled", "the row was cancelled", 9),
    ]  # fmt: skip
    assert [one["error"]["sample_index"] for one in failed] == [1, 3]
    assert first["trbatch"]["samples"][0]["sample_index"] == 1
    assert first["trbatch"]["input"] == {"topic": "t"}
    assert len({line["id"], first["id"], second["id"]}) == 3
    assert {line["custom_id"], first["custom_id"], second["custom_id"]} == {"a"}


def test_the_files_of_a_job_hold_them_so(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", {"id": "a", "prompt": "x", "n": 3})
    job = JobFolder.submit(JobSpec(input=str(path), out=str(tmp_path / "store"), model="m"))
    bad = {"text": None, "finish_reason": "error", "error_code": "x", "error_message": "no"}
    job.publish("w", [result(job, one, i, **({} if i == 1 else bad)) for one, i in job.missing(0)])
    receipt = collect(job, str(tmp_path / "out.jsonl"), "jsonl")
    (line,) = map(json.loads, Path(receipt.output).read_text().splitlines())
    assert [choice["index"] for choice in line["response"]["body"]["choices"]] == [1]
    assert line["error"] is None
    failed = [json.loads(one) for one in Path(receipt.errors_output).read_text().splitlines()]
    assert [one["error"]["sample_index"] for one in failed] == [0, 2]
    assert receipt.rows_ok == 1 and receipt.rows_failed == 2
