"""Log probabilities: those of a plain forward, however the row was decoded."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import tiny
import torch

from trbatch.engine.sequence import Completion, TokenLogprob
from trbatch.engine.step_plain import PlainOperations

COMMON = tiny.repetitive(1, length=20, seed=3)[0]  # two pages and a half
PROMPTS = [*tiny.repetitive(2, seed=9), COMMON, [*COMMON, 7, 8, 9], *tiny.prompts(1, seed=5)]
LENGTH = 10
SETTINGS: list[dict[str, Any]] = [
    {"logprobs": 3},
    {"logprobs": 0, "temperature": 0.9},
    {"logprobs": 5, "prompt_logprobs": 2, "repetition_penalty": 1.4},
    {"prompt_logprobs": 0},
    {"logprobs": 1, "prompt_logprobs": 4, "temperature": 1.2, "top_p": 0.8},
]


model = functools.cache(lambda: tiny.loaded("llama"))
network = functools.cache(lambda: tiny.network("llama"))


def engine(*, on_device: bool = False, **settings: Any) -> Any:
    if on_device:
        settings |= {"operations": PlainOperations(), "enforce_eager": True}
    return tiny.engine(model(), **settings)


def requests(**more: Any) -> list[Any]:
    return [
        tiny.request(i, ids, seed=i, max_tokens=LENGTH, **settings, **more)
        for i, (ids, settings) in enumerate(zip(PROMPTS, SETTINGS, strict=True))
    ]


def check(found: list[TokenLogprob], tokens: list[int], said: torch.Tensor, most: int) -> None:
    """Args: said: [n, V] log probabilities where each of the tokens comes."""
    assert [one.token_id for one in found] == tokens
    assert len(said) == len(tokens)
    for one, row in zip(found, said, strict=True):
        assert one.token == f"{one.token_id} "
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=2e-4)
        assert one.rank == int((row > row[one.token_id]).sum()) + 1
        best = row.topk(most)
        assert [other.token_id for other in one.top] == best.indices.tolist()
        likely = [other.logprob for other in one.top]
        assert likely == pytest.approx(best.values.tolist(), abs=2e-4)


@pytest.mark.parametrize(
    "settings",
    [{"speculate": False}, {"prefill_chunk": 7}, {"on_device": True},
     {"on_device": True, "prefill_chunk": 9, "max_num_seqs": 2}],
    ids=str,
)  # fmt: skip
def test_they_are_those_of_a_plain_forward(settings: dict[str, Any]) -> None:
    done = tiny.decode(engine(**settings), requests())
    for i, (ids, sampling) in enumerate(zip(PROMPTS, SETTINGS, strict=True)):
        one = done[i]
        tokens = torch.tensor([ids + one.token_ids], device=tiny.DEVICE)
        with torch.inference_mode():
            said = torch.log_softmax(network()(tokens).logits[0].float(), -1).cpu()
        if "logprobs" in sampling:
            assert one.logprobs is not None
            check(one.logprobs, one.token_ids, said[len(ids) - 1 : -1], sampling["logprobs"])
            assert one.cumulative_logprob == pytest.approx(
                math.fsum(token.logprob for token in one.logprobs)
            )
        else:
            assert one.logprobs is None and one.cumulative_logprob is None
        if "prompt_logprobs" in sampling:
            assert one.prompt_logprobs is not None and one.prompt_logprobs[0] is None
            told = [token for token in one.prompt_logprobs[1:] if token is not None]
            check(told, ids[1:], said[: len(ids) - 1], sampling["prompt_logprobs"])
        else:
            assert one.prompt_logprobs is None


def test_asking_for_them_changes_no_token() -> None:
    silent = [
        tiny.request(
            i, ids, seed=i, max_tokens=LENGTH,
            **{k: v for k, v in settings.items() if not k.endswith("logprobs")},
        )
        for i, (ids, settings) in enumerate(zip(PROMPTS, SETTINGS, strict=True))
    ]  # fmt: skip
    asked, not_asked = (tiny.decode(engine(), r) for r in (requests(), silent))
    assert [asked[i].token_ids for i in asked] == [not_asked[i].token_ids for i in asked]
    assert sum(one.num_accepted_draft_tokens for one in asked.values()) > 0


def test_a_row_that_is_cut_or_ends_early_has_one_for_each_token() -> None:
    words = tiny.decode(engine(), [tiny.request(0, PROMPTS[4], max_tokens=9)])[0].token_ids
    cut: list[dict[str, Any]] = [
        {"stop": [f" {words[4]} "]}, {"stop_token_ids": [words[4]]}, {"max_tokens": 1},
    ]  # fmt: skip
    done = tiny.decode(
        engine(), [tiny.request(i, PROMPTS[4], logprobs=1, **how) for i, how in enumerate(cut)]
    )
    for i, one in done.items():
        assert [token.token_id for token in one.logprobs or ()] == one.token_ids, cut[i]
        assert len(one.token_ids) == (5, 5, 1)[i]


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_row_that_had_to_give_way_has_them_all(on_device: bool) -> None:
    """Out of memory in the middle: all begin anew from their texts."""
    whole = tiny.decode(engine(on_device=on_device, max_num_seqs=4), requests())
    one = engine(on_device=on_device, max_num_seqs=4)
    for request in requests():
        one.add(request)
    done: dict[Any, Completion] = {}
    for number in range(200):
        done |= {completion.key: completion for completion in one.step()}
        if number in (1, 4):
            one._drain()
            one._retire_ended()
            for sequence in reversed(list(one._scheduler.running)):
                one._preempt(sequence)
    assert not one.unfinished
    for key, expected in whole.items():
        assert done[key].token_ids == expected.token_ids
        for found, wanted in (
            (done[key].logprobs, expected.logprobs),
            (done[key].prompt_logprobs, expected.prompt_logprobs),
        ):
            assert [t and t.token_id for t in found or ()] == [
                t and t.token_id for t in wanted or ()
            ]
            assert [t.logprob for t in found or () if t] == pytest.approx(
                [t.logprob for t in wanted or () if t], abs=2e-4
            )


def test_token_ids_come_when_asked_for() -> None:
    asked = tiny.request(0, PROMPTS[0], return_token_ids=True)
    done = tiny.decode(engine(), [asked, tiny.request(1, PROMPTS[0])])
    assert done[0].prompt_token_ids == PROMPTS[0]
    assert done[1].prompt_token_ids is None
    assert done[0].token_ids == done[1].token_ids
