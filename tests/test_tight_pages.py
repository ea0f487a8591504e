"""Each step finds its pages, and nobody else's, however few there are and whatever else happens."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListLike
from typing import Any

import pytest
import tiny
import torch

from trbatch.engine import sizing
from trbatch.engine.costs import CostTable
from trbatch.engine.curve import STEP_SIZES
from trbatch.engine.engine import Engine
from trbatch.engine.kv_cache import KVCache
from trbatch.engine.scheduler import Scheduler
from trbatch.engine.sequence import Figures, Request, Sequence
from trbatch.engine.step_plain import PlainOperations

PAGE, MOST, LONG = 4, 32, 100
COSTS = CostTable(
    {(batch, size): 1.0 for batch in (1, 8) for size in (1, MOST, 64)}, context=1, per_context=0.0
)


@pytest.fixture(autouse=True)
def few_tokens_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, wherever the models run: where eight rows may have the largest trees at once,
    nobody is let in before there is room for these, and nobody has to give way."""
    monkeypatch.setattr(sizing, "most_tokens", lambda loaded: 2 * MOST)


def engine(pages: int, **settings: Any) -> Engine:
    """One whose steps are read late and have trees of any size, on so many pages."""
    one = tiny.engine(
        tiny.loaded("llama"), operations=PlainOperations(), enforce_eager=True, costs=COSTS,
        max_num_seqs=8, max_model_len=160, page_size=PAGE, tree_size=0, max_tree_size=MOST,
        admission_window=1, prefill_chunk=12, **settings,
    )  # fmt: skip
    one._cache.pool.take(one._cache.pool.free - pages)
    return one


def unchanged(said: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits


def choose_large_steps(one: Engine, seed: int) -> None:
    """Any size that the budget may choose, mostly the largest: the real ones go by the clock."""
    rng = random.Random(seed)

    def chosen(batch: int, context: float) -> int:
        room = max(1, min(MOST, one.budget._most_tokens // batch))
        sizes = [size for size in STEP_SIZES if size <= room]
        return sizes[-1] if rng.random() < 0.7 else rng.choice(sizes)

    one.budget.choose_size = chosen  # type: ignore[method-assign]


class Watch:
    """Looks at the pages of each step before it is started."""

    def __init__(self, one: Engine) -> None:
        self.engine, self.steps, self.host_steps = one, 0, 0
        self._launch, self._run = one._stepper.launch, one._eager.run
        one._stepper.launch = self.launch  # type: ignore[method-assign]
        one._eager.run = self.run  # type: ignore[method-assign]

    def launch(self, members: ListLike[Sequence], size: int) -> Any:
        self.steps += 1
        self._check(members, size)
        table = self.engine._stepper.state.slots.pages
        for one in members:
            assert table[one.slot, : len(one.room.pages)].tolist() == one.room.pages
        return self._launch(members, size)

    def run(self, batch: list[Sequence]) -> int:
        self.host_steps += 1
        assert not self.engine._lagged.under_way
        self._check(batch, MOST)
        return self._run(batch)

    def _check(self, members: ListLike[Sequence], size: int) -> None:
        held = [(page, one) for one in self.engine._scheduler.running for page in one.room.pages]
        for one in members:
            first = len(one.tokens) - 1
            end = min(first + one.ahead, one.prompt_length + one.max_tokens - 1) + size
            assert end <= one.room.capacity, "the step writes behind its pages"
            mine = set(one.room.pages[first // PAGE : -(-end // PAGE)])
            others = {page for page, holder in held if holder is not one}
            assert not mine & others, "the step writes into another's pages"


def requests(seed: int, *, hosts: int = 0) -> list[Request]:
    """Two that decode for long, and six long prompts; of these so many are chosen for here."""
    texts = tiny.repetitive(2, length=19, seed=seed)
    shared = tiny.prompts(1, seed=seed + 7, longest=40)[0] * LONG
    for key, text in enumerate(tiny.prompts(6, seed=seed + 50)):
        # Half of them begin alike.
        texts.append(((shared[: LONG // 2] if key % 2 else []) + text * LONG)[:LONG])
    return [
        tiny.request(
            key, text, max_tokens=50 if key < 2 else 8,
            logits_processors=(unchanged,) if key >= 8 - hosts else (),
        )
        for key, text in enumerate(texts)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pages", "sharing", "hosts"),
    [
        (120, True, 0), (120, True, 3), (144, False, 0), (144, False, 3),
        (200, True, 0), (200, True, 8), (208, False, 3), (208, False, 8),
    ],
)  # fmt: skip
def test_each_step_has_all_pages_that_it_writes_to_for_itself(
    pages: int, sharing: bool, hosts: int
) -> None:
    seed = pages + hosts
    one = engine(pages, prefix_sharing=sharing)
    choose_large_steps(one, seed)
    watch, free = Watch(one), one._cache.pool.free
    rows = requests(seed, hosts=hosts)
    done = tiny.decode(one, rows)
    network = tiny.network("llama")
    for row in rows:
        expected = tiny.generate(network, row.prompt_token_ids, row.sampling.max_tokens)
        assert done[row.key].token_ids == expected
    assert (watch.steps > 0) == (hosts < 8) and (watch.host_steps > 0) == (hosts > 0)
    assert one._cache.pool.free == free
    if not hosts:
        assert one.stats()["preemptions"] > 0, "there was room enough"


def test_a_row_that_was_given_room_keeps_it_when_a_later_one_is() -> None:
    """Also where most rows still read their prompts, so that the few that decode take much."""
    cache = KVCache(
        [(1, 1)], slots=PAGE * 120, page_size=PAGE, device=torch.device("cpu"),
        dtype=torch.float32, adjacent=False,
    )  # fmt: skip
    scheduler = Scheduler(cache, slots=8, spare=MOST, most_tokens=64)
    for key in range(8):
        scheduler.add(sequence(key))
        scheduler.admit(scheduler.next())
        cache.pool.give_back(scheduler.running[-1].room.cut(7))
    late, host, last = (scheduler.running[at] for at in (0, 1, -1))
    host.lagged = False
    for one in (late, host):
        one.cached = one.goal
    cache.pool.take(cache.pool.free - 6)
    assert scheduler.grow(late, MOST)
    assert not scheduler.grow(host, MOST), "there was room for both"
    assert scheduler.has_room(late, MOST)
    scheduler.preempt(last)
    assert scheduler.grow(host, MOST)
    assert scheduler.has_room(late, MOST) and scheduler.has_room(host, MOST)


def sequence(key: int) -> Sequence:
    return Sequence(
        request=tiny.request(key, [5]), tokens=[5] * 20, prompt_length=20, max_tokens=100,
        stop=None, figures=Figures(), lagged=True,
    )  # fmt: skip


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_row_that_has_just_ended_gives_its_pages_and_does_not_come_back(on_device: bool) -> None:
    """Such as one that only asked what the model says of its prompt."""
    values = {"operations": PlainOperations(), "enforce_eager": True} if on_device else {}
    one = tiny.engine(
        tiny.loaded("llama"), page_size=PAGE, tree_size=5, prefix_sharing=False, **values
    )
    prompts = tiny.repetitive(2, length=19, seed=4)
    lengths, ask = (40, 1), {"prompt_logprobs": 0, "logprobs": 0}
    one.add(tiny.request(0, prompts[0], max_tokens=lengths[0], **ask))
    while not one._scheduler.decoding():
        one.step()
    (first,), pool = one._scheduler.running, one._cache.pool
    taken: list[int] = []
    prefill = one._prefill

    def tightened(sequences: list[Sequence]) -> None:
        prefill(sequences)
        assert one._scheduler.running[-1].ended, "it said its only token"
        pool.give_back(first.room.cut(one._cache.pages_for(len(first.tokens))))
        taken.extend(pool.take(pool.free))

    one._prefill = tightened  # type: ignore[method-assign]
    one.add(tiny.request(1, prompts[1], max_tokens=lengths[1], **ask))
    done = {completion.key: completion for completion in one.step()}
    pool.give_back(taken)
    done |= tiny.decode(one, [])
    assert one.stats()["preemptions"] == 0
    network = tiny.network("llama")
    for key, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert done[key].token_ids == tiny.generate(network, prompt, length)
