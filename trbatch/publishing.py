"""Finished rows on their way into segments: counted, kept a moment, published a file per job."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trbatch.engine.sequence import Completion
from trbatch.errors import Unreachable
from trbatch.patience import Patience

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
    ) -> str:
        """Write the rows as one immutable segment."""
        ...


@dataclass(slots=True)
class _Waiting:
    """One job's rows that no segment holds yet."""

    folder: Segments
    rows: list[dict[str, Any]]
    owners: list[Hashable]  # of each row: whom to tell


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
        self._last = time.monotonic()
        self._patience = Patience("the storage of a job")

    def add(self, path: str, folder: Segments, row: dict[str, Any], owner: Hashable) -> None:
        """Keep a finished row of the job at `path`."""
        waiting = self._waiting.setdefault(path, _Waiting(folder, [], []))
        waiting.rows.append(row)
        waiting.owners.append(owner)

    @property
    def rows(self) -> int:
        """Rows that no segment holds yet."""
        return sum(len(waiting.rows) for waiting in self._waiting.values())

    @property
    def failing(self) -> bool:
        """Whether the storage refused the last rows; more of them would only pile up."""
        return self._patience.failing

    def publish_if_due(self, *, hurry: bool = False) -> None:
        """Publish when it is time, or at once when in a `hurry`. A failing storage gets breaks.

        Raises:
            Unreachable: the storage has failed for longer than two minutes.
        """
        due = hurry or time.monotonic() - self._last >= self._every_s
        if self._waiting and due and self._patience.due:
            self.publish()

    def publish(self) -> None:
        """Publish every row. What cannot be written is kept for the next time.

        Raises:
            Unreachable: the storage has failed for longer than two minutes.
        """
        for path, waiting in list(self._waiting.items()):
            try:
                waiting.folder.publish(self._worker, waiting.rows, facts=self.facts)
            except (OSError, Unreachable) as error:
                logger.warning("%s: rows could not be published, trying again: %s", path, error)
                self._patience.failed(error)
                continue
            finally:
                self._last = time.monotonic()
            del self._waiting[path]
            for owner in waiting.owners:
                self._published(owner)
            self._patience.worked()


class Report:
    """A line in the log every half minute while rows come."""

    def __init__(self) -> None:
        self.rows = 0
        self.tokens = 0
        self._since = self._begin = time.monotonic()
        self._tokens_before = 0

    def count(self, completion: Completion) -> None:
        """Count a finished row."""
        self.rows += 1
        self.tokens += completion.completion_tokens

    def tick(self, chunks: int, owed: int) -> None:
        """Write the line if it is time and there is work."""
        now = time.monotonic()
        if now - self._since < REPORT_S:
            return
        rate = (self.tokens - self._tokens_before) / (now - self._since)
        self._since, self._tokens_before = now, self.tokens
        if chunks:
            logger.info(
                "%d rows done, %d in %d chunks in flight, %.0f tokens/s",
                self.rows, owed, chunks, rate,
            )  # fmt: skip

    def last(self, name: str) -> None:
        """Write the last line."""
        seconds = time.monotonic() - self._begin
        logger.info("%s: %d rows, %d tokens in %.1f s", name, self.rows, self.tokens, seconds)
