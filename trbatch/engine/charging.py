"""Whose the time is that passes while results are read one step late: steps', or prompts'.

The host works for a step (it starts it, waits for it, writes down what it gave) and, between
steps, for rows that come and go: their admission, their prefill, what becomes of those that have
ended. All of it passes on one clock, and each piece is charged to what it was for. Where the device
is the slower one, the host's other work is hidden behind a step, which takes what the device takes.
"""

from __future__ import annotations


class Charges:
    """Divides the time from reading to reading. All times are seconds of one clock."""

    def __init__(self) -> None:
        self._seen = 0.0  # up to where everything was divided
        self._work = 0.0  # for the step that is read next
        self._owed = 0.0  # for prompts

    def begin(self, now: float) -> None:
        """Nothing was under way up to now: what passed was nobody's."""
        self._seen, self._work, self._owed = now, 0.0, 0.0

    def work(self, now: float) -> None:
        """What passed was for steps."""
        self._work += now - self._seen
        self._seen = now

    def aside(self, now: float) -> None:
        """What passed was for rows that come and go."""
        self._owed += now - self._seen
        self._seen = now

    def step(self, now: float, device_s: float) -> float:
        """A step was read: what it took, of which the device was busy with it for `device_s`."""
        self.work(now)
        # The device was at it while the host did something else, but never for longer than that.
        hidden = min(max(0.0, device_s - self._work), self._owed)
        seconds = self._work + hidden
        self._owed -= hidden
        self._work = 0.0
        return seconds

    def prompts(self, now: float) -> float:
        """The end of some prompts was read: what these took, and rows that came and went before."""
        self.aside(now)
        seconds, self._owed = self._owed, 0.0
        return seconds
