"""When to try again what fails through no fault of ours: soon at first, then every few seconds."""

from __future__ import annotations

import time

FIRST_S = 0.5
LONGEST_S = 15.0


class Backoff:
    """Tries of one thing that may fail for hours, and the pauses between them."""

    def __init__(self) -> None:
        self.failures = 0  # since it last went well
        self._since = 0.0
        self._next = 0.0

    @property
    def failing(self) -> bool:
        """Whether the last try failed."""
        return self.failures > 0

    @property
    def resting(self) -> bool:
        """Whether it is too early for another try."""
        return self.failing and time.monotonic() < self._next

    @property
    def failing_s(self) -> float:
        """Seconds since the first of the failures; 0.0 if it does not fail."""
        return time.monotonic() - self._since if self.failing else 0.0

    def failed(self) -> float:
        """Note a failure. Returns the seconds until the next try."""
        now = time.monotonic()
        if not self.failing:
            self._since = now
        pause = min(FIRST_S * 2.0**self.failures, LONGEST_S)
        self.failures = min(self.failures + 1, 30)
        self._next = now + pause
        return pause

    def worked(self) -> None:
        """Note that it went well."""
        self.failures = 0
