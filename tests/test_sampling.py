"""Sampled decoding: exact in distribution, and the same whatever the batch or the tree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import tiny
import torch
from scipy import stats

from trbatch.config import SamplingParams
from trbatch.engine import sampling
from trbatch.engine.model import from_network
from trbatch.engine.noise import place_key
from trbatch.engine.sampling import Choice, _sample, choose
from trbatch.engine.tree import Tree

SETTINGS = [
    {"temperature": 0.8},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.0},
]


def sampled(model, count: int = 8, **settings):
    requests = [
        tiny.request(i, ids, seed=1000 + i, **SETTINGS[i % len(SETTINGS)])
        for i, ids in enumerate(tiny.repetitive(count, seed=3))
    ]
    done = tiny.decode(tiny.engine(model, **settings), requests)
    return [done[i].token_ids for i in range(count)]


def test_speculation_on_and_off_give_the_same_tokens() -> None:
    model = tiny.loaded("llama")
    assert sampled(model) == sampled(model, speculate=False)


def test_batch_of_one_and_of_eight_give_the_same_tokens() -> None:
    model = tiny.loaded("llama")
    assert sampled(model, max_num_seqs=1) == sampled(model, max_num_seqs=8)


def test_two_seeds_differ_and_so_do_two_samples() -> None:
    model = tiny.loaded("llama")
    ids = tiny.prompts(1)[0]
    requests = [
        tiny.request(0, ids, temperature=1.0, seed=1),
        tiny.request(1, ids, temperature=1.0, seed=2),
        tiny.request(2, ids, temperature=1.0, seed=1, sample_index=1),
        tiny.request(3, ids, temperature=1.0, seed=1),
    ]
    done = tiny.decode(tiny.engine(model), requests)
    texts = [tuple(done[i].token_ids) for i in range(4)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_joint_distribution_of_drafted_tokens_is_the_models_own(top_p: float) -> None:
    """Chi-square over the second and third tokens; at least half of them were accepted drafts."""
    vocab, runs = 9, 1000
    network = tiny.network("llama", vocab_size=vocab, seed=5)
    with torch.no_grad():
        network.lm_head.weight.mul_(0.08)  # a flat distribution: many cells of the table count
    ids = [3, 4, 5, 6, 3, 4, 5]
    expected = joint_probabilities(network, ids, vocab, top_p)
    model = from_network(network, tiny.NumberTokenizer(), name="flat")
    # All pairs of candidates, so that nearly every token is an accepted draft.
    pairs = tuple((a,) for a in range(8)) + tuple((a, b) for a in range(8) for b in range(8))
    engine = tiny.engine(model, max_num_seqs=32, tree_size=73, shape=Tree(pairs))
    done = tiny.decode(
        engine,
        [
            tiny.request(i, ids, temperature=1.0, top_p=top_p, seed=i, max_tokens=3)
            for i in range(runs)
        ],
    )
    counts = torch.zeros(vocab, vocab)
    for completion in done.values():
        counts[completion.token_ids[1], completion.token_ids[2]] += 1
    accepted = sum(c.num_accepted_draft_tokens for c in done.values())
    assert accepted >= runs, f"{accepted} accepted drafts for {2 * runs} tokens"
    assert counts[expected == 0].sum() == 0
    cells = expected[expected > 0] * runs
    seen = counts[expected > 0]
    common = cells >= 5
    observed = [*seen[common].tolist(), float(seen[~common].sum())]
    wanted = [*cells[common].tolist(), float(cells[~common].sum())]
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], wanted[:-1]
        wanted = [w * sum(observed) / sum(wanted) for w in wanted]
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def joint_probabilities(network, ids: list[int], vocab: int, top_p: float) -> torch.Tensor:
    """P(second, third token) of sampling from the model itself, by enumeration."""

    def next_probabilities(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = (
                network(torch.tensor([tokens], device=tiny.DEVICE)).logits[0, -1].double().cpu()
            )
        p = torch.softmax(logits, -1)
        ordered, order = p.sort(descending=True)
        ordered[(ordered.cumsum(0) - ordered) >= top_p] = 0
        p = torch.zeros_like(p).scatter(0, order, ordered)
        return p / p.sum()

    joint = torch.zeros(vocab, vocab, dtype=torch.double)
    for first, p in enumerate(next_probabilities(ids).tolist()):
        if p == 0:
            continue
        for second, q in enumerate(next_probabilities([*ids, first]).tolist()):
            if q:
                joint[second] += p * q * next_probabilities([*ids, first, second])
    return joint


def test_filters_follow_their_definitions() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1])).repeat(200, 1)
    keys = [place_key(1, 0, i) for i in range(200)]

    def reached(**params) -> set[int]:
        settings = SamplingParams(temperature=1.0, **params)
        return set(choose(logits, [Choice(settings, key) for key in keys]).tolist())

    assert reached() == {0, 1, 2, 3}
    assert reached(top_k=2) == {0, 1}
    assert reached(top_p=0.69) == {0, 1}
    assert reached(top_p=0.71) == {0, 1, 2}
    assert reached(min_p=0.6) == {0, 1}
    assert reached(top_p=1e-6) == {0}


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 9.9e-6, 1e-5])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_tiny_temperature_takes_the_likeliest_token(
    temperature: float, filters: dict[str, float]
) -> None:
    logits = torch.tensor([[-60.0, 80.0, 79.0, 0.0]] * 3)
    params = SamplingParams(temperature=temperature, **filters)  # type: ignore[arg-type]
    choices = [Choice(params, key) for key in (0, 1, 2**64 - 1)]
    assert choose(logits, choices).tolist() == [1, 1, 1]


def test_an_impossible_token_is_never_taken() -> None:
    logits = torch.tensor([[0.0, -40.0, -math.inf, -math.inf]]).repeat(4000, 1)
    params = SamplingParams(temperature=1.0)
    chosen = choose(logits, [Choice(params, place_key(2, 0, i)) for i in range(4000)])
    assert set(chosen.tolist()) == {0}


def test_logits_that_are_no_numbers_give_some_token() -> None:
    choices = [Choice(SamplingParams(temperature=1.0, min_p=p), 5) for p in (0.0, 0.5)]
    for logits in (torch.full((2, 300), math.nan), torch.full((2, 300), -math.inf)):
        assert all(0 <= token < 300 for token in choose(logits, choices).tolist())


@pytest.mark.parametrize("top_k", [2**31 - 1, tiny.VOCAB + 1, tiny.VOCAB, -1, 0])
def test_a_top_k_beyond_the_vocabulary_is_no_limit(top_k: int) -> None:
    logits = torch.randn(1, tiny.VOCAB, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=1.0, top_p=0.9, top_k=k) for k in (top_k, 0)]
    one, other = (choose(logits, [Choice(p, 7)]) for p in params)
    assert one.tolist() == other.tolist()


def explode(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    if len(tokens) > 20:
        raise LookupError("no such grammar")
    return logits


def test_a_processor_that_raises_fails_its_row_and_no_other() -> None:
    prompts = tiny.repetitive(3, seed=9)
    prompts[0] = prompts[0][:15]
    good = [tiny.request(i, prompts[i], temperature=0.8 * i) for i in (1, 2)]
    model = tiny.loaded("llama")
    bad = [
        tiny.request(key, ids, logits_processors=(explode,), seed=3, sample_index=2)
        for key, ids in ((0, prompts[0]), (9, prompts[1]))  # in decoding, and at its first token
    ]
    engine = tiny.engine(model)
    done = tiny.decode(engine, [*bad, *good])
    alone = tiny.decode(tiny.engine(model), good)
    assert [done[i].token_ids for i in (1, 2)] == [alone[i].token_ids for i in (1, 2)]
    for failed in (done[0], done[9]):
        assert (failed.finish_reason, failed.error_code) == ("error", "sampling_failed")
        assert "LookupError: no such grammar" in failed.error_message
        assert (failed.text, failed.token_ids) == ("", [])
        assert (failed.seed, failed.sample_index) == (3, 2)
    assert tiny.decode(engine, good)[1].token_ids == alone[1].token_ids, "its room was lost"


def test_settings_that_torch_refuses_fail_their_row_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusing(logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
        if any(choice.params.min_p == 0.5 for choice in choices):
            raise ValueError("Overflow when unpacking long long")
        return _sample(logits, choices)

    prompts = tiny.repetitive(2, seed=9)
    good = tiny.request(0, prompts[0], temperature=0.8)
    bad = tiny.request(1, prompts[1], temperature=0.8, min_p=0.5)
    model = tiny.loaded("llama")
    alone = tiny.decode(tiny.engine(model), [good])
    monkeypatch.setattr(sampling, "_sample", refusing)
    done = tiny.decode(tiny.engine(model), [good, bad])
    assert done[0].token_ids == alone[0].token_ids
    assert done[1].error_code == "sampling_failed"
    assert "Overflow" in done[1].error_message


def test_a_device_that_fails_is_not_the_rows_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(sampling, "_sample", full)
    with pytest.raises(torch.AcceleratorError):
        tiny.decode(tiny.engine(tiny.loaded()), [tiny.request(0, [5, 6, 7], temperature=0.8)])


def test_logits_processor_sees_committed_tokens_and_ancestors() -> None:
    """A processor that forbids repeating the last token, against a loop that applies it itself."""
    network = tiny.network("llama")
    ids = tiny.repetitive(1, seed=9)[0]

    def forbid_last(tokens, logits):
        logits = logits.clone()
        logits[tokens[-1]] = -torch.inf
        logits[(tokens[-2] * 7) % tiny.VOCAB] += 5.0
        return logits

    expected = list(ids)
    with torch.inference_mode():
        for _ in range(24):
            logits = network(torch.tensor([expected], device=tiny.DEVICE)).logits[0, -1]
            expected.append(int(forbid_last(expected, logits).argmax()))
    model = tiny.loaded("llama")
    done = tiny.decode(
        tiny.engine(model),
        [tiny.request(0, ids, logits_processors=(forbid_last,)), tiny.request(1, ids)],
    )
    assert done[0].token_ids == expected[len(ids) :]
    assert done[0].token_ids != done[1].token_ids
