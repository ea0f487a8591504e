"""Tiny random-weight models of many architectures, and a tokenizer that needs no files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from trbatch.config import EngineConfig, SamplingParams
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel, from_network
from trbatch.engine.sequence import Completion, Request

VOCAB = 97
DEVICE = os.environ.get("TRBATCH_TEST_DEVICE", "cpu")  # where the tiny models run

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
_WINDOW = {"sliding_window": 8}  # shorter than any text in the tests

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "qwen3_moe": {
        **_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "mistral": {**_GROUPED, **_WINDOW},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": _GROUPED,
    "gemma2": {**_GROUPED, **_WINDOW, "head_dim": 8, "num_hidden_layers": 3},
    "gemma3_text": {
        **_GROUPED, **_WINDOW, "head_dim": 8, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "olmo2": _GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {},
    "granite": _GROUPED,
    "cohere": _GROUPED,
    "stablelm": _GROUPED,
}  # fmt: skip


class NumberTokenizer:
    """Every id is its own number as text."""

    chat_template = None
    eos_token_id = 2

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(f"{token} " for token in ids if not (skip_special_tokens and token < 3))

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(part) for part in text.split()]}


def network(kind: str, *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A transformers model with random weights, spread enough that greedy choices are no ties."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**{**_COMMON, **ARCHITECTURES.get(kind, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.to(DEVICE)


def loaded(kind: str = "llama", **changes: Any) -> LoadedModel:
    """The same model, ready for the engine."""
    return from_network(network(kind, **changes), NumberTokenizer(), name=f"tiny-{kind}")


def engine(model: LoadedModel, **settings: Any) -> Engine:
    """An engine of small sizes."""
    more = {
        name: settings.pop(name)
        for name in ("orders", "task_orders", "shape", "operations", "costs")
        if name in settings
    }
    if "shape" in more:
        more["tree"] = more.pop("shape")
    values = {"max_num_seqs": 4, "max_model_len": 256, "page_size": 8, "tree_size": 24}
    values["bigrams"] = False  # they would be kept by a fingerprint that random weights share
    return Engine(model, EngineConfig(**{**values, **settings}), **more)


def request(key: int, ids: Sequence[int], **changes: Any) -> Request:
    """A request of token ids; other fields go to its sampling."""
    fields = {name: changes.pop(name) for name in list(changes) if name in _REQUEST_FIELDS}
    params = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **changes})
    return Request(key=key, order=key, prompt_token_ids=list(ids), sampling=params, **fields)


def chat_request(key: int, messages: Sequence[Mapping[str, Any]], **changes: Any) -> Request:
    """A request of messages; the other fields are its sampling's."""
    params = SamplingParams(**{"max_tokens": 24, **changes})
    return Request(key=key, order=key, messages=list(messages), sampling=params)


_REQUEST_FIELDS = {"seed", "sample_index", "logits_processors", "task"}


def decode(engine: Engine, requests: Sequence[Request]) -> dict[Any, Completion]:
    """Run requests to the end."""
    for one in requests:
        engine.add(one)
    done: dict[Any, Completion] = {}
    for _ in range(20_000):
        if not engine.unfinished:
            return done
        for completion in engine.step():
            assert completion.key not in done
            done[completion.key] = completion
    raise AssertionError(f"{engine.unfinished} requests never end")


def prompts(count: int, *, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Prompts of unequal length, all ids ordinary."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def repetitive(count: int, *, length: int = 30, seed: int = 0) -> list[list[int]]:
    """Prompts that repeat themselves, so that drafts have something to be right about."""
    return [(p * length)[:length] for p in prompts(count, seed=seed, longest=6)]


def generate(model: torch.nn.Module, ids: Sequence[int], max_tokens: int) -> list[int]:
    """What transformers' own greedy decoding gives, of exactly `max_tokens` tokens."""
    tokens = torch.tensor([list(ids)], device=DEVICE)
    with torch.inference_mode():
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
            max_new_tokens=max_tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    result: list[int] = out[0, len(ids) :].tolist()
    return result
