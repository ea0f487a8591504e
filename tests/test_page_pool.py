"""Pages that several hold, and pages that nobody holds but whose text is still known."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch.engine.kv_cache import KVCache, PagePool, Room

PAGES = 20
in_both_orders = pytest.mark.parametrize("adjacent", [True, False])
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["take", "know", "hold", "give", "unknow"]), st.integers(0, 1000)),
    max_size=120,
)


@in_both_orders
@settings(max_examples=150, deadline=None)
@given(actions=ACTIONS)
def test_each_page_is_free_held_or_idle_and_none_is_lost(
    adjacent: bool, actions: list[tuple[str, int]]
) -> None:
    known: set[int] = set()
    pool = PagePool(PAGES, adjacent=adjacent, forget=known.remove)
    held: list[list[int]] = []
    for action, number in actions:
        flat = [page for pages in held for page in pages]
        if action == "take" and pool.can_take(1 + number % 6):
            before = set(flat)
            held.append(pool.take(1 + number % 6))
            assert not before & set(held[-1]), "a page that somebody holds was given away"
        elif action == "know" and flat:
            page = flat[number % len(flat)]
            pool.know(page)
            known.add(page)
        elif action == "hold" and known:
            page = sorted(known)[number % len(known)]
            pool.hold([page])
            held.append([page])
        elif action == "give" and held:
            pool.give_back(held.pop(number % len(held)))
        elif action == "unknow" and known:
            page = sorted(known)[number % len(known)]
            known.remove(page)
            pool.unknow(page)
        assert pool.free == PAGES - len({page for pages in held for page in pages})
    for pages in held:
        pool.give_back(pages)
    assert pool.free == PAGES
    assert sorted(pool.take(PAGES)) == list(range(PAGES))
    assert not known, "a page that was given away is known no more"


@in_both_orders
def test_what_was_left_longest_ago_goes_first_and_the_end_of_a_text_before_its_begin(
    adjacent: bool,
) -> None:
    gone: list[int] = []
    pool = PagePool(6, adjacent=adjacent, forget=gone.append)
    old, new = pool.take(2), pool.take(2)
    for page in (*old, *new):
        pool.know(page)
    pool.give_back(old)
    pool.give_back(new)
    pool.hold(old)
    pool.give_back(old)  # now it is the newer one
    assert pool.free == 6
    for _ in range(6):
        pool.take(1)
    assert gone == [new[1], new[0], old[1], old[0]]


def test_a_known_page_is_as_soon_given_away_in_a_large_pool_as_in_a_small_one() -> None:
    def seconds(pages: int) -> float:
        """Of one page, when all are known and left and are taken one after the other."""
        pool = PagePool(pages, adjacent=False)
        held = pool.take(pages)
        for page in held:
            pool.know(page)
        pool.give_back(held)
        begin = time.process_time()
        for _ in range(pages):
            pool.take(1)
        return (time.process_time() - begin) / pages

    few, many = (min(seconds(pages) for _ in range(3)) for pages in (2_000, 64_000))
    assert many < 5 * few, "it takes longer the more were given away before"


def test_free_pages_are_taken_before_known_ones_are_forgotten() -> None:
    gone: list[int] = []
    pool = PagePool(8, forget=gone.append)
    first, _, third = pool.take(2), pool.take(2), pool.take(2)
    for page in (*first, *third):
        pool.know(page)
    pool.give_back(first)
    pool.give_back(third)
    assert pool.take(2) == [6, 7] and gone == []
    assert pool.take(2) == first, "no longer a run of free pages: the oldest known ones"
    assert sorted(gone) == first


def test_a_room_grows_into_its_neighbours_where_these_are_free() -> None:
    pool = PagePool(10)
    pool.take(3)
    assert pool.take(2, behind=4) == [5, 6]
    assert pool.take(2, behind=4) == [3, 4], "they are held by another"


def test_slots_follow_the_pages_of_a_room() -> None:
    cache = KVCache(
        [(1, 2)], slots=32, page_size=4, device=torch.device("cpu"), dtype=torch.float32
    )
    room = cache.room_of([2, 3])
    assert (room.first, room.capacity, room.slots.tolist()) == (8, 8, list(range(8, 16)))
    assert room.put(2, [4]) == [] and room.first == 8 and room.capacity == 12
    assert room.put(0, [7]) == [2]
    assert room.first is None and room.slots[:5].tolist() == [28, 29, 30, 31, 12]
    assert room.cut(1) == [3, 4] and room.first == 28 and room.capacity == 4


def test_a_room_says_which_of_its_pages_are_new() -> None:
    changes: dict[int, Room] = {}
    room = Room([4, 5, 6], 4, torch.device("cpu"))
    room.put(3, [7])
    room.note(changes, 9)
    assert not changes and room.news() == [], "these are known"
    room.put(1, [2])
    room.put(4, [8])
    assert changes == {9: room} and room.news() == [(1, 2), (2, 6), (3, 7), (4, 8)]
    changes.clear()
    assert room.cut(2) == [6, 7, 8]
    assert changes == {9: room} and room.news() == [], "nothing is new where pages are gone"
    room.put(2, [3])
    assert room.news() == [(2, 3)]
