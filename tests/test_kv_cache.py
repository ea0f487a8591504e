"""Pages: never held twice, never lost, adjacent where possible."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch.engine.kv_cache import KVCache, PagePool


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 7)), max_size=60))
def test_pages_are_never_held_twice_and_never_lost(actions) -> None:
    pool, held = PagePool(20), []
    for take, count in actions:
        if take and pool.can_take(count):
            held.append(pool.take(count))
        elif held:
            pool.give_back(held.pop(count % len(held)))
        flat = [page for pages in held for page in pages]
        assert len(flat) == len(set(flat))
        assert all(0 <= page < 20 for page in flat)
        assert pool.free == 20 - len(flat)
    for pages in held:
        pool.give_back(pages)
    assert pool.take(20) == list(range(20)), "all pages are one run again"


def test_the_shortest_run_that_fits_is_taken() -> None:
    pool = PagePool(10)
    first, second, third = pool.take(3), pool.take(1), pool.take(6)
    pool.give_back(first)
    pool.give_back(third)
    assert pool.take(2) == [0, 1]
    assert second == [3]


def test_scattered_pages_still_hold_a_sequence() -> None:
    cache = KVCache(
        [(1, 2)], slots=16, page_size=4, device=torch.device("cpu"), dtype=torch.float32
    )
    rooms = [cache.take_room(4) for _ in range(4)]
    cache.give_back(rooms[0])
    cache.give_back(rooms[2])
    room = cache.take_room(7)
    assert room.first is None
    assert sorted(room.slots.tolist()) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert rooms[1].first == 4


def test_move_reads_all_before_it_writes() -> None:
    cache = KVCache(
        [(1, 1), (1, 1), (2, 3)], slots=8, page_size=4, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    for layer in range(3):
        for part in cache.layer(layer):
            part.copy_(torch.arange(8.0)[None, :, None].expand_as(part))
    cache.move(torch.tensor([2, 3]), torch.tensor([1, 2]))
    for layer in range(3):
        for part in cache.layer(layer):
            assert part[0, :, 0].tolist() == [0, 2, 3, 3, 4, 5, 6, 7]
