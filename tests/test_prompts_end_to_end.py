"""Templates, system prompts and chat arguments, through a worker with the small real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion
from transformers import AutoModelForCausalLM, AutoTokenizer

from trbatch import api
from trbatch.config import DEFAULT_MODEL, EngineConfig, JobSpec, WorkerConfig
from trbatch.preview import preview

ENGINE = EngineConfig(device="cpu", max_num_seqs=3, max_model_len=256, tree_size=6)
TEMPLATE = "Name three {{ things }}{% if where %} of {{ where }}{% endif %}."
MAX_TOKENS = 16


def generate(folder: Path, messages: list[dict[str, str]], **arguments: Any) -> str:
    """What transformers alone says."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        messages, return_tensors="pt", return_dict=True, **arguments
    )
    with torch.inference_mode():
        out = network.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.long
def test_what_a_worker_is_asked_is_what_the_preview_shows(
    home: Path, tmp_path: Path, small_model: Path
) -> None:
    rows = [
        {"custom_id": "a", "things": "rivers", "where": "Europe"},
        {"custom_id": "b", "things": "colours", "where": ""},
    ]
    goes_on = {
        "messages": [
            {"role": "user", "content": "Count to ten."},
            {"role": "assistant", "content": "1, 2, 3,"},
        ],
        "continue_final_message": True,
        "model": "another",
    }
    templated, batch = tmp_path / "rows.jsonl", tmp_path / "batch.jsonl"
    templated.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        {"custom_id": "c", "url": "/v1/chat/completions", "body": goes_on},
        {"custom_id": "d", "url": "/v1/completions", "body": {"prompt": "Once upon a time"}},
    ]
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))

    settings = {"max_tokens": MAX_TOKENS, "model": DEFAULT_MODEL}
    one = {"template": TEMPLATE, "system_prompt": "Answer in capitals."}
    two = {"ignore_body_fields": ("model",)}
    jobs = [api.submit(file, **settings, **own) for file, own in ((templated, one), (batch, two))]
    assert api.work(WorkerConfig(burst=True, publish_s=0.1, engine=ENGINE)) == 0
    found: dict[str, Any] = {}
    for job in jobs:
        receipt = job.collect(tmp_path / f"{job.id}.jsonl", format="jsonl")
        assert receipt.exit_code == 0
        for line in map(json.loads, Path(receipt.output).read_text().splitlines()):
            found[line["custom_id"]] = line["response"]["body"]
        spec = JobSpec.from_dict({**job.folder.spec.to_dict(), "resume": "if_possible"})
        seen = preview(spec)
        bodies = (found[one] for one in ("a", "b", "c", "d") if one in found)
        assert seen.samples == 0 and seen.continues and seen.pace is not None
        if job is jobs[0]:
            assert seen.prompt_tokens == sum(body["usage"]["prompt_tokens"] for body in bodies)

    system = {"role": "system", "content": "Answer in capitals."}
    asked = [system, {"role": "user", "content": "Name three rivers of Europe."}]
    said = ChatCompletion.model_validate(found["a"]).choices[0].message.content
    assert said == generate(small_model, asked, add_generation_prompt=True)
    said = ChatCompletion.model_validate(found["c"]).choices[0].message.content
    assert said == generate(small_model, goes_on["messages"], continue_final_message=True)
    assert Completion.model_validate(found["d"]).choices[0].text
