"""Sampling as people use it, through the real queue with the small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from job_tools import write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from trbatch import api
from trbatch.config import EngineConfig, WorkerConfig

ENGINE = EngineConfig(device="cpu", max_num_seqs=4, max_model_len=256, tree_size=6)
LENGTH = 24
LIST = "1 one, 2 two, 3 three, 4 four, 5 five,"
STORY = "Once upon a time, in a small village by the sea,"


@pytest.mark.long
def test_a_job_with_many_wishes_says_what_transformers_says(
    home: Path, small_model: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "penalty", "prompt": LIST, "repetition_penalty": 1.3},
        {"id": "least", "prompt": "Say no more.", "min_tokens": LENGTH},
        {"id": "likely", "prompt": STORY, "logprobs": 2, "prompt_logprobs": 0},
        {"id": "four", "prompt": STORY, "n": 4, "temperature": 1.0, "return_token_ids": True},
        {"id": "loop", "prompt": LIST, "logit_bias": {"33": 100}, "max_tokens": 60},
    ]
    write_lines(tmp_path / "in.jsonl", *rows)
    job = api.submit(tmp_path / "in.jsonl", seed=5, max_tokens=LENGTH)
    api.work(WorkerConfig(burst=True, publish_s=0.1, engine=ENGINE))
    table = pq.read_table(job.collect(tmp_path / "out.parquet").output).to_pylist()
    assert [row["error_message"] for row in table] == [None] * 8
    found = {row["custom_id"]: row for row in table}

    network = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(small_model)

    def generated(prompt: str, **settings: Any) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            out = network.generate(**inputs, do_sample=False, max_new_tokens=LENGTH, **settings)
        text: str = tokenizer.decode(
            out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return text

    assert found["penalty"]["text"] == generated(LIST, repetition_penalty=1.3) != generated(LIST)
    assert found["least"]["text"] == generated("Say no more.", min_new_tokens=LENGTH)

    likely = found["likely"]
    assert [one["token"] for one in likely["logprobs"]] == [
        tokenizer.decode([one["token_id"]]) for one in likely["logprobs"]
    ]
    ids = [one["token_id"] for one in likely["logprobs"]]
    prompt = tokenizer(STORY)["input_ids"]
    with torch.inference_mode():
        said = torch.log_softmax(network(torch.tensor([prompt + ids])).logits[0], -1)
    for at, one in enumerate([*likely["prompt_logprobs"][1:], *likely["logprobs"]]):
        assert one["logprob"] == pytest.approx(float(said[at, one["token_id"]]), abs=2e-3)

    samples = [row for row in table if row["custom_id"] == "four"]
    assert [row["sample_index"] for row in samples] == [0, 1, 2, 3]
    assert len({row["text"] for row in samples}) == 4
    assert {tuple(row["prompt_token_ids"]) for row in samples} == {tuple(prompt)}
    assert tokenizer.decode(samples[0]["token_ids"], skip_special_tokens=True) == samples[0]["text"]
    assert [found[name]["repetitive"] for name in ("loop", "penalty")] == [True, False]
