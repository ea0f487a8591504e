"""Who is let in when: the longest of a window first, and prompts in pieces beside decoding."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from trbatch.engine.kv_cache import KVCache
from trbatch.engine.scheduler import Scheduler
from trbatch.engine.sequence import Figures, Sequence

LENGTH = 12


def scheduler(*, window: int, slots: int = 1) -> Scheduler:
    cache = KVCache(
        [(1, 1)], slots=4096, page_size=8, device=torch.device("cpu"), dtype=torch.float32
    )
    return Scheduler(cache, slots=slots, spare=1, window=window)


def row(key: int, prompt: int, output: int = 4) -> Sequence:
    return Sequence(
        request=tiny.request(key, [5]), tokens=[5] * prompt, prompt_length=prompt,
        max_tokens=output, stop=None, figures=Figures(),
    )  # fmt: skip


def admitted(one: Scheduler) -> list[Any]:
    """The keys in the order in which they are let in, one at a time."""
    keys = []
    while (first := one.next()) is not None:
        one.admit(first)
        keys.append(first.request.key)
        one.retire(first)
    return keys


def test_the_longest_that_waits_goes_first_and_equals_in_their_order() -> None:
    one = scheduler(window=8)
    for key, (prompt, output) in enumerate([(3, 4), (9, 4), (1, 12), (2, 11), (7, 7), (5, 2)]):
        one.add(row(key, prompt, output))
    assert admitted(one) == [4, 1, 2, 3, 0, 5]


def test_a_window_of_one_is_first_come_first_served() -> None:
    one = scheduler(window=1)
    for key in range(9):
        one.add(row(key, 1 + key % 4))
    assert admitted(one) == list(range(9))


@pytest.mark.parametrize("window", [2, 5, 16])
def test_a_short_row_is_let_in_even_if_longer_ones_never_stop_coming(window: int) -> None:
    one = scheduler(window=window)
    one.add(row(0, 1))
    came = []
    for key in range(1, 100):
        one.add(row(key, 50))
        first = one.next()
        one.admit(first)
        came.append(first.request.key)
        one.retire(first)
    assert came.index(0) == window - 1


def test_rows_that_were_dropped_do_not_make_others_wait() -> None:
    one = scheduler(window=4)
    for key in range(50):
        one.add(row(key, 9))
    one.drop(range(50))
    one.add(row(50, 1))
    came = []
    for key in range(51, 70):
        one.add(row(key, 9))
        first = one.next()
        one.admit(first)
        came.append(first.request.key)
        one.retire(first)
    assert came.index(50) == 3


@pytest.mark.parametrize("window", [1, 3, 100])
def test_the_order_changes_no_token(window: int) -> None:
    prompts = tiny.prompts(9, seed=6)
    one = tiny.engine(tiny.loaded("llama"), max_num_seqs=2, admission_window=window)
    done = tiny.decode(
        one, [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(prompts)]
    )
    network = tiny.network("llama")
    assert [done[i].token_ids for i in range(9)] == [
        tiny.generate(network, ids, LENGTH) for ids in prompts
    ]


def test_a_long_prompt_comes_in_pieces_while_others_decode() -> None:
    """Whoever decodes gives tokens in every step, whatever is prefilled beside it."""
    one = tiny.engine(tiny.loaded("llama"), prefill_chunk=16, speculate=False, tree_size=0)
    one.add(tiny.request(0, [5, 6, 7], max_tokens=40))
    one.step()
    one.add(tiny.request(1, list(range(3, 90)) * 2, max_tokens=2))
    (decoding,) = one._scheduler.running
    steps = 0
    while True:
        before = decoding.generated
        done = one.step()
        steps += 1
        if any(completion.key == 1 for completion in done):
            break
        assert decoding.generated == before + 1
    assert steps >= 174 // 16
