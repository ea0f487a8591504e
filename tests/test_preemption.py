"""Pages by need: when none is left the last to come gives way, and goes on later where it was."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch

from trbatch.engine.engine import Engine
from trbatch.engine.kv_cache import KVCache
from trbatch.engine.scheduler import Scheduler
from trbatch.engine.sequence import Completion, Figures, Sequence
from trbatch.engine.step_plain import PlainOperations

PAGE, SIZE, LONGEST = 4, 5, 96
PROMPTS = tiny.repetitive(5, length=19, seed=4) + tiny.prompts(4, seed=5)
LENGTH = 40
on_both_paths = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


def engine(*, on_device: bool, pages: int = 0, kind: str = "llama", **settings: Any) -> Engine:
    """An engine whose cache has so many pages; 0: plenty."""
    values = {
        "max_num_seqs": 6, "page_size": PAGE, "tree_size": SIZE, "max_model_len": LONGEST,
        "admission_window": 1, **settings,
    }  # fmt: skip
    if on_device:
        values |= {"operations": PlainOperations(), "enforce_eager": True}
    one = tiny.engine(tiny.loaded(kind), **values)
    if pages:
        one._cache.pool.take(one._cache.pool.free - pages)
    return one


def requests(**sampling: Any) -> list[Any]:
    fields = {"max_tokens": LENGTH, **sampling}
    return [tiny.request(i, ids, **fields) for i, ids in enumerate(PROMPTS)]


def texts(done: dict[Any, Completion]) -> list[list[int]]:
    return [done[i].token_ids for i in range(len(done))]


def assert_consistent(done: Completion) -> None:
    histogram, decoded = done.acceptance_histogram, done.completion_tokens - 1
    assert sum(histogram) == done.num_spec_steps
    assert sum((i + 1) * count for i, count in enumerate(histogram)) == decoded
    assert done.prefill_s > 0 and done.decode_s > 0 and done.queued_s >= 0


@on_both_paths
@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "apart"])
@pytest.mark.parametrize("size", [1, SIZE])
def test_texts_do_not_show_that_sequences_gave_way(
    on_device: bool, sharing: bool, size: int
) -> None:
    one = engine(on_device=on_device, pages=40, prefix_sharing=sharing, tree_size=size)
    free = one._cache.pool.free
    done = tiny.decode(one, requests())
    network = tiny.network("llama")
    assert texts(done) == [tiny.generate(network, ids, LENGTH) for ids in PROMPTS]
    for completion in done.values():
        assert_consistent(completion)
    assert one.stats()["preemptions"] > 0, "there was room enough"
    assert one._cache.pool.free == free, "pages were lost"


@pytest.mark.parametrize(("kind", "on_device"), [("mistral", True), ("gemma2", False)])
def test_windows_and_caps_survive_a_second_prefill(kind: str, on_device: bool) -> None:
    one = engine(on_device=on_device, pages=38, kind=kind)
    done = tiny.decode(one, requests())
    network = tiny.network(kind)
    assert texts(done) == [tiny.generate(network, ids, LENGTH) for ids in PROMPTS]
    assert one.stats()["preemptions"] > 0


@on_both_paths
def test_rows_that_the_host_chooses_for_go_on_with_the_same_tokens(on_device: bool) -> None:
    """Noise belongs to a row and a position, processors see the whole text."""

    def never_twice(said: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[list(said)] -= 1.0
        return logits

    mixed = [
        tiny.request(
            i, ids, max_tokens=LENGTH, seed=i, temperature=0.9 if i % 3 else 0.0,
            logits_processors=(never_twice,) if i % 2 else (),
        )
        for i, ids in enumerate(PROMPTS)
    ]  # fmt: skip
    tight = engine(on_device=on_device, pages=40)
    found = tiny.decode(tight, mixed)
    assert tight.stats()["preemptions"] > 0
    assert texts(found) == texts(tiny.decode(engine(on_device=False, speculate=False), mixed))


@on_both_paths
def test_stop_strings_are_found_across_the_break(on_device: bool) -> None:
    network = tiny.network("llama")
    wanted = [tiny.generate(network, ids, LENGTH) for ids in PROMPTS]
    stops = [f"{tokens[30]} {tokens[31]} " for tokens in wanted]
    rows = [
        tiny.request(i, ids, max_tokens=LENGTH, stop=[stops[i]]) for i, ids in enumerate(PROMPTS)
    ]
    tight = engine(on_device=on_device, pages=36)
    found = tiny.decode(tight, rows)
    plenty = tiny.decode(engine(on_device=False, speculate=False), rows)
    assert tight.stats()["preemptions"] > 0
    for key in range(len(rows)):
        assert found[key].token_ids == plenty[key].token_ids
        assert found[key].text == plenty[key].text
        assert found[key].finish_reason == plenty[key].finish_reason


@on_both_paths
def test_one_sequence_alone_always_fits(on_device: bool) -> None:
    one = engine(on_device=on_device)
    least = one._cache.pages_for(LONGEST + SIZE)
    one._cache.pool.take(one._cache.pool.free - least)
    rows = [tiny.request(i, PROMPTS[i], max_tokens=1000) for i in range(3)]
    done = tiny.decode(one, rows)
    network = tiny.network("llama")
    for key, completion in done.items():
        ids = PROMPTS[key]
        assert completion.token_ids == tiny.generate(network, ids, LONGEST - len(ids))
        assert completion.finish_reason == "length"


@on_both_paths
def test_who_came_last_gives_way_and_is_the_first_to_come_back(on_device: bool) -> None:
    one = engine(on_device=on_device, pages=30)
    for request in requests():
        one.add(request)
    last: list[int] = []
    gone: list[int] = []
    while one.unfinished:
        one.step()
        running = [int(s.request.key) for s in one._scheduler.running]
        assert running == sorted(running), "nobody overtakes who had to give way"
        gone += [key for key in last if key not in running and key > max(running, default=0)]
        last = running
    assert gone, "nobody gave way"


def test_the_device_knows_the_pages_of_each_step_before_it_is_started() -> None:
    one = engine(on_device=True, pages=60)
    table, most = one._stepper.state.slots.pages, []
    launch = one._stepper.launch

    def checked(members: Any, size: int) -> Any:
        for sequence in members:
            pages, most_tokens = sequence.room.pages, len(sequence.tokens) + sequence.ahead
            most_tokens = min(most_tokens, sequence.prompt_length + LENGTH)
            assert len(pages) >= one._cache.pages_for(most_tokens - 1 + size)
            assert table[sequence.slot, : len(pages)].tolist() == pages
            most.append(len(pages))
        return launch(members, size)

    one._stepper.launch = checked  # type: ignore[method-assign]
    for request in requests():
        one.add(request)
    start = 0
    while one.unfinished:
        one.step()
        start = start or max(most, default=0)
    assert max(most) > start, "nobody grew"


def test_dropped_rows_that_gave_way_never_come_back() -> None:
    one = engine(on_device=True, pages=36)
    for request in requests():
        one.add(request)
    while not one._scheduler._returned:
        one.step()
    key = one._scheduler._returned[0].request.key
    one.abort([key])
    done = tiny.decode(one, [])
    assert key not in done
    network = tiny.network("llama")
    assert all(done[k].token_ids == tiny.generate(network, PROMPTS[k], LENGTH) for k in done)


def sequence(key: int, prompt: int, output: int, *, lagged: bool = True) -> Sequence:
    return Sequence(
        request=tiny.request(key, [5]), tokens=[5] * prompt, prompt_length=prompt,
        max_tokens=output, stop=None, figures=Figures(), lagged=lagged,
    )  # fmt: skip


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("most_tokens", [0, 12])  # of a step: five rows get two each
@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize("seed", range(6))
def test_any_mix_of_lengths_comes_to_its_end(
    adjacent: bool, most_tokens: int, window: int, seed: int
) -> None:
    rng = random.Random(seed)
    cache = KVCache(
        [(1, 1)], slots=PAGE * 26, page_size=PAGE, device=torch.device("cpu"),
        dtype=torch.float32, adjacent=adjacent,
    )  # fmt: skip
    scheduler = Scheduler(cache, slots=5, spare=SIZE, window=window, most_tokens=most_tokens)
    rows = [
        sequence(i, rng.randint(1, 40), rng.randint(1, 50), lagged=rng.random() < 0.7)
        for i in range(30)
    ]
    for one in rows:
        scheduler.add(one)
    ended, came = [], []
    for _ in range(5000):
        if not len(scheduler):
            break
        while (first := scheduler.next()) is not None:
            scheduler.admit(first)
            assert scheduler._reserve() <= scheduler._most_reserve()
            if first.request.key not in came:
                came.append(first.request.key)
        assert scheduler.running, "nobody runs and nobody can"
        for one in scheduler.running:
            one.cached = one.cached if rng.random() < 0.3 else one.goal  # some still read
        size = largest_of(scheduler, most_tokens)
        for one in list(scheduler.running):
            while one.decodes and not scheduler.grow(one, size):
                assert len(scheduler.running) > 1
                scheduler.preempt(scheduler.running[-1])
        assert scheduler._reserve() <= scheduler._most_reserve()
        held = [page for one in scheduler.running for page in one.room.pages]
        assert len(held) == len(set(held)) == 26 - cache.pool.free
        for one in scheduler.decoding():
            step = size if one.lagged else SIZE
            assert one.room.capacity >= len(one.tokens) - 1 + step
            more = min(rng.randint(1, step), one.max_tokens - one.generated)
            one.tokens += [5] * more
            if one.generated == one.max_tokens:
                scheduler.retire(one)
                ended.append(one.request.key)
    assert sorted(ended) == list(range(30))
    assert cache.pool.free == 26
    late = [place - key for place, key in enumerate(came)]
    assert max(late) < window, "somebody was let in too late"
    if window == 1:
        assert came == list(range(30))
    else:
        assert came != list(range(30))


def largest_of(scheduler: Scheduler, most_tokens: int) -> int:
    """Tokens of each in the largest step that those make that are read late."""
    late = sum(one.lagged for one in scheduler.decoding())
    return max(1, min(SIZE, most_tokens // max(1, late))) if most_tokens else SIZE


def test_nobody_gives_way_for_tokens_that_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """After what was under way has been read, it is known how many did."""
    one, refused = engine(on_device=True, pages=40), []
    grow = Scheduler.grow

    def watched(self: Scheduler, sequence: Sequence, size: int) -> bool:
        assert size == SIZE
        fits = grow(self, sequence, size)
        if not fits:
            refused.append(sequence.in_flight)
        return fits

    monkeypatch.setattr(Scheduler, "grow", watched)
    tiny.decode(one, requests())
    assert max(refused) > 0, "nothing was under way when pages ran out"
