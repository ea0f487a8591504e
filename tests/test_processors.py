"""Penalties, bias and least length: what transformers does, whatever is drafted."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import tiny
import torch

from trbatch.config import SamplingParams
from trbatch.engine.model import from_network
from trbatch.engine.processors import with_processors
from trbatch.engine.sequence import Completion, Request
from trbatch.engine.step_plain import PlainOperations
from trbatch.engine.text import EncodingFailed

PROMPTS = tiny.repetitive(3, seed=9) + tiny.prompts(2, seed=5)
VARIED = tiny.prompts(4, seed=5)[1]  # its greedy text does not go round in circles
LENGTH = 18
MIXED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.9},
    {"logit_bias": {5: 4.0, 22: -100}, "temperature": 1.1, "top_p": 0.9},
    {"frequency_penalty": -0.5, "repetition_penalty": 0.9, "temperature": 0.7, "top_k": 9},
    {},
]


model = functools.cache(lambda: tiny.loaded("llama"))
network = functools.cache(lambda: tiny.network("llama"))


def engine(*, on_device: bool = False, **settings: Any) -> Any:
    if on_device:
        settings |= {"operations": PlainOperations(), "enforce_eager": True}
    return tiny.engine(model(), **settings)


def ask(key: int, ids: list[int], **sampling: Any) -> Request:
    return tiny.request(key, ids, **{"max_tokens": LENGTH, **sampling})


def texts(done: dict[Any, Completion]) -> list[list[int]]:
    return [done[key].token_ids for key in sorted(done)]


def generated(ids: list[int], length: int = LENGTH, **settings: Any) -> list[int]:
    """What transformers says."""
    tokens = torch.tensor([ids], device=tiny.DEVICE)
    values = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": length} | settings
    with torch.inference_mode():
        out: Any = network().generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **values
        )
    result: list[int] = out[0, len(ids) :].tolist()
    return result


on_both_paths = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


@on_both_paths
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_with_a_repetition_penalty_is_what_generate_says(
    on_device: bool, penalty: float
) -> None:
    requests = [ask(i, ids, repetition_penalty=penalty) for i, ids in enumerate(PROMPTS)]
    done = tiny.decode(engine(on_device=on_device), requests)
    assert texts(done) == [generated(ids, repetition_penalty=penalty) for ids in PROMPTS]
    assert texts(done) != [generated(ids) for ids in PROMPTS]
    if penalty < 1:
        assert sum(one.num_accepted_draft_tokens for one in done.values()) > 0


@on_both_paths
def test_a_bias_is_what_generate_makes_of_it(on_device: bool) -> None:
    bias = {7: 6.0, 30: -100.0}
    requests = [ask(i, ids, logit_bias=bias) for i, ids in enumerate(PROMPTS)]
    done = tiny.decode(engine(on_device=on_device), requests)
    assert texts(done) == [
        generated(ids, sequence_bias={(token,): value for token, value in bias.items()})
        for ids in PROMPTS
    ]
    assert any(7 in text for text in texts(done))


@on_both_paths
def test_a_text_may_end_only_after_its_least_length(on_device: bool) -> None:
    """As with `generate(min_new_tokens=…)`; its fourth token is made an end."""
    ends = generated(VARIED, 8)[3:4]
    least = (0, 3, 4, 12)
    sampling: dict[str, Any] = {"ignore_eos": True, "stop_token_ids": ends}
    requests = [ask(i, VARIED, min_tokens=n, **sampling) for i, n in enumerate(least)]
    done = tiny.decode(engine(on_device=on_device), requests)
    expected = [generated(VARIED, eos_token_id=ends[0], min_new_tokens=n) for n in least]
    assert texts(done) == expected
    for key, text in enumerate(expected):
        assert done[key].finish_reason == ("stop" if text[-1] == ends[0] else "length")
    found = list(map(len, expected))
    assert found[0] == found[1] == 4 < found[2] <= 12 < found[3]


def test_the_models_own_end_waits_for_the_least_length() -> None:
    short: Any = tiny.network("llama")
    end = short.config.eos_token_id = short.generation_config.eos_token_id = generated(VARIED, 3)[2]
    own = from_network(short, tiny.NumberTokenizer(), name="short")
    sampling = {"ignore_eos": False, "min_tokens": 9}
    done = tiny.decode(tiny.engine(own), [ask(0, VARIED, **sampling)])
    expected = generated(VARIED, eos_token_id=end, min_new_tokens=9)
    assert done[0].token_ids == expected
    assert len(expected) > 3


def test_a_stop_text_counts_only_behind_the_least_length() -> None:
    words = generated(VARIED)
    stop = f" {words[3]} "
    again = words.index(words[3], 4)
    cases = ((0, 4), (3, 4), (4, again + 1), (again, again + 1))
    requests = [ask(i, VARIED, stop=[stop], min_tokens=least) for i, (least, _) in enumerate(cases)]
    done = tiny.decode(engine(), requests)
    for key, (_, length) in enumerate(cases):
        assert done[key].token_ids == words[:length]
        assert done[key].text == "".join(f"{word} " for word in words[: length - 1])[:-1]


def test_output_penalties_count_the_output_alone() -> None:
    """Against a loop that keeps the counts itself."""
    ids = PROMPTS[1]
    expected: list[int] = []
    with torch.inference_mode():
        for _ in range(LENGTH):
            logits = network()(torch.tensor([ids + expected], device=tiny.DEVICE)).logits[0, -1]
            for token, count in Counter(expected).items():
                logits[token] -= 0.6 * count + 1.1
            expected.append(int(logits.argmax()))
    sampling = {"frequency_penalty": 0.6, "presence_penalty": 1.1}
    done = tiny.decode(engine(), [ask(0, ids, **sampling)])
    assert done[0].token_ids == expected != generated(ids)


def mixed() -> list[Request]:
    return [
        ask(i, PROMPTS[i % len(PROMPTS)], seed=50 + i, max_tokens=14, **MIXED[i % len(MIXED)])
        for i in range(8)
    ]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Those rows one by one, without drafts."""
    return texts(tiny.decode(engine(speculate=False, max_num_seqs=1), mixed()))


@pytest.mark.parametrize(
    "settings",
    [{"max_num_seqs": 1}, {"max_num_seqs": 8, "tree_size": 9}, {"on_device": True}],
    ids=str,
)  # fmt: skip
def test_drafts_and_batches_change_no_token(
    settings: dict[str, Any], alone: list[list[int]]
) -> None:
    assert texts(tiny.decode(engine(**settings), mixed())) == alone


def test_what_needs_the_host_does_not_run_ahead_on_the_device() -> None:
    one = engine(on_device=True, max_num_seqs=8)
    settings = [*MIXED, {"min_tokens": 3, "stop_token_ids": [5]}, {"logprobs": 0},
                {"prompt_logprobs": 2}, {"min_tokens": 3, "temperature": 1.0}]  # fmt: skip
    for i, sampling in enumerate(settings):
        one.add(ask(i, PROMPTS[0], **sampling))
    one._admit()
    one._admit()
    lagged = {s.request.key: s.lagged for s in one._scheduler.running}
    assert [lagged[key] for key in range(8)] == [False] * 4 + [True] + [False] * 3
    while one.unfinished:
        one.step()


def test_a_bias_of_a_token_that_the_model_does_not_have_is_the_rows_error() -> None:
    done = tiny.decode(engine(), [ask(0, PROMPTS[0], logit_bias={tiny.VOCAB: 1}), ask(1, [5])])
    assert (done[0].finish_reason, done[0].error_code) == ("error", "invalid_sampling")
    assert f"names token {tiny.VOCAB}" in (done[0].error_message or "")
    assert done[1].finish_reason == "length"


def test_a_rows_own_processors_come_behind_those_of_its_sampling() -> None:
    def own(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits

    params = SamplingParams(logit_bias={"3": 1}, presence_penalty=1, min_tokens=1)
    request = Request(key=0, sampling=params, logits_processors=(own,))
    names = [type(p).__name__ for p in with_processors(request, [1], {2}, 9).logits_processors]
    assert names == ["Bias", "MinTokens", "OutputPenalties", "function"]
    assert with_processors(request, [1], set(), 9).logits_processors[-1] is own
    plain = Request(key=0, sampling=SamplingParams())
    assert with_processors(plain, [1], {2}, 9) is plain
    with pytest.raises(EncodingFailed, match="names token 3; the model's last one is 2"):
        with_processors(request, [1], {2}, 3)
    for asked in ({"stop_token_ids": (9, 2)}, {"logit_bias": {"9": 1}}):
        bad = Request(key=0, sampling=SamplingParams(**asked))
        with pytest.raises(EncodingFailed, match="names token 9; the model's last one is 8"):
            with_processors(bad, [1], {2}, 9)
