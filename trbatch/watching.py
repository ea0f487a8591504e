"""`trbatch watch`: jobs and their workers, live on a terminal, else a line now and then.

What is shown is data, so it goes to stdout. A queue that is away for a while ends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import click
import orjson
from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trbatch.config import default_store
from trbatch.earlier_jobs import newest_first
from trbatch.errors import (
    EXIT_OK,
    EXIT_ROWS_FAILED,
    Cancelled,
    Expired,
    JobFailed,
    TrbatchError,
    Unreachable,
)
from trbatch.job import JobFolder
from trbatch.job_handle import Job
from trbatch.job_status import JobStatus
from trbatch.masking import printable
from trbatch.progress import describe, duration, left_of
from trbatch.storage import folder
from trbatch.submission import MARKS
from trbatch.team import Share

LOOK_S = 1.0  # between looks at the jobs
EVERY_S = 30.0  # between lines
BAR = 10  # characters
NO_WORKER = "no worker holds its model; start one with: trbatch worker"


class View(Protocol):
    """Shows jobs."""

    def show(self, statuses: Sequence[JobStatus], trouble: str) -> None:
        """Show how the jobs are; called about once a second. `trouble`: why that may be old."""

    def last(self, statuses: Sequence[JobStatus]) -> None:
        """Show the end."""


def watch(jobs: Sequence[Job], view: View, *, look_s: float = LOOK_S) -> int:
    """Show jobs until all have ended. Returns the exit code of the one that ended worst."""
    found: dict[str, JobStatus] = {}
    left = {job.path: job for job in jobs}
    while True:
        trouble = ""
        for path, job in list(left.items()):
            before = found.get(path)
            try:
                found[path] = status = job.status()
            except Unreachable as error:
                trouble = error.message
                continue
            # A chunk may be in no list for a moment: a job has failed once it was seen so twice.
            if status.finished and (status.state != "failed" or (before and before.finished)):
                del left[path]
        statuses = list(found.values())
        if not left:
            view.last(statuses)
            return max((exit_code(status) for status in statuses), key=_badness, default=EXIT_OK)
        view.show(statuses, trouble)
        time.sleep(look_s)


def exit_code(status: JobStatus) -> int:
    """What a command exits with that saw a job end so."""
    codes: dict[str, type[TrbatchError]] = {
        "failed": JobFailed, "cancelled": Cancelled, "expired": Expired,
    }  # fmt: skip
    if status.state in codes:
        return codes[status.state].exit_code
    return EXIT_ROWS_FAILED if status.progress.rows_failed else EXIT_OK


def _badness(code: int) -> int:
    order = (EXIT_OK, EXIT_ROWS_FAILED, Expired.exit_code, Cancelled.exit_code, JobFailed.exit_code)
    return order.index(code)


def jobs_in(store: str, redis_url: str, *, unfinished: bool, most: int = 0) -> list[Job]:
    """The jobs of a store, the newest first.

    Args:
        unfinished: only those that no `collect` has found complete and that have not ended.
        most: so many; 0: all. Of an object store with more than 200 jobs, those of the last names.

    Raises:
        Unreachable: the storage or the queue fails.
    """
    found: list[Job] = []
    for path in newest_first(str(store or default_store())):
        if unfinished and folder(path).exists(MARKS[0]):
            continue
        try:
            job = Job(JobFolder.open(path), redis_url)
            if unfinished and job.status().finished:
                continue
        except Unreachable:
            raise
        except TrbatchError:  # damaged, or of another version: commands that name it say so
            continue
        found.append(job)
        if len(found) == most:
            break
    return found


@contextmanager
def view_for(*, as_json: bool, every_s: float, console: Console | None = None) -> Iterator[View]:
    """The view that fits where stdout goes."""
    console = console or Console(highlight=False)
    if as_json:
        yield _JsonLines(every_s)
    elif console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
            yield _Screen(live)
    else:
        yield _Lines(every_s)


class _Screen:
    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, statuses: Sequence[JobStatus], trouble: str) -> None:
        self._update(statuses, trouble)

    def last(self, statuses: Sequence[JobStatus]) -> None:
        self._update(statuses, "")

    def _update(self, statuses: Sequence[JobStatus], trouble: str) -> None:
        width = self._live.console.width
        self._live.update(screen(statuses, trouble, width), refresh=True)


class _Paced:
    """Shows at once, then every so often, and at the end."""

    def __init__(self, every_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._now = every_s, now
        self._shown_at = float("-inf")

    def show(self, statuses: Sequence[JobStatus], trouble: str) -> None:
        if self._now() - self._shown_at >= self._every_s:
            self._shown_at = self._now()
            self._write(statuses, trouble)

    def last(self, statuses: Sequence[JobStatus]) -> None:
        self._write(statuses, "")

    def _write(self, statuses: Sequence[JobStatus], trouble: str) -> None:
        raise NotImplementedError


class _Lines(_Paced):
    def _write(self, statuses: Sequence[JobStatus], trouble: str) -> None:
        clock = time.strftime("%H:%M:%S")
        if trouble:
            click.echo(f"{clock} {trouble}; trying again")
        for status in statuses:
            click.echo(f"{clock} {status.id}: {words(status)}")


class _JsonLines(_Paced):
    def _write(self, statuses: Sequence[JobStatus], trouble: str) -> None:
        for status in statuses:
            line: dict[str, Any] = {"time": time.time(), **status.to_dict()}
            click.echo(orjson.dumps(line | ({"trouble": trouble} if trouble else {})).decode())


def words(status: JobStatus) -> str:
    """A job in one line: its state unless that is plain, rows, speed, workers."""
    state = "" if status.state == "in_progress" else f"{status.state}, "
    active = sum(share.present for share in status.team)
    workers = f", {active} worker{'s' if active > 1 else ''}" if active else ""
    speedup = status.progress.speedup
    gain = f", speed-up {speedup:.2f}x" if speedup else ""
    return f"{state}{describe(status)}{gain}{workers}"


def screen(statuses: Sequence[JobStatus], trouble: str, width: int) -> Group:
    """What stands on a terminal of this width: a line for each job and for each of its workers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    rows: list[tuple[Text, ...]] = []
    notes: list[Text] = []
    for status in statuses:
        rows += [_job_cells(status), *(_share_cells(one, status) for one in _shown(status))]
        notes += _notes(status)
    names = ("job", "", "rows", "tokens/s", "accept", "speed-up", "left")
    widths = [
        max([len(name), *(cells[index].cell_len for cells in rows)])
        for index, name in enumerate(names)
    ]
    # The names of jobs give way where the terminal is narrow.
    widths[0] = max(8, min(widths[0], width - sum(widths[1:]) - 2 * (len(names) - 1)))
    for index, (name, wide) in enumerate(zip(names, widths, strict=True)):
        side: JustifyMethod = "left" if index < 2 else "right"
        table.add_column(name, justify=side, no_wrap=True, overflow="ellipsis", width=wide)
    for cells in rows:
        table.add_row(*cells)
    if trouble:
        notes.append(Text(f"{printable(trouble)}; trying again", style="yellow"))
    if not statuses and not trouble:
        notes.append(Text("looking …", style="dim"))
    return Group(table, *notes)


def _job_cells(status: JobStatus) -> tuple[Text, ...]:
    progress = status.progress
    share = progress.rows_done / progress.rows if progress.rows else 1.0
    return (
        Text(printable(status.id), style="bold"),
        _how_far(share, status),
        Text(f"{progress.rows_done:,}/{progress.rows:,}"),
        _number(_speed(status), ",.0f"),
        _number(progress.mean_acceptance_length, ".2f"),
        _number(progress.speedup, ".2f", "x"),
        Text(left_of(status)),
    )


_STYLES = {"completed": "green", "failed": "red", "cancelled": "red", "expired": "red",
           "paused": "yellow"}  # fmt: skip


def _how_far(share: float, status: JobStatus) -> Text:
    """A bar while rows come, else what the job is."""
    state = "paused" if status.paused else status.state
    if state == "in_progress":
        full = min(BAR, int(share * BAR + 1e-9))
        found = Text("━" * full, style="green").append("━" * (BAR - full), style="bright_black")
    else:
        found = Text(f"{state:{BAR}}", style=_STYLES.get(state, "dim"))
    return found.append(f" {int(100 * share):3}%", style="default")


def _speed(status: JobStatus) -> float | None:
    """Tokens a second: of the workers that are there now, or of the whole job once it has ended."""
    now = [share.tokens_per_s or 0.0 for share in status.team if share.present]
    return status.progress.tokens_per_s if status.finished or not any(now) else sum(now)


def _shown(status: JobStatus) -> list[Share]:
    """The workers that are there; once a job has ended, those who decoded it."""
    if status.finished:
        return [share for share in status.team if share.worker]
    return [share for share in status.team if share.present]


def _share_cells(share: Share, status: JobStatus) -> tuple[Text, ...]:
    chunks = f", {share.chunks} chunk{'s' if share.chunks > 1 else ''}" if share.chunks else ""
    state = printable(f"{share.state}{chunks}") if share.present else ""
    return (
        Text(f"  {printable(share.worker)}", style="cyan"),
        Text(state, style="dim"),
        Text(f"{share.rows:,}"),
        _number(share.tokens_per_s, ",.0f"),
        _number(share.mean_acceptance_length, ".2f"),
        _number(share.speedup, ".2f", "x"),
        _silence(share, status),
    )


def _silence(share: Share, status: JobStatus) -> Text:
    """How long ago its last rows came, where that is long and it has chunks.

    A worker renews its leases while its engine makes steps: with one, it decodes long rows.
    """
    if not share.chunks or share.last_rows_s is None or share.last_rows_s < EVERY_S:
        return Text("")
    since = duration(share.last_rows_s)
    if any(lease.worker == share.worker for lease in status.leases):
        return Text(f"no row for {since}", style="dim")
    return Text(f"silent {since}", style="yellow")


def _notes(status: JobStatus) -> list[Text]:
    notes = []
    name = printable(status.id)
    if status.errors:
        codes = ", ".join(f"{rows:,} {code or 'unknown'}" for code, rows in status.errors.items())
        notes.append(Text(f"{name}: failed rows: {printable(codes)}", style="yellow"))
    if looping := status.progress.rows_repetitive:
        words = f"{name}: {looping:,} rows go round in circles, which flatters accept and speed-up"
        notes.append(Text(words, style="yellow"))
    if status.failures:
        number, reason = next(iter(status.failures.items()))
        more = f" and {len(status.failures) - 1} more" if len(status.failures) > 1 else ""
        words = f"{name}: failed chunk {number}{more}: {printable(reason)}"
        notes.append(Text(words, style="red"))
    if not status.finished and not status.paused and not status.workers:
        notes.append(Text(f"{name}: {NO_WORKER}", style="yellow"))
    if status.ahead:
        notes.append(Text(f"{name}: {status.ahead:,} chunks of more urgent jobs wait before it"))
    return notes


def _number(value: float | None, form: str, unit: str = "") -> Text:
    return Text("–" if value is None else f"{value:{form}}{unit}")
