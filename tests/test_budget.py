"""How many nodes a step gets, and what it is thought to take."""

from __future__ import annotations

import pytest

from trbatch.engine.budget import Budget
from trbatch.engine.costs import CostTable
from trbatch.engine.curve import STEP_SIZES, Curve, prior_tokens


def costs(plain: float, token: float) -> CostTable:
    timed = {(batch, size): plain + token * batch * size for batch in (1, 64) for size in (1, 81)}
    return CostTable(timed, context=256, per_context=0.0)


def test_other_steps_teach_only_where_there_is_nothing_better() -> None:
    def told(budget: Budget, seconds: float, times: int, *, typical: bool) -> float:
        for _ in range(times):
            budget.count(8, 8, 256, seconds, typical=typical)
        return budget.plain_seconds(8, 256)

    budget = Budget(costs(1.0, 0.0), most=81)
    assert told(budget, 2.0, 40, typical=False) == 1.0, "as the table says"
    assert told(budget, 2.0, 5, typical=True) == pytest.approx(2.0)
    assert told(budget, 4.0, 60, typical=False) == pytest.approx(2.0)
    assert told(budget, 4.0, 200, typical=False) == pytest.approx(4.0, rel=0.1), (
        "it has slowed down"
    )
    assert told(budget, 2.0, 200, typical=True) == pytest.approx(2.0, rel=0.1)


def test_what_a_kind_takes_is_not_what_a_disturbed_step_took() -> None:
    """That is its delay, for which nobody can tell what it would have met."""
    budget = Budget(costs(1.0, 0.0), most=81)
    for seconds in (2.0, 2.0, 9.0, 2.0, 9.0, 2.0, 2.0):
        budget.count(8, 8, 256, seconds, typical=True)
        budget.count(64, 8, 256, 3 * seconds, typical=True)
    assert budget.plain_seconds(8, 256) == pytest.approx(2.0)
    assert budget.step_seconds(8, 8.0, 256) == pytest.approx(6.0)
    for _ in range(8):  # and if it goes on, the machine has slowed down
        budget.count(8, 8, 256, 9.0, typical=True)
    assert budget.plain_seconds(8, 256) == pytest.approx(9.0)


@pytest.mark.parametrize("factor", [1.5, 0.6])
def test_a_machine_that_changes_its_pace_does_so_for_steps_that_are_not_made(factor: float) -> None:
    budget = Budget(costs(1.0, 0.0), most=81)
    budget.count(8, 8, 256, 1.0, typical=True)
    for seconds in (1.0, factor):
        for _ in range(200):
            budget.count(64, 8, 256, 2 * seconds, typical=True)
        assert budget.step_seconds(8, 8.0, 256) == pytest.approx(2 * seconds)
        assert budget.plain_seconds(8, 256) == pytest.approx(seconds, rel=0.01)


def test_a_step_that_a_shape_for_more_rows_made_teaches_nothing_of_its_kind() -> None:
    budget = Budget(costs(1.0, 0.0), most=81)
    budget.count(64, 8, 256, 2.0, typical=True)
    for _ in range(200):
        budget.count(64, 8, 256, 5.0, typical=False, lent=True)
        budget.count(64, 8, 256, 5.0, typical=True, lent=True)
    assert budget.step_seconds(8, 8.0, 256) == pytest.approx(2.0)
    assert budget.steps.total() == 401, "they were made all the same"


def test_steps_are_large_where_tokens_are_cheap_and_plain_where_they_are_dear() -> None:
    chosen = {
        (batch, token): Budget(costs(1.0, token), most=81).choose_size(batch, 256)
        for batch in (1, 64)
        for token in (1e-6, 1e-3, 5.0)
    }
    assert chosen[1, 1e-6] == 81 and chosen[1, 5.0] == 1
    assert 1 < chosen[64, 1e-3] < chosen[1, 1e-3]
    assert set(chosen.values()) <= set(STEP_SIZES)


def test_the_size_follows_what_steps_give() -> None:
    budget = Budget(costs(1.0, 0.1), most=81)
    first = budget.choose_size(1, 256)
    for _ in range(600):
        size = budget.choose_size(1, 256)
        budget.count_tokens(size, 1, 1)  # no draft ever comes true
    assert first > 1
    # All but the seldom tries are plain now.
    sizes = [budget.choose_size(1, 256) for _ in range(256)]
    assert sizes.count(1) == 253
    for _ in range(2000):
        size = budget.choose_size(1, 256)
        budget.count_tokens(size, 4 if size > 1 else 1, 1)
    assert [budget.choose_size(1, 256) for _ in range(20)].count(1) <= 3, "it never tried again"


def test_a_size_is_not_changed_for_a_trifle() -> None:
    budget = Budget(costs(1.0, 0.01), most=81)
    before = budget.choose_size(8, 256)
    changes = 0
    for step in range(255):
        tokens = 8 * prior_tokens(before) * (1.02 if step % 2 else 0.98)
        budget.count_tokens(before, round(tokens), 8)
        size = budget.choose_size(8, 256)
        changes += size not in (before, 1)
        before = size if size > 1 else before
    assert changes <= 2


def test_the_curve_goes_over_from_the_prior_to_what_was_counted() -> None:
    curve = Curve()
    assert [curve.expected(size) for size in (1, 5, 81)] == [1.0, 2.4, 4.7]
    for _ in range(3000):
        curve.count(16, 2, 1)
    assert curve.expected(16) == pytest.approx(2.0, abs=0.2)
    assert curve.expected(12) < prior_tokens(12), "neighbours hear of it"
    assert curve.expected(1) == 1.0
