"""Finished rows on their way into segments, whatever is in them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from worker_tools import make_job, rows_of

from trbatch.engine.sequence import Completion
from trbatch.publishing import Publisher, Report


def row(place: int, **fields: Any) -> dict[str, Any]:
    return {
        "custom_id": str(place),
        "sample_index": 0,
        "prompt_index": place,
        "text": f"text {place}",
        "finish_reason": "stop",
        "attempts": 1,
        "request_fingerprint": "f",
    } | fields


@pytest.mark.parametrize("value", [2**31, -(2**80), 10**400, "many", [1]], ids=lambda v: str(v)[:9])
def test_a_value_that_fits_no_column_costs_that_value_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    job, told = make_job(tmp_path, 3), []
    publisher = Publisher("w", 60.0, told.append)
    for place in range(3):
        found = row(place, attempts=value) if place == 1 else row(place)
        publisher.add(job.path, job, found, place)
    with caplog.at_level(logging.ERROR, "trbatch"):
        publisher.publish()
    assert [(one["text"], one["attempts"]) for one in rows_of(job)] == [
        ("text 0", 1), ("text 1", None), ("text 2", 1),
    ]  # fmt: skip
    assert told == [0, 1, 2]
    assert not publisher.rows
    assert "attempts" in caplog.text


def test_a_text_that_fits_no_column_makes_an_error_row(tmp_path: Path) -> None:
    job = make_job(tmp_path, 2)
    publisher = Publisher("w", 60.0, lambda owner: None)
    publisher.add(job.path, job, row(0, text="\ud800"), 0)
    publisher.add(job.path, job, row(1), 1)
    publisher.publish()
    bad, good = rows_of(job)
    assert (bad["finish_reason"], bad["error_code"], bad["text"]) == ("error", "unwritable", None)
    assert "text" in bad["error_message"]
    assert good["text"] == "text 1"


def test_what_cannot_be_mended_waits_and_raises_nothing(tmp_path: Path) -> None:
    class Broken:
        def publish(self, *args: Any, **settings: Any) -> str:
            raise ValueError("whatever the rows are")

    publisher = Publisher("w", 60.0, lambda owner: None)
    publisher.add("job", Broken(), row(0), 0)
    publisher.publish()
    assert publisher.failing
    assert publisher.rows == 1


@pytest.fixture
def clock() -> list[float]:
    """What the time is for `report`."""
    return [0.0]


@pytest.fixture
def report(caplog: pytest.LogCaptureFixture, clock: list[float]) -> Report:
    """Of a worker whose lines `caplog` has."""
    caplog.set_level(logging.INFO, logger="trbatch.worker")
    return Report(lambda: clock[0])


def test_the_line_of_a_worker_counts_the_tokens_of_rows_in_flight(
    caplog: pytest.LogCaptureFixture, clock: list[float], report: Report
) -> None:
    def tick(at: float, **engine: int) -> float | None:
        """The tokens a second that the line at this time tells; None: there is none."""
        caplog.clear()
        clock[0] = at
        report.tick(1, 6, engine)
        told = [vars(record)["tokens_per_s"] for record in caplog.records]
        return told[0] if told else None

    assert tick(10.0, tokens=500) is None
    report.count(Completion(key=0, finish_reason="stop", token_ids=[1] * 100))
    assert tick(30.0, tokens=1500) == 50.0
    assert tick(60.0, tokens=2100) == 20.0, "no row has ended since"
    assert "20 tokens/s" in caplog.text
    assert tick(70.0, tokens=2400) is None
    assert tick(80.0, tokens=200) is None, "another engine, which counts from its own start"
    assert tick(90.0, tokens=400) == pytest.approx((300 + 400) / 30, abs=0.05)
    assert tick(120.0, tokens=400) == 0.0, "it stands still"


def test_an_engine_that_counts_no_tokens_is_judged_by_its_rows(
    caplog: pytest.LogCaptureFixture, clock: list[float], report: Report
) -> None:
    report.count(Completion(key=0, finish_reason="stop", token_ids=[1] * 300))
    clock[0] = 30.0
    report.tick(1, 6, {})
    assert "1 rows done, 6 in 1 chunks in flight, 10 tokens/s" in caplog.text
