"""Requests in, completions out: how texts end, what is counted, who runs when."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from trbatch.config import SamplingParams
from trbatch.engine.kv_cache import PagePool
from trbatch.engine.model import LoadedModel, from_network
from trbatch.engine.sequence import Completion, Request

LENGTH = 24  # tokens of the reference texts
PROMPTS = tiny.repetitive(6, seed=4) + tiny.prompts(2, seed=5)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What transformers' `generate` says to each of PROMPTS."""
    network = tiny.network("llama")
    return [tiny.generate(network, ids, LENGTH) for ids in PROMPTS]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny.loaded("llama")


def decode_prompts(model: LoadedModel, **settings) -> list[list[int]]:
    """The tokens for PROMPTS from an engine of these settings."""
    requests = [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(PROMPTS)]
    done = tiny.decode(tiny.engine(model, **settings), requests)
    return [done[i].token_ids for i in range(len(PROMPTS))]


def text_of(tokens: Sequence[int]) -> str:
    return tiny.NumberTokenizer().decode(tokens)


def assert_consistent(done: Completion) -> None:
    """The figures of a completion that agree with each other whatever was drafted."""
    histogram, decoded = done.acceptance_histogram, done.completion_tokens - 1
    assert sum(histogram) == done.num_spec_steps
    assert sum((i + 1) * count for i, count in enumerate(histogram)) == decoded
    assert 0 <= done.num_accepted_draft_tokens <= done.num_draft_tokens
    # Each forward gives one token beside its drafts; a forward that was cut may lack it.
    assert decoded - done.num_spec_steps <= done.num_accepted_draft_tokens <= decoded
    assert (done.decode_s > 0) == (decoded > 0)


def alone(model: LoadedModel, **sampling) -> Completion:
    """PROMPTS[0] by an engine of its own, so that equal texts come of equal drafts."""
    engine = tiny.engine(model, max_num_seqs=1)
    return tiny.decode(engine, [tiny.request(0, PROMPTS[0], **sampling)])[0]


def test_max_tokens_cuts_anywhere_also_inside_an_accepted_path(model, expected) -> None:
    forwards = []
    for limit in range(1, LENGTH + 1):
        done = alone(model, max_tokens=limit)
        assert done.token_ids == expected[0][:limit]
        assert done.finish_reason == "length"
        assert_consistent(done)
        forwards.append(done.num_spec_steps)
    assert forwards[0] == 0, "the prefill gives the first token"
    assert forwards == sorted(forwards)
    assert len(set(forwards)) < LENGTH - 4, "no limit lay inside an accepted path"


def test_a_token_without_candidates_is_learned_from_like_any_other(model, expected) -> None:
    """Else the first new word of a text that repeats itself would be the end of its drafts."""
    assert expected[0][10:] == [22] * (LENGTH - 10), "choose another prompt"
    assert 22 not in PROMPTS[0]
    done = alone(model, max_tokens=LENGTH)
    assert done.num_spec_steps < LENGTH // 2, done.acceptance_histogram


def first_uses(tokens: list[int]) -> list[int]:
    """Places of the tokens that were not said before."""
    return [i for i, token in enumerate(tokens) if token not in tokens[:i]]


def test_a_stop_token_ends_the_text_wherever_it_lies_in_a_path(model, expected) -> None:
    cuts = [(row, at) for row, tokens in enumerate(expected) for at in first_uses(tokens)]
    requests = [
        tiny.request(key, PROMPTS[row], stop_token_ids=[expected[row][at]])
        for key, (row, at) in enumerate(cuts)
    ]
    done = tiny.decode(tiny.engine(model), requests)
    for key, (row, at) in enumerate(cuts):
        assert done[key].token_ids == expected[row][: at + 1], "the stop token is counted"
        assert done[key].text == text_of(expected[row][:at]), "and not shown"
        assert done[key].finish_reason == "stop"
        assert_consistent(done[key])


@pytest.mark.parametrize("several", [False, True])
def test_end_of_text_stops_unless_it_is_ignored(expected, several: bool) -> None:
    row, at = next((r, first_uses(t)[-1]) for r, t in enumerate(expected) if first_uses(t)[-1] > 3)
    end = expected[row][at]
    unsaid = next(t for t in range(3, tiny.VOCAB) if t not in expected[row])
    model = tiny.loaded("llama", eos_token_id=[unsaid, end] if several else end)
    requests = [
        tiny.request(0, PROMPTS[row], ignore_eos=False),
        tiny.request(1, PROMPTS[row], ignore_eos=True),
        tiny.request(2, PROMPTS[row], ignore_eos=True, stop_token_ids=[end]),
    ]
    done = tiny.decode(tiny.engine(model), requests)
    assert done[0].token_ids == done[2].token_ids == expected[row][: at + 1]
    assert done[0].text == text_of(expected[row][:at])
    assert (done[0].finish_reason, done[1].finish_reason) == ("stop", "length")
    assert done[1].token_ids == expected[row]


def stop_strings(tokens: list[int]) -> list[str]:
    """For each place a text that begins inside one token and ends inside the next."""
    words = [text_of([token]) for token in tokens if text_of([token])]
    return [left[-2:] + right[:1] for left, right in itertools.pairwise(words)]


def test_a_stop_string_across_tokens_ends_the_text_before_it(model, expected) -> None:
    cases = [(row, stop) for row, tokens in enumerate(expected) for stop in stop_strings(tokens)]
    requests = [tiny.request(i, PROMPTS[row], stop=[stop]) for i, (row, stop) in enumerate(cases)]
    done = tiny.decode(tiny.engine(model), requests)
    for key, (row, stop) in enumerate(cases):
        tokens = expected[row]
        needed = next(n for n in range(1, LENGTH + 1) if stop in text_of(tokens[:n]))
        assert done[key].token_ids == tokens[:needed], "cut at the token that completes it"
        assert done[key].text == text_of(tokens).partition(stop)[0]
        assert done[key].finish_reason == "stop"
        assert_consistent(done[key])


def test_a_stop_string_inside_an_accepted_path_counts_only_what_came_before(
    model, expected
) -> None:
    tokens, inside = expected[0], 0
    first = text_of(tokens[:1])
    for count in range(2, LENGTH):
        # From the end of the first token to the begin of this one: it comes here and not before.
        stop = text_of(tokens)[len(first) - 1 : len(text_of(tokens[: count - 1])) + 1]
        stopped = alone(model, stop=[stop])
        assert stopped.token_ids == tokens[:count]
        assert (stopped.text, stopped.finish_reason) == (first[:-1], "stop")
        assert_consistent(stopped)
        limited, longer = alone(model, max_tokens=count), alone(model, max_tokens=count + 1)
        assert stopped.acceptance_histogram == limited.acceptance_histogram
        inside += longer.num_spec_steps == stopped.num_spec_steps
    assert inside > 0, "no stop string ended inside an accepted path"


def test_the_earliest_of_several_stop_strings_wins(model, expected) -> None:
    stops = stop_strings(expected[0])
    done = tiny.decode(tiny.engine(model), [tiny.request(0, PROMPTS[0], stop=stops[::-1])])[0]
    text = text_of(expected[0])
    assert done.text == text[: min(text.find(stop) for stop in stops)]


def test_a_stop_string_that_never_comes_changes_nothing(model, expected) -> None:
    done = tiny.decode(tiny.engine(model), [tiny.request(0, PROMPTS[0], stop=["never said"])])[0]
    assert (done.token_ids, done.finish_reason) == (expected[0], "length")
    assert done.text == text_of(expected[0])


def test_requests_that_cannot_run_are_error_completions_and_the_others_run_on(
    model, expected
) -> None:
    sampling = SamplingParams(max_tokens=4)
    bad = {
        "prompt_too_long": Request(key="a", sampling=sampling, prompt_token_ids=[5] * 64, seed=7),
        "invalid_token": Request(key="b", sampling=sampling, prompt_token_ids=[5, tiny.VOCAB]),
        "no_chat_template": Request(
            key="c", sampling=sampling, messages=[{"role": "user", "content": "5"}], sample_index=3
        ),
        "empty_prompt": Request(key="d", sampling=sampling, prompt_token_ids=[]),
        "invalid_token ": Request(key="e", sampling=sampling, prompt="5 -1"),
    }
    good = [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(PROMPTS)]
    mixed = [good[0], *bad.values(), *good[1:]]
    done = tiny.decode(tiny.engine(model, max_model_len=64), mixed)
    assert [done[i].token_ids for i in range(len(good))] == expected
    for code, request in bad.items():
        refused = done[request.key]
        assert (refused.finish_reason, refused.error_code) == ("error", code.strip())
        assert refused.token_ids == [] and refused.text == ""
        assert (refused.seed, refused.sample_index) == (request.seed, request.sample_index)
    assert done["a"].prompt_tokens == 64
    assert "64 tokens" in done["a"].error_message
    assert "--max-model-len" in done["a"].error_message
    assert "chat template" in done["c"].error_message


def test_step_costs_timed_with_a_longer_cache_serve_a_shorter_one(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    tiny.engine(model, max_model_len=256)
    (kept,) = (tmp_path / "costs").iterdir()
    short = tiny.engine(model, max_model_len=48)
    assert [*(tmp_path / "costs").iterdir()] == [kept]
    assert short.budget.plain_seconds(1, 16) > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_longest_text_ends_with_length_at_the_last_position(kind: str) -> None:
    """GPT-2 has a learned embedding for each position and none behind the last."""
    longest = 48
    sizes = {"max_position_embeddings": longest, "n_positions": longest}
    ids = PROMPTS[0][:20]
    wanted = tiny.generate(tiny.network(kind, **sizes), ids, longest - len(ids))
    engine = tiny.engine(tiny.loaded(kind, **sizes), max_model_len=0, page_size=16)
    full = [5] * (longest - 1)
    done = tiny.decode(engine, [
        tiny.request(0, ids, max_tokens=1000), tiny.request(1, full, max_tokens=1000),
        tiny.request(2, [*full, 5], max_tokens=1000),
    ])  # fmt: skip
    assert engine.max_model_len == longest
    assert (done[0].token_ids, done[0].finish_reason) == (wanted, "length")
    assert (done[1].completion_tokens, done[1].finish_reason) == (1, "length")
    assert done[2].error_code == "prompt_too_long"


def test_max_model_len_cuts_output_and_may_be_tiny(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for longest in (4, 9, 30, 33):
        # No costs of another engine: this one's have to be timed in so little room.
        monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / str(longest)))
        ids = PROMPTS[0][: longest - 3]
        done = tiny.decode(
            tiny.engine(model, max_model_len=longest, page_size=16), [tiny.request(0, ids)]
        )[0]
        assert (done.completion_tokens, done.finish_reason) == (3, "length")


def test_an_aborted_request_never_comes_back_and_frees_its_place(model, expected) -> None:
    engine = tiny.engine(model, max_num_seqs=2)
    for key, ids in enumerate(PROMPTS):
        engine.add(tiny.request(key, ids, max_tokens=LENGTH))
    engine.add(Request(key="refused", sampling=SamplingParams(), prompt_token_ids=[]))
    early = engine.step()
    assert [done.key for done in early] == ["refused"]
    engine.add(Request(key="refused", sampling=SamplingParams(), prompt_token_ids=[]))
    assert engine.unfinished == len(PROMPTS) + 1
    engine.abort([0, 5, "refused", "unknown"])  # runs, waits, finished but not yet returned
    assert engine.unfinished == len(PROMPTS) - 2
    done = tiny.decode(engine, [])
    assert sorted(done) == [1, 2, 3, 4, 6, 7]
    assert all(done[key].token_ids == expected[key] for key in done)


def test_requests_may_arrive_while_others_run(model, expected) -> None:
    engine = tiny.engine(model, max_num_seqs=3)
    waiting = [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(PROMPTS)]
    done: dict[int, list[int]] = {}
    while waiting:
        engine.add(waiting.pop(0))
        done.update((c.key, c.token_ids) for c in engine.step())
    assert engine.unfinished == len(PROMPTS) - len(done) > 0
    done.update((key, c.token_ids) for key, c in tiny.decode(engine, []).items())
    assert [done[i] for i in range(len(PROMPTS))] == expected


def test_more_requests_than_slots_wait_their_turn(model, expected) -> None:
    engine = tiny.engine(model, max_num_seqs=1, admission_window=1)
    assert engine.capacity == 1
    order = [3, 0, 7, 5, 1, 2, 6, 4]
    done = tiny.decode(engine, [tiny.request(k, PROMPTS[k], max_tokens=LENGTH) for k in order])
    assert list(done) == order, "first come, first served"
    assert [done[i].token_ids for i in range(len(PROMPTS))] == expected
    waits = [done[key].queued_s for key in order]
    assert waits == sorted(waits) and waits[0] >= 0


def test_step_returns_each_request_once_and_unfinished_counts_what_is_owed(model) -> None:
    engine = tiny.engine(model, max_num_seqs=2)
    assert (engine.unfinished, engine.step()) == (0, [])
    for key, ids in enumerate(PROMPTS):
        engine.add(tiny.request(key, ids, max_tokens=1 + 5 * (key % 3)))
    seen: list[int] = []
    for _ in range(200):
        owed = engine.unfinished
        assert owed == len(PROMPTS) - len(seen)
        if not owed:
            break
        seen += [done.key for done in engine.step()]
    assert sorted(seen) == list(range(len(PROMPTS)))
    assert (engine.unfinished, engine.step()) == (0, [])


@pytest.mark.parametrize("chunk", [1, 3, 8, 50])
def test_the_size_of_prefill_pieces_changes_no_token(model, expected, chunk: int) -> None:
    assert decode_prompts(model, prefill_chunk=chunk) == expected


@pytest.mark.parametrize("size", [0, 1, 2, 5, 81])
def test_the_size_of_the_tree_changes_no_token(model, expected, size: int) -> None:
    assert decode_prompts(model, tree_size=size) == expected


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_scattered_pages_change_no_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.network(kind)
    expected = [tiny.generate(network, ids, LENGTH) for ids in PROMPTS]
    take = PagePool.take
    monkeypatch.setattr(PagePool, "take", lambda *args, **kw: take(*args, **kw)[::-1])
    model = from_network(network, tiny.NumberTokenizer(), name=kind)
    assert decode_prompts(model, page_size=4, prefill_chunk=16) == expected


def test_a_request_that_no_run_of_free_pages_holds_gets_several(
    expected,
) -> None:
    # A model this long that the cache holds less than eight of its longest texts.
    model = tiny.loaded("llama", max_position_embeddings=4096)
    engine = tiny.engine(model, max_num_seqs=8, max_model_len=0, admission_window=1)
    for key, size in enumerate([2000, 3900, 2000, 3900, 3900]):
        engine.add(tiny.request(key, PROMPTS[0], max_tokens=size))
    engine.step()
    engine.abort([0, 2])
    row = max(range(len(PROMPTS)), key=lambda r: first_uses(expected[r])[-1])
    at = first_uses(expected[row])[-1]
    assert at > 6
    last = {"max_tokens": 3900, "stop_token_ids": [expected[row][at]]}
    engine.add(tiny.request(5, PROMPTS[row], **last))
    engine.step()
    newest = engine._scheduler.running[-1]
    assert newest.request.key == 5 and newest.room.first is None, "the pool was not fragmented"
    engine.abort([1, 3, 4])
    assert tiny.decode(engine, [])[5].token_ids == expected[row][: at + 1]


def test_without_speculation_nothing_is_drafted(model, expected) -> None:
    engine = tiny.engine(model, speculate=False, tree_size=0)
    requests = [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(PROMPTS)]
    done = tiny.decode(engine, requests)
    assert [done[i].token_ids for i in range(len(PROMPTS))] == expected
    for completion in done.values():
        assert_consistent(completion)
        assert completion.num_draft_tokens == 0
        assert completion.acceptance_histogram == [LENGTH - 1]


def test_samples_of_one_row_differ_and_are_what_each_says_alone(model) -> None:
    def sample(index: int) -> Request:
        return tiny.request(index, PROMPTS[0], seed=11, sample_index=index, temperature=1.0)

    together = tiny.decode(tiny.engine(model), [sample(i) for i in range(6)])
    for index, done in together.items():
        assert (done.sample_index, done.seed) == (index, 11)
        alone = tiny.decode(tiny.engine(model), [sample(index)])[index]
        assert done.token_ids == alone.token_ids
    assert len({tuple(done.token_ids) for done in together.values()}) == 6


def test_every_completion_says_what_plain_decoding_would_have_cost(model) -> None:
    engine = tiny.engine(model)
    lengths = [1, 2, LENGTH]
    done = tiny.decode(
        engine, [tiny.request(i, PROMPTS[i], max_tokens=n) for i, n in enumerate(lengths)]
    )
    for key, length in enumerate(lengths):
        assert done[key].prefill_s > 0
        assert done[key].queued_s >= 0
        assert done[key].prompt_tokens == len(PROMPTS[key])
        assert (done[key].decode_s > 0) == (done[key].baseline_decode_s > 0) == (length > 1)
    stats = engine.stats()
    assert stats["tokens"] == sum(lengths)
    assert 0 < stats["forwards"] <= LENGTH - 1
    assert stats["busy_s"] >= done[2].decode_s + done[2].prefill_s > 0
    assert sum(stats["tree_sizes"].values()) == stats["forwards"]
