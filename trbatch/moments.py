"""Spans and points in time as people write them: `8h`, `30d`, `07:00`, `2026-11-22T07:00`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from trbatch.errors import UsageError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(?:\d+(?:\.\d+)?[smhdw])+")
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")
_LONGEST_S = 100 * 366 * 86400.0


def seconds_of(text: str) -> float:
    """The length of a span in seconds: `90s`, `30m`, `1h30m`, `30d`, `2w`.

    Raises:
        UsageError: it is none, or longer than a hundred years.
    """
    if not _SPAN.fullmatch(text.strip()):
        raise UsageError(f"{text!r} is no span of time", hint="write e.g. 90s, 30m, 8h, 1h30m, 30d")
    seconds = sum(float(count) * _UNITS[unit] for count, unit in _PART.findall(text))
    if seconds > _LONGEST_S:
        raise UsageError(f"{text} is longer than a hundred years")
    return seconds


def moment_of(text: str, now: datetime | None = None) -> datetime:
    """The point in time that a text means, in UTC.

    A span counts from now; a clock time like `07:00` is its next occurrence in the local time zone;
    a date with a time is in the local zone unless it names another.

    Args:
        now: what counts as now, with a time zone; the present if None.

    Raises:
        UsageError: it is none of these.
    """
    now = now or datetime.now(UTC)
    given = text.strip()
    if _SPAN.fullmatch(given):
        return now + timedelta(seconds=seconds_of(given))
    if clock := _CLOCK.fullmatch(given):
        return _next(now, int(clock[1]), int(clock[2]))
    try:
        found = datetime.fromisoformat(given)
        return found.astimezone(UTC)  # takes a time without a zone as local
    except (ValueError, OverflowError):
        raise UsageError(
            f"{text!r} is no point in time",
            hint="write a span (8h, 30m), a clock time (07:00) or a date (2026-11-22T07:00)",
        ) from None


def _next(now: datetime, hour: int, minute: int) -> datetime:
    """The next time that local clocks show this, tomorrow's if it is now."""
    today = now.astimezone().replace(hour=hour, minute=minute, second=0, microsecond=0, tzinfo=None)
    for days in (0, 1):
        found = (today + timedelta(days=days)).astimezone(UTC)
        if found > now:
            return found
    return found + timedelta(days=1)  # an hour that the change to summer time left out


def written(moment: float) -> str:
    """A Unix time as people of this time zone read it, to the minute."""
    return datetime.fromtimestamp(moment).astimezone().strftime("%Y-%m-%d %H:%M %Z")
