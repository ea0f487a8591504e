"""The torture itself: every kind of harm is done in each minute, and a run without harm fails."""

from __future__ import annotations

import random

import pytest
from torture import KINDS, SERVER_AWAY, WORKER_KILLED, Hand, check, deck_of

from trbatch.lease import LEASE_S

FINE = {
    "rows": 504, "rows equal to the undisturbed run": 504, "error rows": 0, "of these poison": 0,
    "receipt": "complete: 504 rows", "exit codes": [143, 143, 143],
    "tracebacks in the workers' logs": 0, "workers that had to be replaced": 3,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_harm_comes_first_and_an_outage_outlasts_a_lease(seed: int) -> None:
    deck = deck_of(random.Random(seed))
    assert deck == deck_of(random.Random(seed))
    assert {deed.kind for deed in deck[: len(KINDS)]} == set(KINDS)
    assert all(deed.seconds > LEASE_S for deed in deck if deed.kind == SERVER_AWAY)
    assert sum(deed.seconds for deed in deck if "server" in deed.kind) < 30


def test_a_run_in_which_a_kind_of_harm_is_missing_fails() -> None:
    check(FINE | dict.fromkeys(KINDS, 1), 60)
    for kind in KINDS:
        with pytest.raises(AssertionError, match=kind):
            check(FINE | dict.fromkeys(KINDS, 1) | {kind: 0}, 60)
    with pytest.raises(AssertionError, match="at least 5 of each"):
        check(FINE | dict.fromkeys(KINDS, 1), 600)


def test_harm_that_finds_nobody_is_tried_again() -> None:
    hand = Hand(random.Random(1), random.Random(1), [], "unix:///nowhere")
    hand.deck = [deed for deed in deck_of(random.Random(1)) if deed.kind == WORKER_KILLED]
    left = len(hand.deck)
    hand.act()
    assert len(hand.deck) == left and not hand.done and hand.owes
    hand.kill_worker = lambda seconds: True
    hand.act()
    assert len(hand.deck) == left - 1 and hand.done == {WORKER_KILLED: 1}
