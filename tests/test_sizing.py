"""Step costs: timed once, kept, scaled to the machine's pace, and timed anew only for cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from trbatch.engine import sizing
from trbatch.engine.costs import CostTable
from trbatch.engine.model import LoadedModel


class Machine:
    """A clock and a forward in one: what a step takes here is made up, and every step counted."""

    longest = 256

    def __init__(self) -> None:
        self.pace = self.tree = 1.0
        self.disturbed = 0  # so many trees to come take thrice as long
        self.steps = 0

    def __call__(self, batch: int, size: int, context: int) -> float:
        self.steps += 1
        seconds = self.pace * (1.0 + batch * size / 10 + batch * context / 10_000)
        if size > 1 and self.disturbed:
            self.disturbed -= 1
            seconds *= 3.0
        return seconds * (self.tree if size > 1 else 1.0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    return found


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny.loaded("llama")


@pytest.fixture
def costs(loaded: LoadedModel, machine: Machine) -> Callable[..., CostTable]:
    def find(**settings: Any) -> CostTable:
        return sizing.step_costs(machine, loaded, 81, 8, **settings)

    return find


def test_steps_are_timed_once_and_that_is_said(
    machine: Machine, costs: Callable[..., CostTable], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="trbatch"):
        first = costs()
        assert [r.message for r in caplog.records] == ["timing steps on this machine, once …"]
        steps, machine.steps = machine.steps, 0
        again = costs()
    assert len(caplog.records) == 1
    assert 0 < machine.steps < steps / 2, "it was looked at, not timed"
    assert again.timed == pytest.approx(first.timed)
    assert again.per_context == pytest.approx(first.per_context)


@pytest.mark.parametrize("pace", [0.2, 3.0])
def test_a_machine_of_another_pace_scales_the_table(
    machine: Machine, costs: Callable[..., CostTable], pace: float, tmp_path: Path
) -> None:
    first, steps = costs(), machine.steps
    (file,) = (tmp_path / "costs").iterdir()
    kept = file.read_bytes()
    machine.pace = pace
    again = costs()
    assert machine.steps < 1.5 * steps
    assert again.timed == pytest.approx({cell: pace * s for cell, s in first.timed.items()})
    assert again.seconds(4, 5, 999) == pytest.approx(pace * first.seconds(4, 5, 999))
    assert file.read_bytes() == kept, "the pace of a moment is not kept"


@pytest.mark.parametrize("settings", [{}, {"fixed": 4}])
def test_a_table_whose_ratios_no_longer_hold_is_timed_anew(
    machine: Machine,
    costs: Callable[..., CostTable],
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, int],
) -> None:
    first = costs(**settings)
    machine.tree = 1.2
    assert costs(**settings).timed[8, 4] == pytest.approx(first.timed[8, 4], rel=0.15)
    machine.tree = 2.0
    with caplog.at_level("INFO", logger="trbatch"):
        again = costs(**settings)
    assert "again" in caplog.text
    assert again.timed[8, 4] == pytest.approx(2 * first.timed[8, 4])
    assert again.timed[8, 1] == pytest.approx(first.timed[8, 1])


def test_what_disturbs_one_look_does_not_make_a_table_untrue(
    machine: Machine, costs: Callable[..., CostTable]
) -> None:
    first, steps = costs(), machine.steps
    machine.disturbed = 6
    again = costs()
    assert machine.disturbed == 0
    assert machine.steps < 1.8 * steps
    assert again.timed == pytest.approx(first.timed)
