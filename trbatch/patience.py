"""Breaks between tries of something that fails through the machine's fault, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable

from trbatch.errors import Unreachable

PATIENCE_S = 120.0
LONGEST_BREAK_S = 15.0
FIRST_BREAK_S = 0.5


class Patience:
    """One thing that may fail for a while: a storage, a folder on it.

    Args:
        what: that it is, for the error.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._since: float | None = None
        self._last = 0.0
        self._failures = 0

    @property
    def failing(self) -> bool:
        """Whether the last try failed."""
        return self._since is not None

    @property
    def due(self) -> bool:
        """Whether the break after the last failure is over."""
        break_s = min(FIRST_BREAK_S * 2 ** min(self._failures, 10), LONGEST_BREAK_S)
        return self._since is None or self._clock() - self._last >= break_s

    def worked(self) -> None:
        """The last try went well."""
        self._since, self._failures = None, 0

    def failed(self, error: Exception) -> None:
        """The last try failed.

        Raises:
            Unreachable: so did all others, for minutes.
        """
        self._last = self._clock()
        self._since = self._last if self._since is None else self._since
        self._failures += 1
        if self._last - self._since > PATIENCE_S:
            raise Unreachable(f"{self._what} keeps failing: {error}") from error
