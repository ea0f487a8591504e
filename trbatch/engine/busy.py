"""For how long an engine was busy: its host's work, and what its device does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class BusyTime:
    """Counts seconds, each once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._left_at = 0.0  # up to where they are counted

    @contextmanager
    def working(self, *, device_until: float = 0.0) -> Iterator[None]:
        """The host works for the engine in here.

        Args:
            device_until: the clock when the device is through with what is under way, nearly.
                Since the host left the last time, the engine was busy up to then.
        """
        begin = time.perf_counter()
        self.seconds += max(0.0, min(begin, device_until) - self._left_at)
        try:
            yield
        finally:
            self._left_at = time.perf_counter()
            self.seconds += self._left_at - begin
