"""What a worker tells of its work: events in the log and counts for Prometheus."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from trbatch import logs
from trbatch.chunk_lease import Lease
from trbatch.engine.sequence import Completion
from trbatch.metrics import Metrics, Moment
from trbatch.publishing import Report
from trbatch.queue import JobQueue
from trbatch.queue_names import ModelKey
from trbatch.wording import counted

logger = logging.getLogger("trbatch.worker")


class Telling:
    """One worker's log and metrics.

    Args:
        worker: its name.
        metrics: what counts.
    """

    def __init__(self, worker: str, metrics: Metrics) -> None:
        self._worker, self._metrics = worker, metrics
        self._report = Report()
        self._asked = 0

    def model_ready(
        self, model: ModelKey, capacity: int, seconds: float, facts: Mapping[str, str]
    ) -> None:
        """An engine stands after so many seconds; it decodes `capacity` rows together."""
        self._metrics.model_ready(self._worker, str(model), facts)
        fields = {"event": "model_ready", "worker": self._worker, "model": str(model)}
        logger.info(
            "%s is ready after %.1f s, batch %d", model, seconds, capacity,
            extra=fields | {"seconds": round(seconds, 1), "capacity": capacity},
        )  # fmt: skip

    def asked_to_stop(self, times: int, chunks: int, grace_s: float) -> None:
        """It was asked so many times by now; what that means for the chunks that it holds."""
        if times == self._asked:
            return
        self._asked = times
        what = f"in flight: {counted(chunks, 'chunk')}"
        if chunks and times == 1:
            what += f", to be finished within {grace_s:g} s; asked once more, they are handed back"
        elif chunks:
            what += ", handed back with all finished rows kept"
        logger.info(
            "asked to stop; %s", what, extra={"event": "stopping", "asked": times, "chunks": chunks}
        )

    def chunk_taken(self, lease: Lease) -> None:
        """A chunk was taken on."""
        self._metrics.chunk_taken(lease.attempt)

    def chunk_done(self, lease: Lease, result: Mapping[str, int]) -> None:
        """All rows of a chunk lie in segments. For people the progress lines are enough."""
        self._metrics.chunk_finished()
        logger.log(
            logging.INFO if logs.as_json() else logging.DEBUG,
            "chunk %d of %s is done", lease.chunk, lease.folder,
            extra=_of(lease) | {"event": "chunk_done", **result},
        )  # fmt: skip

    def lease_lost(self, lease: Lease) -> None:
        """A chunk is somebody else's now."""
        self._metrics.lease_lost()
        logger.warning(
            "chunk %d of %s: its lease was lost; what is finished is kept",
            lease.chunk, lease.folder,
            extra=_of(lease) | {"event": "lease_lost"},
        )  # fmt: skip

    def row(self, completion: Completion) -> None:
        """A row came out of the engine."""
        self._report.count(completion)
        self._metrics.row(completion)

    def moment(self, now: Moment, jobs: JobQueue) -> None:
        """How things are; called with every turn of the worker's loop."""
        self._report.tick(now.chunks_in_flight, now.rows_in_flight, now.engine)
        self._metrics.moment(now, jobs)

    def last(self) -> None:
        """The worker ends."""
        self._report.last(self._worker)


def _of(lease: Lease) -> dict[str, object]:
    return {"folder": lease.folder, "chunk": lease.chunk, "attempt": lease.attempt}
