"""When a worker stops: signals, the time it is given after the first, an hour to be gone by."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from trbatch.moments import moment_of

ENGINE_THREAD = "engine"  # its name
SAME_SIGNAL_S = 0.5  # a terminal and a parent may both pass on the same Ctrl-C


class Stops:
    """How often a worker was asked to stop, and what that means now.

    Once: finish what was taken within `grace_s` seconds. Twice, or when these are over: hand it
    back. Three times: leave at once; leases run out by themselves.

    Args:
        grace_s: seconds after the first request.
        until: when to stop as if asked, in the words of `moments.moment_of`; "": never.
    """

    def __init__(self, grace_s: float, until: str = "") -> None:
        self.count = 0
        self.exit_code = 0
        self.asked_at = 0.0  # monotonic
        self._grace_s = grace_s
        self._deadline = float("inf")  # monotonic
        self._until = moment_of(until).timestamp() if until else float("inf")

    def ask(self, number: int) -> None:
        """Somebody asked, by this signal. May be called in a signal's handler."""
        now = time.monotonic()
        if now - self.asked_at < SAME_SIGNAL_S:
            return
        self.asked_at = now
        self.exit_code = 128 + number
        self._begin(now)
        if self.count > 2:
            raise KeyboardInterrupt

    def look(self) -> int:
        """How often it was asked by now, by the clock as well."""
        now = time.monotonic()
        if not self.count and time.time() >= self._until:
            self._begin(now)
        if self.count == 1 and now >= self._deadline:
            self.count = 2
        return self.count

    def _begin(self, now: float) -> None:
        self.count += 1
        if self.count == 1:
            self._deadline = now + self._grace_s


def asking_signals() -> list[signal.Signals]:
    """The signals that ask this process to end: not SIGHUP where it is ignored (`nohup`)."""
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]


@contextlib.contextmanager
def signals_to(ask: Callable[[int], None]) -> Iterator[None]:
    """Give the signals that ask for an end to `ask`, by number.

    In another thread than the main one, do not.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        ask(number)

    before: dict[int, Any] = {n: signal.signal(n, handle) for n in asking_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End this process where the context ends, whichever way, if it is a worker's.

    An engine that is in the middle of something, such as a step or loading, would abort a process
    that ends as Python's usually do: its libraries do not expect to be torn down under a running
    thread. So such a process ends at once, with the exit code or the traceback it would have had.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        code = _code_of(end)
        if not _engine_runs():
            raise
    except BaseException:
        code = 1
        if not _engine_runs():
            raise
        traceback.print_exc()
    if _engine_runs():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _engine_runs() -> bool:
    return any(thread.name == ENGINE_THREAD for thread in threading.enumerate())


def _code_of(end: SystemExit) -> int:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
    return end.code if isinstance(end.code, int) else int(end.code is not None)
