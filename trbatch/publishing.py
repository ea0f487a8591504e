"""Finished rows on their way into segments: counted, kept a moment, published a file per job."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trbatch.backoff import Backoff
from trbatch.engine.sequence import Completion
from trbatch.errors import Unreachable
from trbatch.schema import UNWRITABLE, fitted
from trbatch.trace import Steps

logger = logging.getLogger("trbatch.worker")

REPORT_S = 30.0


class Segments(Protocol):
    """What takes rows for good. See `job.JobFolder`."""

    def publish(
        self,
        worker: str,
        results: Sequence[Mapping[str, Any]],
        *,
        facts: Mapping[str, str] | None = None,
        steps: Steps | None = None,
    ) -> str:
        """Write the rows as one immutable segment."""
        ...


@dataclass(slots=True)
class _Waiting:
    """One job's rows that no segment holds yet."""

    folder: Segments
    rows: list[dict[str, Any]]
    owners: list[Hashable]  # of each row: whom to tell
    steps: Counter[tuple[int, int]]  # of the engine, since the segment before
    tries: Backoff = field(default_factory=Backoff)


class Publisher:
    """Collects rows per job and writes them as segments, every so often or when told to.

    Args:
        worker: its name goes into the segments' names.
        every_s: seconds between segments.
        published: called with the owner of each row once a segment holds it.
    """

    def __init__(self, worker: str, every_s: float, published: Callable[[Hashable], None]) -> None:
        self.facts: dict[str, str] = {}  # of the engine that the rows come from
        self._worker = worker
        self._every_s = every_s
        self._published = published
        self._waiting: dict[str, _Waiting] = {}
        self._steps: dict[str, Counter[tuple[int, int]]] = {}  # that no row has followed yet
        self._last = time.monotonic()
        self.failures = 0  # tries to publish that failed, since the start

    def add(self, path: str, folder: Segments, row: dict[str, Any], owner: Hashable) -> None:
        """Keep a finished row of the job at `path`."""
        waiting = self._waiting.setdefault(path, _Waiting(folder, [], [], Counter()))
        waiting.rows.append(row)
        waiting.owners.append(owner)
        if path in self._steps:
            waiting.steps.update(self._steps.pop(path))

    def count_steps(self, paths: Iterable[str], steps: Steps) -> None:
        """Note steps that the engine made with rows of the jobs at these paths, for each of them.

        Steps of a job that no row follows are forgotten with it.
        """
        busy = set(paths)
        self._steps = {path: found for path, found in self._steps.items() if path in busy}
        for path in busy:
            self._steps.setdefault(path, Counter()).update(steps)

    @property
    def rows(self) -> int:
        """Rows that no segment holds yet."""
        return sum(len(waiting.rows) for waiting in self._waiting.values())

    @property
    def failing(self) -> bool:
        """Whether a storage takes no rows at the moment: then no more should be decoded for it."""
        return any(waiting.tries.failing for waiting in self._waiting.values())

    def publish_if_due(self, *, hurry: bool = False) -> None:
        """Publish when it is time, or at once when in a `hurry`. A failing storage gets breaks."""
        if not self._waiting or (time.monotonic() - self._last < self._every_s and not hurry):
            return
        self._publish(path for path, one in self._waiting.items() if not one.tries.resting)

    def publish(self) -> None:
        """Publish every row now. What cannot be written is kept for the next time."""
        self._publish(self._waiting)

    def _publish(self, paths: Iterable[str]) -> None:
        again = list(paths)
        while again:
            path = again.pop()
            waiting = self._waiting[path]
            self._last = time.monotonic()
            try:
                waiting.folder.publish(
                    self._worker, waiting.rows, facts=self.facts, steps=waiting.steps
                )
            except (OSError, Unreachable) as error:
                self._failed(path, waiting, error)
                continue
            except UNWRITABLE as error:
                if self._mended(path, waiting):
                    again.append(path)
                else:
                    self._failed(path, waiting, error)
                continue
            if waiting.tries.failing:
                logger.info("%s: can be written again", path)
            del self._waiting[path]
            for owner in waiting.owners:
                self._published(owner)

    def _mended(self, path: str, waiting: _Waiting) -> bool:
        """Take out what no column takes, so that it holds up no other row. False: there is none."""
        mended = [fitted(row) for row in waiting.rows]
        waiting.rows = [row for row, _ in mended]
        columns = Counter(name for _, lost in mended for name in lost)
        if columns:
            logger.error(
                "%s: values that do not fit were left out of the results: %s", path, dict(columns),
                extra={"event": "values_left_out", "folder": path, "columns": dict(columns)},
            )  # fmt: skip
        return bool(columns)

    def _failed(self, path: str, waiting: _Waiting, error: Exception) -> None:
        """Keep the rows. A full disk gets room sooner or later, and nothing is lost by waiting."""
        self.failures += 1
        pause = waiting.tries.failed()
        logger.warning(
            "%s: %d rows could not be published, trying again in %.1f s: %s",
            path, len(waiting.rows), pause, error,
            extra={"event": "publish_failed", "folder": path, "rows": len(waiting.rows)},
        )  # fmt: skip


class Report:
    """A line in the log every half minute while rows come."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.rows = 0
        self.tokens = 0
        self._now = now
        self._since = self._begin = now()
        self._decoded = 0  # tokens since the last line, those of rows in flight among them
        self._seen = 0  # tokens that the engine had counted

    def count(self, completion: Completion) -> None:
        """Count a finished row."""
        self.rows += 1
        self.tokens += completion.completion_tokens

    def tick(self, chunks: int, owed: int, engine: Mapping[str, Any]) -> None:
        """Write the line if it is time and there is work.

        Args:
            chunks: in flight.
            owed: rows of them that are not done.
            engine: its figures; one that does not count tokens is judged by the rows it finishes.
        """
        made = engine.get("tokens", self.tokens)
        # Less than before: another model's engine, which counts from its own start.
        self._decoded += made - self._seen if made >= self._seen else made
        self._seen = made
        now = self._now()
        if now - self._since < REPORT_S:
            return
        rate = self._decoded / (now - self._since)
        self._since, self._decoded = now, 0
        if chunks:
            logger.info(
                "%d rows done, %d in %d chunks in flight, %.0f tokens/s",
                self.rows, owed, chunks, rate,
                extra={"event": "progress", "rows": self.rows, "rows_in_flight": owed,
                       "chunks_in_flight": chunks, "tokens_per_s": round(rate, 1)},
            )  # fmt: skip

    def last(self, name: str) -> None:
        """Write the last line."""
        seconds = self._now() - self._begin
        logger.info(
            "%s: %d rows, %d tokens in %.1f s", name, self.rows, self.tokens, seconds,
            extra={"event": "worker_ended", "worker": name, "rows": self.rows,
                   "tokens": self.tokens, "seconds": round(seconds, 1)},
        )  # fmt: skip
