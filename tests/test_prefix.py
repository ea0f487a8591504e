"""Prompts that begin alike: run once, and nobody can tell from what comes out."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import tiny
import torch

from trbatch.engine.engine import Engine
from trbatch.engine.sequence import Completion
from trbatch.engine.step_plain import PlainOperations

PAGE = 8
COMMON = [*tiny.repetitive(1, length=2 * PAGE + 5, seed=3)[0], *range(30, 30 + 2 * PAGE + 3)]
TAILS = [*tiny.repetitive(3, length=13, seed=4), *tiny.prompts(3, seed=5, longest=9)]
PROMPTS = [COMMON + tail for tail in TAILS]
SHARED = len(COMMON)  # whole pages
LENGTH = 16


def engine(kind: str = "llama", *, on_device: bool = False, **settings: Any) -> Engine:
    values = {"max_num_seqs": 1, "page_size": PAGE, "tree_size": 9, **settings}
    if on_device:
        values |= {"operations": PlainOperations(), "enforce_eager": True}
    return tiny.engine(tiny.loaded(kind), **values)


def requests(prompts: list[list[int]] = PROMPTS, **sampling: Any) -> list[Any]:
    fields = {"max_tokens": LENGTH, **sampling}
    return [tiny.request(i, ids, **fields) for i, ids in enumerate(prompts)]


def outputs(done: dict[Any, Completion]) -> list[tuple[list[int], list[int], int]]:
    """What must not depend on sharing: the texts, and how they were drafted."""
    kept = [done[key] for key in sorted(done)]
    return [(c.token_ids, c.acceptance_histogram, c.num_draft_tokens) for c in kept]


on_both_paths = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


@on_both_paths
@pytest.mark.parametrize("size", [1, 3, 9])
def test_texts_and_drafts_are_those_of_an_engine_without_sharing(
    on_device: bool, size: int
) -> None:
    found = []
    for sharing in (True, False):
        one = engine(on_device=on_device, tree_size=size, prefix_sharing=sharing)
        found.append(outputs(tiny.decode(one, requests())))
        hits = one.stats()["prefix_hit_tokens"]
        assert hits == (SHARED * (len(PROMPTS) - 1) if sharing else 0)
    assert found[0] == found[1]
    network = tiny.network("llama")
    assert [text for text, _, _ in found[0]] == [
        tiny.generate(network, ids, LENGTH) for ids in PROMPTS
    ]


@pytest.mark.parametrize(
    ("kind", "on_device"),
    [("mistral", True), ("gemma2", False), ("gemma3_text", True), ("gpt2", False),
     ("qwen3_moe", False), ("phi3", True)],
)  # fmt: skip
def test_shared_pages_serve_every_architecture(kind: str, on_device: bool) -> None:
    network = tiny.network(kind)
    one = engine(kind, on_device=on_device, max_num_seqs=3)
    done = tiny.decode(one, requests())
    assert [done[i].token_ids for i in range(len(PROMPTS))] == [
        tiny.generate(network, ids, LENGTH) for ids in PROMPTS
    ]
    assert one.stats()["prefix_hit_tokens"] == SHARED * (len(PROMPTS) - 1)


@on_both_paths
@pytest.mark.parametrize("chunk", [7, 44, 512])
def test_prompts_that_begin_together_run_their_common_part_once(
    on_device: bool, chunk: int
) -> None:
    one = engine(on_device=on_device, max_num_seqs=6, prefill_chunk=chunk)
    done = tiny.decode(one, requests())
    network = tiny.network("llama")
    assert [done[i].token_ids for i in range(len(PROMPTS))] == [
        tiny.generate(network, ids, LENGTH) for ids in PROMPTS
    ]
    hits = one.stats()["prefix_hit_tokens"]
    if chunk >= PAGE:
        assert hits == SHARED * (len(PROMPTS) - 1)
    else:
        assert hits > 0


def test_the_first_step_learns_what_a_sharing_prompt_has_not_run() -> None:
    """A hit must not leave a sequence without the own rows of its beginning."""
    one = engine(max_num_seqs=2, recycle_prompts=True)
    tiny.decode(one, requests(PROMPTS[:1]))
    one.add(tiny.request(7, PROMPTS[1], max_tokens=LENGTH))
    one._admit()
    (sequence,) = one._scheduler.running
    one._prefiller.run([sequence], 512)
    assert one.stats()["prefix_hit_tokens"] == SHARED
    alone = engine(max_num_seqs=2, prefix_sharing=False)
    alone.add(tiny.request(7, PROMPTS[1], max_tokens=LENGTH))
    alone._admit()
    (other,) = alone._scheduler.running
    alone._prefiller.run([other], 512)
    mine, others = one._matrix, alone._matrix
    written = others.keys[other.slot] >= 0
    assert torch.equal(mine.keys[sequence.slot], others.keys[other.slot])
    assert torch.equal(mine.rows[sequence.slot][written], others.rows[other.slot][written])
    assert written.sum() > SHARED


def test_a_page_is_known_with_all_that_stands_before_it() -> None:
    other = [*reversed(COMMON[:PAGE]), *COMMON[PAGE:]]
    one = engine()
    tiny.decode(one, requests([COMMON + TAILS[0], other + TAILS[1]]))
    assert one.stats()["prefix_hit_tokens"] == 0


@on_both_paths
def test_the_last_token_of_a_prompt_is_always_run(on_device: bool) -> None:
    prompt = COMMON[: 4 * PAGE]
    one = engine(on_device=on_device)
    done = tiny.decode(one, requests([prompt, prompt, prompt]))
    assert one.stats()["prefix_hit_tokens"] == 2 * 3 * PAGE
    assert len({tuple(c.token_ids) for c in done.values()}) == 1


def test_sequences_hold_the_same_pages_on_a_device() -> None:
    one = engine(on_device=True, max_num_seqs=3)
    for request in requests(PROMPTS[:3]):
        one.add(request)
    for _ in range(4):
        one.step()
    rooms = [sequence.room.pages for sequence in one._scheduler.running]
    assert len(rooms) == 3
    shared = SHARED // PAGE
    assert rooms[0][:shared] == rooms[1][:shared] == rooms[2][:shared]
    rest = [page for room in rooms for page in room[shared:]]
    assert len(set(rest)) == len(rest) and not set(rest) & set(rooms[0][:shared])
    slots = one._stepper.state.slots
    for sequence in one._scheduler.running:
        found = slots.pages[sequence.slot][: len(sequence.room.pages)].tolist()
        assert found == sequence.room.pages


@on_both_paths
def test_known_pages_make_room_for_others(on_device: bool) -> None:
    """More prompts than pages, and the same ones again when theirs are long gone."""
    prompts = [p * 9 for p in tiny.prompts(12, seed=8, longest=7)]
    one = engine(on_device=on_device, max_num_seqs=2, max_model_len=96)
    # Little more than two rooms, so that pages have to go.
    spare = one._cache.pool.free - 2 * one._cache.pages_for(96 + 9) - 3
    held = one._cache.pool.take(max(0, spare))
    free = one._cache.pool.free
    network = tiny.network("llama")
    wanted = [tiny.generate(network, ids, LENGTH) for ids in prompts]
    for _ in range(2):
        done = tiny.decode(one, requests(prompts))
        assert [done[i].token_ids for i in range(len(prompts))] == wanted
    assert one._cache.pool.free == free, "pages were lost"
    one.forget()
    one._cache.pool.give_back(held)
    assert one._cache.pool.take(free), "all can be had"


@on_both_paths
def test_dropped_prompts_leave_what_they_have_run(on_device: bool) -> None:
    one = engine(on_device=on_device, max_num_seqs=2, prefill_chunk=16)
    for request in requests(PROMPTS[:2]):
        one.add(request)
    one.step()
    one.abort([0, 1])
    done = tiny.decode(one, requests([PROMPTS[2]]))
    assert one.stats()["prefix_hit_tokens"] >= 16
    assert done[0].token_ids == tiny.generate(tiny.network("llama"), PROMPTS[2], LENGTH)


def test_nothing_is_shared_where_that_is_not_wanted() -> None:
    one = engine(prefix_sharing=False)
    tiny.decode(one, requests([COMMON, COMMON, COMMON]))
    assert one.stats()["prefix_hit_tokens"] == 0
    pool = one._cache.pool
    assert pool.take(pool.free) == list(range(pool.pages)), "nothing is kept"


def test_samples_of_one_row_share_their_prompt_and_differ() -> None:
    rows = [
        tiny.request(i, PROMPTS[0], seed=11, sample_index=i, temperature=1.0, max_tokens=LENGTH)
        for i in range(4)
    ]
    one = engine(on_device=True, max_num_seqs=4)
    found = tiny.decode(one, rows)
    assert one.stats()["prefix_hit_tokens"] == 3 * (len(PROMPTS[0]) - 1)
    wanted = tiny.decode(engine(max_num_seqs=4, prefix_sharing=False), rows)
    assert {k: c.token_ids for k, c in found.items()} == {k: c.token_ids for k, c in wanted.items()}


def test_on_a_host_every_sequence_keeps_one_run_of_pages() -> None:
    """What is known of earlier prompts lies everywhere, and must not be in the way."""
    one = engine(max_num_seqs=4, max_model_len=256, tree_size=5)
    for request in requests([COMMON[:PAGE] + p * 8 for p in tiny.prompts(40, seed=2, longest=7)]):
        one.add(request)
    idle = 0
    while one.unfinished:
        one.step()
        assert all(sequence.room.first is not None for sequence in one._scheduler.running)
        idle = max(idle, len(one._cache.pool._idle))
    assert idle > one._cache.pool.pages // 4, "hardly anything was known"


@pytest.mark.long
def test_kernels_learn_from_shared_pages_what_they_would_have_run() -> None:
    """On a GPU what is kept is written inside of prefills; where there is none, interpreted."""
    pytest.importorskip("triton")
    from trbatch.engine.step_kernels import KernelOperations

    left = []
    for sharing in (True, False):
        operations = KernelOperations()
        operations.captures = operations.captures and tiny.DEVICE != "cpu"
        # One at a time, so that rows are written in one order.
        one = engine(tree_size=3, operations=operations, prefix_sharing=sharing, max_num_seqs=1)
        done = tiny.decode(one, requests(PROMPTS[:2], max_tokens=3))
        assert one.stats()["prefix_hit_tokens"] == (SHARED if sharing else 0)
        left.append((outputs(done), one._matrix))
    assert left[0][0] == left[1][0]
    mine, others = left[0][1], left[1][1]
    for name in ("shared", "pair_keys", "keys"):
        assert torch.equal(getattr(mine, name), getattr(others, name)), name
    # A place without a key keeps what timing steps once wrote there.
    written = mine.pair_keys >= 0
    assert written.sum() >= len(set(itertools.pairwise(COMMON)))
    assert torch.equal(mine.pair_rows[written], others.pair_rows[written])


def test_who_has_ended_is_kept_by_nobody() -> None:
    one = tiny.engine(tiny.loaded())
    for at, ids in enumerate(tiny.prompts(12, seed=8)):
        one.add(tiny.request(at, ids, max_tokens=4))
    began = weakref.WeakSet()
    while one.unfinished:
        one.step()
        began.update(one._scheduler.running)
    gc.collect()
    assert not began
