"""For how long an engine counts as busy, by a clock that stands still unless it is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny

from trbatch.engine import busy, intake
from trbatch.engine.step_plain import PlainOperations

PROMPT = tiny.repetitive(6, seed=4)[0]


@pytest.mark.parametrize("under_way", [True, False])
def test_what_the_device_does_between_two_steps_is_time_in_which_the_engine_is_busy(
    under_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(busy, "time", SimpleNamespace(perf_counter=lambda: now))
    engine = tiny.engine(tiny.loaded("llama"), operations=PlainOperations())
    engine.add(tiny.request(0, PROMPT, max_tokens=20))
    for _ in range(3):
        engine.step()
    before = engine.stats()["busy_s"]
    engine._lagged.done_at = now + 0.2 if under_way else now
    now += 0.4
    assert engine._lagged.under_way
    engine.step()  # takes no time by this clock
    busy_s = engine.stats()["busy_s"] - before
    assert busy_s == pytest.approx(0.2 if under_way else 0.0)


def test_what_it_takes_to_take_rows_in_is_time_in_which_the_engine_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0

    def encode(*_: object) -> list[list[int]]:
        nonlocal now
        now += 0.3
        return [PROMPT]

    monkeypatch.setattr(busy, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(intake, "encode_all", encode)
    engine = tiny.engine(tiny.loaded("llama"))
    engine.add(tiny.request(0, PROMPT, max_tokens=20))
    assert engine.stats()["busy_s"] == pytest.approx(0.3)
