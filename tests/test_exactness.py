"""Token for token what `transformers` generates: the real model, real prompts, a drafted batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from trbatch.config import DEFAULT_MODEL, EngineConfig
from trbatch.engine.engine import Engine
from trbatch.models import load_model

BATCH = 8


@dataclass(frozen=True)
class Divergence:
    """Where a text leaves the one of `generate`, and how close the two tokens were there."""

    prompt: int
    position: int
    expected: int | None  # None: that text has ended
    found: int | None
    logit_gap: float  # of the model alone, between its likeliest token and the next


def first_turns(file: Path, begin: int, count: int) -> list[str]:
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, begin, begin + count)]
    return [row["turns"][0] if "turns" in row else row["prompt"] for row in rows]


def generated(network: Any, ids: Sequence[int], max_tokens: int) -> list[int]:
    """What transformers alone says, its own end of text included."""
    tokens = torch.tensor([list(ids)])
    with torch.inference_mode():
        out = network.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
            max_new_tokens=max_tokens,
        )  # fmt: skip
    result: list[int] = out[0, len(ids) :].tolist()
    return result


def judged(
    network: Any, ids: Sequence[int], found: Sequence[int], max_tokens: int, eos: frozenset[int]
) -> list[int]:
    """What transformers alone says, as far as a text agrees with it, and its next token.

    One forward over the text instead of one a token: greedy decoding takes the likeliest token
    behind every beginning, so a text all of whose tokens are those is the one that it writes.
    """
    with torch.inference_mode():
        logits = network(torch.tensor([[*ids, *found]])).logits[0, len(ids) - 1 :]
    said: list[int] = []
    for place, token in enumerate(logits.argmax(-1).tolist()):
        if len(said) == max_tokens or (said and said[-1] in eos):
            break  # here it ends, wherever the text does
        said.append(token)
        if found[place : place + 1] != [token]:
            break
    return said


def divergence(
    network: Any, prompt: int, ids: Sequence[int], expected: list[int], found: list[int]
) -> Divergence | None:
    if expected == found:
        return None
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    with torch.inference_mode():
        logits = network(torch.tensor([[*ids, *expected[:at]]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()

    def token(tokens: list[int]) -> int | None:
        return tokens[at] if at < len(tokens) else None

    return Divergence(prompt, at, token(expected), token(found), first - second)


@pytest.mark.parametrize(
    ("begin", "count", "max_tokens", "settings"),
    [
        pytest.param(0, 3, 24, {"tree_size": 12}, id="a few"),
        *(
            pytest.param(begin, 16, length, {}, id=f"16 from {begin}", marks=pytest.mark.long)
            for begin, length in ((0, 128), (16, 64), (32, 64), (48, 64))
        ),
    ],
)
def test_real_prompts_in_a_drafted_batch_equal_generate(
    real_prompts: Path, small_model: Path, begin: int, count: int, max_tokens: int,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    few = count == 3
    loaded = load_model(DEFAULT_MODEL, device="cpu", dtype="float32")
    network = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    messages = [
        [{"role": "user", "content": text}] for text in first_turns(real_prompts, begin, count)
    ]
    prompts = [
        loaded.tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False)
        for one in messages
    ]
    engine = Engine(loaded, EngineConfig(device="cpu", max_num_seqs=BATCH, **settings))
    done = tiny.decode(
        engine,
        [
            tiny.chat_request(i, one, max_tokens=max_tokens, ignore_eos=False)
            for i, one in enumerate(messages)
        ],
    )
    assert len(done) == len(prompts) == count
    assert [done[i].prompt_tokens for i in range(count)] == [len(ids) for ids in prompts]
    differing = []
    for i, ids in enumerate(prompts):
        found = done[i].token_ids
        said = judged(network, ids, found, max_tokens, loaded.eos_token_ids)
        if few:
            assert generated(network, ids, max_tokens)[: len(said)] == said, "judged wrongly"
        if parted := divergence(network, i, ids, said, found):
            differing.append(parted)
    assert not differing, "\n".join(map(str, differing))
    accepted = sum(c.num_accepted_draft_tokens for c in done.values())
    assert accepted > 0, "nothing was drafted, so nothing was shown"
