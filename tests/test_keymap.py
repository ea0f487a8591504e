"""The compact map of keys says what a dictionary would say, in far less memory."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch import keymap
from trbatch.keymap import KeyMap

KEYS = st.tuples(st.text(max_size=3), st.sampled_from(["a", "b"]), st.integers(0, 2))
ROUNDS = st.lists(st.lists(st.tuples(KEYS, st.integers(0, 9)), max_size=20), max_size=12)


@given(ROUNDS)
@settings(deadline=None)
def test_it_holds_the_smallest_number_of_each_key(
    rounds: list[list[tuple[keymap.Key, int]]],
) -> None:
    found, expected = KeyMap(), dict[keymap.Key, int]()
    for items in rounds:
        found.add(iter(items))
        for key, value in items:
            expected[key] = min(value, expected.get(key, value))
        for key in expected:
            assert found.get(key) == expected[key]
        assert found.get(("absent", "a", 0)) is None
    assert len(found) == len(expected)


def test_many_rounds_and_many_keys_of_a_round_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keymap, "_PENDING", 100)
    items = [((f"r{i}", "f", 0), i) for i in range(5000)]
    random.Random(1).shuffle(items)
    at_once, in_rounds = KeyMap(), KeyMap()
    at_once.add(items)
    for start in range(0, 5000, 37):
        in_rounds.add(items[start : start + 37])
        assert in_rounds.get(items[start][0]) == items[start][1]
    for key, value in items:
        assert at_once.get(key) == in_rounds.get(key) == value
    assert len(at_once) == len(in_rounds) == 5000
    assert len(in_rounds._runs) == 1


def test_two_keys_that_share_a_hash_stay_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two hashes may be shared: here it is, by all keys."""
    monkeypatch.setattr(
        keymap, "hash", lambda value: 7 if type(value) is tuple else hash(value), False
    )
    found = KeyMap()
    for round_ in range(3):
        found.add([((name, "f", 0), 10 * round_ + i) for i, name in enumerate("abc")])
        assert [found.get((name, "f", 0)) for name in "abcd"] == [0, 1, 2, None]
    assert len(found) == 3


def test_a_key_takes_24_bytes() -> None:
    """Resident memory of a fresh process, before and after 400,000 keys."""
    code = """
        from trbatch.keymap import KeyMap
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096
        def fill(found, start, stop):
            for at in range(start, stop, 1000):
                keys = [(f"row-{i}", "0123456789abcdef" * 2, 0) for i in range(at, at + 1000)]
                found.add((key, at + i) for i, key in enumerate(keys))
                assert found.get(keys[7]) == at + 7
        found = KeyMap()
        fill(found, 0, 100_000)
        before = resident()
        fill(found, 100_000, 500_000)
        assert len(found) == 500_000
        print((resident() - before) / 400_000)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    assert float(done.stdout) < 48  # what is free for the allocator's use included
