"""Spans and points in time as people write them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trbatch.errors import UsageError
from trbatch.moments import moment_of, seconds_of, written

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("8h", 28800), ("1h30m", 5400), ("30d", 2592000), ("0.5d", 43200)],
)
def test_a_span_has_a_length(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds
    assert (moment_of(text, NOW) - NOW).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "30", "h", "-8h", "8 h", "8h30", "200y", "99999d"])
def test_what_is_no_span_is_told_so(text: str) -> None:
    with pytest.raises(UsageError, match=text or "no span"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("07:00", "2026-11-23T06:00:00+00:00"),  # Berlin is an hour ahead in winter
        ("13:01", "2026-11-22T12:01:00+00:00"),
        ("13:00", "2026-11-23T12:00:00+00:00"),  # now is not later
        ("2026-12-24T18:00", "2026-12-24T17:00:00+00:00"),
        ("2026-12-24T18:00Z", "2026-12-24T18:00:00+00:00"),
        ("2026-12-24 18:00+05:00", "2026-12-24T13:00:00+00:00"),
        ("2026-07-01", "2026-06-30T22:00:00+00:00"),
    ],
)
def test_a_moment_is_in_local_time_unless_it_names_a_zone(
    berlin: None, text: str, expected: str
) -> None:
    assert moment_of(text, NOW).isoformat() == expected


def test_a_clock_time_that_summer_time_leaves_out_is_still_in_the_future(berlin: None) -> None:
    night = datetime(2026, 3, 29, 0, 30, tzinfo=UTC)  # 01:30; at 02:00 it becomes 03:00
    assert night < moment_of("02:30", night)
    assert (moment_of("02:30", night) - night).total_seconds() < 25 * 3600


@pytest.mark.parametrize("text", ["", "soon", "25:00", "7", "2026-13-01", "12:60", "8hours"])
def test_what_is_no_moment_is_told_so_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="no point in time") as caught:
        moment_of(text, NOW)
    assert "07:00" in (caught.value.hint or "")


@given(st.text(max_size=30))
def test_any_text_is_a_moment_or_a_usage_error(text: str) -> None:
    try:
        found = moment_of(text)
    except UsageError:
        return
    assert found.tzinfo is not None


def test_a_moment_is_shown_in_local_time(berlin: None) -> None:
    assert written(NOW.timestamp()) == "2026-11-22 13:00 CET"
