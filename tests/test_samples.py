"""Several samples of a row: one prefill, shared pages, four texts, always the same four."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import tiny
import torch

from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Request
from trbatch.engine.step_plain import PlainOperations

PAGE = 8
SAMPLES = 4
PROMPTS = [ids + [3 + i % 90] * 9 for i, ids in enumerate(tiny.prompts(50, seed=2, longest=48))]


@functools.cache
def model() -> LoadedModel:
    return tiny.loaded("llama")


def engine(*, on_device: bool = False, **settings: Any) -> Engine:
    if on_device:
        settings |= {"operations": PlainOperations(), "enforce_eager": True}
    return tiny.engine(model(), page_size=PAGE, tree_size=4, **settings)


def requests(prompts: list[list[int]], *, max_tokens: int = 4) -> list[Request]:
    """What a job asks the engine for: the samples of a row one after the other."""
    found = []
    for row, ids in enumerate(prompts):
        for sample in range(SAMPLES):
            request = tiny.request(
                row * SAMPLES + sample, ids, temperature=1.8, max_tokens=max_tokens, seed=row,
                sample_index=sample,
            )  # fmt: skip
            object.__setattr__(request, "order", row)
            found.append(request)
    return found


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_four_samples_of_many_prompts_take_one_prefill_each(on_device: bool) -> None:
    # Nothing is captured: what is under way is read before a capture, so that rows end a step
    # sooner than they would, and their last samples come when all others have ended.
    once = {"max_num_seqs": 32, "max_model_len": 128, "speculate": False, "enforce_eager": True}
    one = engine(on_device=on_device, **once)
    done = tiny.decode(one, requests(PROMPTS))
    # Each prompt was run once, and its last token by each further sample, for its logits. Whoever
    # comes when all others of its row have ended runs what does not fill a page, too.
    hits = one.stats()["prefix_hit_tokens"]
    shared = (SAMPLES - 1) * sum(len(ids) - 1 for ids in PROMPTS)
    assert shared - PAGE < hits <= shared
    texts_of_rows = [
        {tuple(done[row * SAMPLES + sample].token_ids) for sample in range(SAMPLES)}
        for row in range(len(PROMPTS))
    ]
    assert all(len(texts) == SAMPLES for texts in texts_of_rows)
    for settings, rows in (
        ({"max_num_seqs": 32}, len(PROMPTS)),  # the same again
        ({"max_num_seqs": 12}, 20),
        ({"max_num_seqs": 3}, 4),
        ({"max_num_seqs": 5, "prefix_sharing": False}, 4),
    ):
        again = tiny.decode(engine(on_device=on_device, **settings), requests(PROMPTS[:rows]))
        assert len(again) == rows * SAMPLES
        assert all(again[key].token_ids == done[key].token_ids for key in again), settings


def test_samples_hold_the_same_pages_as_long_as_they_run() -> None:
    prompts = PROMPTS[:2]
    one = engine(on_device=True, max_num_seqs=2 * SAMPLES, prefill_chunk=64)
    for request in requests(prompts, max_tokens=20):
        one.add(request)
    while any(s.in_flight == 0 and not s.generated for s in one._scheduler.running) or (
        not one._scheduler.running
    ):
        one.step()
    running = one._scheduler.running
    assert len(running) == 2 * SAMPLES
    for row, ids in enumerate(prompts):
        shared = (len(ids) - 1) // PAGE
        heads = {tuple(s.room.pages[:shared]) for s in running if s.request.order == row}
        tails = [page for s in running if s.request.order == row for page in s.room.pages[shared:]]
        assert shared > 0 and len(heads) == 1, "each sample has pages of its own"
        assert len(set(tails)) == len(tails), "samples write to each other's pages"
    while one.unfinished:
        one.step()


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_prompts_of_any_length_say_what_they_say_alone(on_device: bool) -> None:
    """Shorter than a page, just a page, one token; prefilled in pieces."""
    prompts = [[5, 6, 7] * 20, [*range(3, 3 + PAGE)], [*range(3, 4 + PAGE)], [5, 6, 5], [8]]
    found = []
    for sharing in (True, False):
        one = engine(on_device=on_device, max_num_seqs=9, prefix_sharing=sharing, prefill_chunk=16)
        done = tiny.decode(one, requests(prompts, max_tokens=9))
        found.append([done[key].token_ids for key in sorted(done)])
        again = (SAMPLES - 1) * sum(len(ids) - 1 for ids in prompts)
        assert one.stats()["prefix_hit_tokens"] == (again if sharing else 0)
    assert found[0] == found[1]


def test_a_sample_that_ran_one_token_has_learned_the_whole_prompt() -> None:
    prompt = [[*range(3, 3 + 2 * PAGE + 5)]]
    running = []
    for sharing in (True, False):
        one = engine(max_num_seqs=SAMPLES, prefix_sharing=sharing)
        for request in requests(prompt):
            one.add(request)
        one._admit()
        calls = 0
        while waiting := one._scheduler.prefilling():
            one._prefiller.run(waiting, 512)
            calls += 1
        assert calls == (2 if sharing else 1)  # the first of them, then all others
        running.append((one._matrix, one._scheduler.running))
    (mine, ours), (others, theirs) = running
    assert len(ours) == len(theirs) == SAMPLES
    for sequence, other in zip(ours, theirs, strict=True):
        assert sequence.request.sample_index == other.request.sample_index
        written = others.keys[other.slot] >= 0
        assert written.sum() > 2 * PAGE
        assert torch.equal(mine.keys[sequence.slot], others.keys[other.slot])
        assert torch.equal(mine.rows[sequence.slot][written], others.rows[other.slot][written])


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_tail_is_not_taken_from_one_that_was_dropped(on_device: bool) -> None:
    """Nor from one that had to give way: their pages are somebody else's by then."""
    ids = [3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3]
    (first, second, *_) = requests([ids], max_tokens=20)
    for leave in ("abort", "preempt"):
        one = engine(on_device=on_device, max_num_seqs=2)
        one.add(first)
        one.step()
        (running,) = one._scheduler.running
        assert list(one._prefixes._whole.values()) == [running] and running.decodes
        if leave == "abort":
            one.abort([first.key])
        else:
            one._drain()  # as whoever lets somebody give way does
            one._preempt(running)
        assert not running.decodes
        one.add(second)
        one._admit()
        *_, other = one._scheduler.running
        one._prefixes.share(other)
        assert other.cached == PAGE


def test_a_tail_is_not_taken_from_one_that_has_ended() -> None:
    """Its pages may be somebody else's by then; whole pages are still known."""
    ids = [3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3]
    one = engine(max_num_seqs=1)
    (first, second, *_) = requests([ids])
    done = tiny.decode(one, [first])
    gc.collect()
    assert not one._prefixes._whole
    done |= tiny.decode(one, [second])
    assert one.stats()["prefix_hit_tokens"] == PAGE
    alone = tiny.decode(engine(max_num_seqs=1, prefix_sharing=False), [second])
    assert done[1].token_ids == alone[1].token_ids
