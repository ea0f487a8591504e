"""How far a job is, for people: a live line on a terminal, else a line every half minute.

Everything goes to stderr: stdout is for data.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from trbatch import logs
from trbatch.job_status import JobStatus
from trbatch.masking import mask_text

LINE_S = 30.0  # between lines where there is no terminal


class Reporter(Protocol):
    """Shows one job's progress."""

    def update(self, status: JobStatus) -> None:
        """Show a status; cheap enough to be called at every look."""

    def log(self, line: str, **fields: Any) -> None:
        """Show a line of text that does not disturb the display; JSON has the fields, too."""


@contextmanager
def reporter(console: Console | None = None) -> Iterator[Reporter]:
    """The reporter that fits where stderr goes. Its last word is said when the context ends."""
    if logs.as_json():
        yield _Events()
        return
    console = console or Console(stderr=True, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        with _LiveLine.shown(console) as live:
            yield live
        return
    lines = _Lines(console)
    try:
        yield lines
    finally:
        lines.close()


def describe(status: JobStatus) -> str:
    """A status in one line: rows, tokens/s, acceptance length, time left."""
    return f"{status.progress.rows_done:,}/{status.progress.rows:,} rows{_details(status)}"


def left_of(status: JobStatus) -> str:
    """How long a job will yet take, in a word; "" where that is not known, or it has ended."""
    left = status.progress.seconds_left
    if status.finished or left is None:
        return "overdue" if status.overdue else ""
    return duration(left)


def duration(seconds: float) -> str:
    """Seconds as people write them: `42 s`, `3:05 min`, `2:03:04 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02} h" if hours else f"{minute}:{second:02} min"


def _details(status: JobStatus) -> str:
    progress = status.progress
    parts = []
    if progress.rows_failed:
        parts.append(f"{progress.rows_failed:,} failed")
    if progress.rows_repetitive:
        parts.append(f"{progress.rows_repetitive:,} going round in circles")
    if progress.tokens_per_s:
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.mean_acceptance_length:
        parts.append(f"acceptance length {progress.mean_acceptance_length:.2f}")
    if not status.finished and progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    if status.overdue:
        parts.append("overdue: rows take longer than those before")
    if status.progress.rows_cancelled:
        parts.append(f"{status.progress.rows_cancelled:,} cancelled")
    if status.paused:
        parts.append("paused")
    elif not status.finished and not status.workers:
        parts.append(f"no worker holds {status.model} yet")
    if status.chunks.failed:
        parts.append(f"{status.chunks.failed} chunks failed")
    return "".join(f", {part}" for part in parts)


class _LiveLine:
    def __init__(self, display: Progress) -> None:
        self._display = display
        self._task = display.add_task("", total=None, rows="starting", details="")

    @classmethod
    @contextmanager
    def shown(cls, console: Console) -> Iterator[_LiveLine]:
        columns = (
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[rows]}{task.fields[details]}", markup=False),
        )
        with Progress(*columns, console=console, refresh_per_second=4) as display:
            yield cls(display)

    def update(self, status: JobStatus) -> None:
        progress = status.progress
        self._display.update(
            self._task,
            total=progress.rows,
            completed=progress.rows_done,
            rows=f"{progress.rows_done:,}/{progress.rows:,} rows",
            details=_details(status),
        )

    def log(self, line: str, **fields: Any) -> None:
        self._display.console.print(mask_text(line), markup=False, highlight=False, soft_wrap=True)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_at = float("-inf")
        self._shown = ""
        self._latest: JobStatus | None = None

    def update(self, status: JobStatus) -> None:
        self._latest = status
        if time.monotonic() - self._shown_at >= LINE_S:
            self._show(status)

    def log(self, line: str, **fields: Any) -> None:
        self._console.print(mask_text(line), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._latest is not None and describe(self._latest) != self._shown:
            self._show(self._latest)

    def _show(self, status: JobStatus) -> None:
        self._shown_at = time.monotonic()
        self._shown = describe(status)
        self.log(f"{status.id}: {self._shown}")


class _Events:
    """A line of JSON each time, for `--log-format json`."""

    def __init__(self) -> None:
        self._shown_at = float("-inf")

    def update(self, status: JobStatus) -> None:
        if status.finished or time.monotonic() - self._shown_at >= LINE_S:
            self._shown_at = time.monotonic()
            self.log(
                f"{status.id}: {describe(status)}",
                event="progress",
                job=status.id,
                state=status.state,
                **status.progress.to_dict(),
            )

    def log(self, line: str, **fields: Any) -> None:
        if line.startswith("{") and line.endswith("}"):
            print(line, file=sys.stderr, flush=True)  # a worker's own event
        else:
            logs.note(line, **fields)
