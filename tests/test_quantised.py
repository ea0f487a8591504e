"""Quantised weights: what is loaded says what transformers says of it, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantised_models
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from trbatch.engine import quantised
from trbatch.engine.model import LoadedModel
from trbatch.errors import ModelError, WorkerError
from trbatch.models import load_model

PROMPTS = tiny.repetitive(3, seed=2)
LENGTH = 20


def drafted(model: LoadedModel) -> list[list[int]]:
    requests = [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(PROMPTS)]
    done = tiny.decode(tiny.engine(model, tree_size=12), requests)
    assert sum(one.num_accepted_draft_tokens for one in done.values()) > 0
    return [done[i].token_ids for i in range(len(PROMPTS))]


def said_by(network: nn.Module) -> list[list[int]]:
    return [tiny.generate(network, ids, LENGTH) for ids in PROMPTS]


@pytest.mark.parametrize(
    "make", [quantised_models.fine_grained_fp8, quantised_models.compressed_fp8]
)
def test_fp8_weights_become_dense_and_say_what_they_say(make: Any, tmp_path: Path) -> None:
    network = quantised_models.network()
    before = said_by(network)
    loaded = load_model(str(make(tmp_path / "model", network)), device="cpu")
    assert said_by(network) != before, "the model that was quantised says something else"
    assert drafted(loaded) == said_by(network)
    types = {parameter.dtype for parameter in loaded.network.parameters()}
    assert types <= {torch.float32}


def test_four_bits_stay_four_bits_and_say_what_transformers_says(tmp_path: Path) -> None:
    folder = quantised_models.four_bits(
        tmp_path / "model", quantised_models.network(), tmp_path / "plain"
    )
    loaded = load_model(str(folder), device="cpu")
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert drafted(loaded) == said_by(alone)
    kinds = {type(module).__name__ for module in loaded.network.modules()}
    assert "Linear4bit" in kinds


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq' are not supported: .*gptqmodel"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq' are not supported: .*gptqmodel"),
        ({"quant_method": "hqq"}, "'hqq' are not supported: nobody has tried"),
        ({"quant_method": "mxfp4"}, "fetched from a hub"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "eight bits are not supported: .*all rows that are decoded together",
        ),
        ({"bits": 4}, "'unknown' are not supported"),
    ],
)
def test_others_are_refused_by_name_with_a_reason_and_a_cure(
    how: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = quantised_models.plain(tmp_path / "model", tiny.network("llama"), how)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(str(folder), device="cpu")
    assert not isinstance(caught.value, WorkerError)
    assert "original weights" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["bitsandbytes", "compressed-tensors"])
def test_a_missing_package_is_the_worker_s_fault(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"quant_method": kind, "load_in_4bit": True}
    folder = quantised_models.plain(tmp_path / "model", tiny.network("llama"), how)
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkerError, match=f"need the package {kind}") as caught:
        load_model(str(folder), device="cpu")
    assert caught.value.hint == "pip install 'trbatch[quantised]'"
