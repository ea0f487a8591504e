"""A batch file as vLLM's users have it, through an engine, to result lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from job_tools import write_lines
from openai.types import Completion
from openai.types.chat import ChatCompletion

from trbatch import api
from trbatch.config import EngineConfig, WorkerConfig

MODEL = "maker/tiny-model"  # whose folder the test's model lies in
ASK = [{"role": "system", "content": "w5 w6"}, {"role": "user", "content": "w7 w8 w9"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
# Everything that vLLM's documentation shows, of which each field must be taken as it is meant.
SAMPLED = {
    "max_completion_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05,
    "n": 2, "best_of": 2, "seed": 11, "stop": ["END"], "stop_token_ids": [96], "ignore_eos": True,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {},
    "logprobs": True, "top_logprobs": 2, "response_format": {"type": "text"}, "stream": False,
    "user": "u", "service_tier": "auto", "use_beam_search": False, "length_penalty": 1.0,
    "skip_special_tokens": True, "add_special_tokens": False, "priority": 0, "echo": False,
    "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low",
}  # fmt: skip
GREEDY = {"max_tokens": 8, "ignore_eos": True}
BODIES: dict[str, dict[str, Any]] = {
    "sampled": SAMPLED,
    "again": SAMPLED,
    "greedy": GREEDY,
    "likeliest": GREEDY | {"top_p": 0, "temperature": 0.9},
    "idle": GREEDY | {"tools": TOOLS, "tool_choice": "none", "seed": -1, "best_of": 1},
}


def through(path: Path, folder: Path, output: Path) -> dict[str, Any]:
    """Submit, decode and collect a file; each line's body by its id."""
    job = api.submit(path, model=str(folder))
    engine = EngineConfig(device="cpu", max_num_seqs=4, max_model_len=128, tree_size=6)
    assert api.work(WorkerConfig(burst=True, publish_s=0.1, engine=engine)) == 0
    receipt = job.collect(output, format="jsonl")
    assert (receipt.exit_code, receipt.errors_output) == (0, "")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(line["error"] is None for line in lines)
    assert all(line["response"]["status_code"] == 200 for line in lines)
    return {line["custom_id"]: line["response"]["body"] for line in lines}


@pytest.mark.usefixtures("home")
def test_a_file_for_vllm_runs_unchanged(tmp_path: Path, tiny_folder: Path) -> None:
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": MODEL, "messages": ASK} | body}
        for name, body in BODIES.items()
    ]  # fmt: skip
    raw = {"model": MODEL, "prompt": "w7 w8 w9", "max_tokens": 5, "logprobs": 1, "ignore_eos": True}
    lines.append({"custom_id": "raw", "method": "POST", "url": "/v1/completions", "body": raw})
    path = write_lines(tmp_path / "batch.jsonl", *lines)
    found = through(path, tiny_folder, tmp_path / "out.jsonl")
    assert list(found) == [*BODIES, "raw"]

    chats = {name: ChatCompletion.model_validate(found[name]) for name in BODIES}
    said = {name: [one.message.content for one in chats[name].choices] for name in BODIES}
    assert len(said["sampled"]) == 2
    assert said["sampled"] == said["again"], "its seed decides a row's samples"
    assert len(said["greedy"]) == 1
    assert said["greedy"] == said["likeliest"] == said["idle"]
    first = chats["sampled"].choices[0]
    assert first.logprobs is not None and first.logprobs.content is not None
    assert [len(token.top_logprobs) for token in first.logprobs.content] == 12 * [2]
    usage = chats["sampled"].usage
    assert usage is not None
    # CHAT writes `user`, a message and a space for each of two, then `assistant`: 2 + 5 + 1 tokens.
    assert (usage.prompt_tokens, usage.completion_tokens) == (8, 24)

    answer = Completion.model_validate(found["raw"]).choices[0]
    assert answer.finish_reason == "length" and len(answer.text.split()) == 5
    assert answer.logprobs is not None and answer.logprobs.tokens is not None
    assert len(answer.logprobs.tokens) == 5
