"""Step costs: timed once, kept, scaled to the machine's pace, and timed anew only for cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from trbatch.config import EngineConfig
from trbatch.engine import sizing
from trbatch.engine.costs import CostTable
from trbatch.engine.model import LoadedModel
from trbatch.engine.step_plain import PlainOperations

on_both_paths = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


class Machine:
    """A clock and a forward in one: what a step takes here is made up, and every step counted."""

    longest = 256

    def __init__(self) -> None:
        self.pace = self.tree = 1.0
        self.disturbed = 0  # so many trees to come take thrice as long
        self.steps = 0
        self.room = 1 << 30  # tokens that all texts of a step may have together

    def fits(self, batch: int, size: int, context: int) -> bool:
        return batch * (context + size) <= self.room

    def __call__(self, batch: int, size: int, context: int) -> float:
        assert self.fits(batch, size, context)
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


def test_what_does_not_fit_is_not_timed_before_it_does(
    machine: Machine, costs: Callable[..., CostTable]
) -> None:
    machine.room = 8 * (machine.longest + 1)
    few = costs()
    assert {batch for batch, _ in few.timed} == {1}, "nothing is known of a batch of plain steps"
    assert few.seconds(8, 16, 256) >= few.seconds(1, 16, 256)
    assert costs().timed == pytest.approx(few.timed)
    machine.room = 8 * (machine.longest + 4)
    more = costs()
    assert sorted(size for batch, size in more.timed if batch == 8) == [1, 2, 3, 4]
    machine.steps, machine.room = 0, 8 * (machine.longest + 1)
    assert costs().timed == pytest.approx(more.timed), "a table of more steps serves as well"
    assert machine.steps == 9, "one step of the whole batch fits, two of one sequence, thrice each"


@on_both_paths
@pytest.mark.parametrize("sizes", [{}, {"tree_size": 8}, {"speculate": False}])
def test_an_engine_starts_and_decodes_with_room_for_one_sequence(
    on_device: bool, sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least that `cache_slots` gives."""

    def least(config: EngineConfig, *_: Any, longest: int, spare: int, **more: Any) -> int:
        one, spare = (-(-tokens // config.page_size) for tokens in (longest, spare))
        return (one + spare) * config.page_size

    monkeypatch.setattr(sizing, "cache_slots", least)
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    settings = {"max_model_len": 40, "page_size": 4, "tree_size": 0, "max_tree_size": 8, **sizes}
    if on_device:
        settings |= {"operations": PlainOperations(), "enforce_eager": True}
    ids = tiny.repetitive(3, length=12)
    for _ in range(2):  # with a table that is kept, too
        one = tiny.engine(tiny.loaded("llama"), max_num_seqs=8, **settings)
        done = tiny.decode(one, [tiny.request(i, p, max_tokens=28) for i, p in enumerate(ids)])
        network = tiny.network("llama")
        assert [done[i].token_ids for i in range(3)] == [
            tiny.generate(network, one, 28) for one in ids
        ]
