"""The flag of outputs that go round in circles."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from trbatch.repetition import FEWEST, PASSAGE, is_repetitive

SHORTEST = FEWEST + PASSAGE - 1  # tokens


@given(period=st.integers(1, 24), seed=st.integers(0, 99))
def test_a_loop_is_repetitive_and_what_has_no_loop_is_not(period: int, seed: int) -> None:
    words = random.Random(seed).sample(range(50_000), 400)
    assert is_repetitive((words[:period] * 400)[:200])
    assert not is_repetitive(words)
    assert is_repetitive(words[:60] + (words[60 : 60 + period] * 200)[:150])
    assert not is_repetitive(words[:200] + (words[:period] * 200)[:60])


def test_a_short_text_is_not_judged() -> None:
    assert not is_repetitive([7] * (SHORTEST - 1))
    assert is_repetitive([7] * SHORTEST)
    assert not is_repetitive([])


def test_a_list_whose_lines_begin_alike_is_not_repetitive() -> None:
    lines = [[1, 2, 3, 4, number, 5, 1000 + number, 6] for number in range(100, 140)]
    assert not is_repetitive([token for line in lines for token in line])
