"""Several samples of a row: one prefill, shared pages, four texts, always the same four."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny

from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Request
from trbatch.engine.step_plain import PlainOperations

PAGE = 8
SAMPLES = 4
PROMPTS = [ids + [3 + i % 90] * 9 for i, ids in enumerate(tiny.prompts(100, seed=2, longest=48))]


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


def whole_pages(prompts: list[list[int]]) -> int:
    """Tokens of pages that are full before the last token, which each sample runs for itself."""
    return sum((len(ids) - 1) // PAGE * PAGE for ids in prompts)


@pytest.mark.parametrize(
    "on_device",
    [pytest.param(False, id="host", marks=pytest.mark.long), pytest.param(True, id="device")],
)
def test_four_samples_of_a_hundred_prompts_take_one_prefill_each(on_device: bool) -> None:
    one = engine(on_device=on_device, max_num_seqs=32, max_model_len=128, speculate=False)
    done = tiny.decode(one, requests(PROMPTS))
    hits = one.stats()["prefix_hit_tokens"]
    assert hits == (SAMPLES - 1) * whole_pages(PROMPTS)
    rows = [
        {tuple(done[row * SAMPLES + sample].token_ids) for sample in range(SAMPLES)}
        for row in range(len(PROMPTS))
    ]
    assert all(len(texts) == SAMPLES for texts in rows)
    few = {key: done[key] for key in range(4 * SAMPLES)}
    for settings in ({"max_num_seqs": 3}, {"max_num_seqs": 5, "prefix_sharing": False}):
        again = tiny.decode(engine(on_device=on_device, **settings), requests(PROMPTS[:4]))
        assert {k: again[k].token_ids for k in again} == {k: few[k].token_ids for k in few}


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


def test_short_prompts_too_are_run_by_the_first_of_their_samples() -> None:
    """One page is enough to wait for; what is shorter is run by all."""
    prompts = [[*range(3, 3 + PAGE), 9, 9], [5, 6, 7]]
    one = engine(on_device=True, max_num_seqs=8)
    tiny.decode(one, requests(prompts))
    assert one.stats()["prefix_hit_tokens"] == (SAMPLES - 1) * PAGE
