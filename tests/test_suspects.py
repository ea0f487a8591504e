"""Suspects: one bad row among many is found in few crashes, and nobody else is ever condemned."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trbatch.suspects import ALONE, Suspects

Row = tuple[int, int]


def crashes_until_quiet(
    rows: list[Row], bad: set[Row], running: int
) -> tuple[int, frozenset[Row], set[Row]]:
    """Run a chunk as a worker does, `running` rows at a time, dying of each bad row.

    Returns:
        How often it died, which rows are poison, which were done.
    """
    suspects, done, crashes = Suspects(), set[Row](), 0
    while True:
        left = [row for row in rows if row not in done | suspects.poison]
        groups = [[row for row in group if row in left] for group in suspects.groups]
        waves = [*groups, [row for row in left if not any(row in group for group in groups)]]
        batches = [
            wave[i : i + running] for wave in waves for i in range(0, len(wave), running) if wave
        ]
        for batch in batches:
            if bad & set(batch):
                crashes += 1
                # Nothing is ever in the process beside a quarantined chunk.
                suspects = suspects.after_crash(batch, "SIGSEGV", alone=len(batch) == 1)
                break
            done |= set(batch)
        else:
            return crashes, suspects.poison, done


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64, 256])
@pytest.mark.parametrize("running", [1, 4, 64, 1000])
@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
def test_one_bad_row_is_found_within_the_logarithm_of_the_chunk(
    rows: int, running: int, place: float
) -> None:
    chunk = [(i, 0) for i in range(rows)]
    bad = chunk[int(place * (rows - 1))]
    crashes, poison, done = crashes_until_quiet(chunk, {bad}, running)
    assert poison == {bad}
    assert done == set(chunk) - {bad}
    assert crashes <= math.log2(rows) + 4
    assert crashes >= ALONE


@given(st.sets(st.integers(0, 39), max_size=5), st.integers(1, 50))
def test_any_bad_rows_are_found_and_no_good_one_is_condemned(bad: set[int], running: int) -> None:
    chunk = [(i // 2, i % 2) for i in range(40)]
    _, poison, done = crashes_until_quiet(chunk, {chunk[i] for i in bad}, running)
    assert poison == {chunk[i] for i in bad}
    assert done == set(chunk) - poison


def test_a_row_that_ran_beside_another_chunks_rows_was_not_alone() -> None:
    after = Suspects().after_crash([(1, 0)], "SIGSEGV", alone=False)
    assert after.groups == (((1, 0),),)
    assert not after.alone


def test_suspects_that_were_not_running_this_time_stay_suspects() -> None:
    first = Suspects().after_crash([(i, 0) for i in range(4)], "x", alone=False)
    again = first.after_crash([(0, 0), (1, 0)], "x", alone=False)
    assert again.groups == (((0, 0),), ((1, 0),), ((2, 0), (3, 0)))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, unique=True))
def test_the_queue_keeps_suspects_as_they_are(rows: list[Row]) -> None:
    suspects = Suspects().after_crash(rows, "died “so”", alone=len(rows) == 1)
    assert Suspects.from_json(suspects.to_json()) == suspects


@pytest.mark.parametrize(
    "text",
    [
        None, b"", b"nonsense", b"{}", b"[1, 2, 3]", b"[[[1]], [], 0]", b"[[[[1, 2, 3]]], [], 0]",
        b'[[[["a", "b"]]], [], ""]', b"[[], [[1, 2]], 0]", b"[" * 100_000, b" " * (1 << 21),
    ],
)  # fmt: skip
def test_what_is_no_bookkeeping_suspects_nobody(text: bytes | None) -> None:
    assert Suspects.from_json(text) == Suspects()
