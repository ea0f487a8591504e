"""What a worker counts for Prometheus, and the port that it is read from.

Counts come from the worker's own thread, readings of the moment with its beat; a scrape only reads
what is there, so that it never waits for the queue or the engine. `docs/operations.md` lists them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import trbatch
from trbatch.engine.sequence import Completion
from trbatch.errors import UsageError

if TYPE_CHECKING:
    from trbatch.queue import QueueInfo

MOMENT_S = 0.5  # between two readings
QUEUES_S = 10.0  # between two looks at how much waits
_QUEUE_LABELS = ("model", "priority", "state")


class Metrics:
    """Counts nothing: what a worker has without `--metrics-port`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the port back."""

    def row(self, completion: Completion) -> None:
        """A row came out of the engine."""

    def lease_lost(self) -> None:
        """A chunk's lease ran out or was taken away."""

    def chunk_taken(self, attempt: int) -> None:
        """A chunk was taken for the first time, or again after a failure."""

    def chunk_finished(self) -> None:
        """All rows of a chunk lie in segments."""

    def model_ready(self, worker: str, model: str, facts: Mapping[str, str]) -> None:
        """An engine stands."""

    def moment(self, now: Moment, queues: Queues) -> None:
        """How things are now."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What a worker reads off itself."""

    chunks_in_flight: int
    rows_in_flight: int
    rows_unpublished: int
    publish_failures: int  # since the start
    engine: Mapping[str, Any]  # its figures; {} before the first


class Queues(Protocol):
    """What is asked how much waits. See `trbatch.queue.JobQueue`."""

    def queues(self) -> list[QueueInfo]: ...


def metrics_on(port: int, host: str) -> Metrics:
    """Metrics served at a port; none for port 0.

    Raises:
        UsageError: the port cannot be had, or prometheus_client is not installed.
    """
    if not port:
        return Metrics()
    try:
        return PrometheusMetrics(port, host)
    except ImportError as error:
        raise UsageError(
            "--metrics-port needs the package prometheus_client",
            hint="pip install 'trbatch[worker]'",
        ) from error
    except OSError as error:
        raise UsageError(
            f"--metrics-port {port} on {host} cannot be used: {error}",
            hint="each worker needs a port of its own",
        ) from error


class PrometheusMetrics(Metrics):
    """The same, counted and served."""

    def __init__(self, port: int, host: str) -> None:
        import prometheus_client as prometheus  # here: only workers have it

        # A second series for each counter, of no use here.
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)

        def counter(name: str, help: str, labels: Iterable[str] = ()) -> prometheus.Counter:
            return prometheus.Counter(f"trbatch_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, labels: Iterable[str] = ()) -> prometheus.Gauge:
            return prometheus.Gauge(f"trbatch_{name}", help, labels, registry=registry)

        self._rows = counter("rows", "Rows that came out of the engine.", ["outcome"])
        self._prompt = counter("prompt_tokens", "Prompt tokens of these rows.")
        self._completion = counter("completion_tokens", "Tokens generated for these rows.")
        self._decoded = counter("decode_tokens", "The same without each row's first token.")
        self._forwards = counter("decode_forwards", "Decode forwards, summed over rows.")
        self._drafted = counter("draft_tokens", "Tokens drafted.")
        self._accepted = counter("accepted_draft_tokens", "Drafted tokens that came true.")
        self._seconds = counter("decode_seconds", "Decoding time, summed over rows.")
        self._baseline = counter(
            "baseline_decode_seconds", "What plain decoding of these rows would have taken."
        )
        self._compared = counter(
            "compared_decode_seconds", "Decoding time of the rows whose baseline is known."
        )
        self._length = gauge("mean_acceptance_length", "Tokens a forward since the start.")
        self._rate = gauge("draft_acceptance_ratio", "Drafted tokens that came true, of all.")
        self._speedup = gauge("speedup_ratio", "Speed over plain decoding since the start.")
        self._lost = counter("leases_lost", "Chunks whose lease was lost.")
        self._retries = counter("chunk_retries", "Chunks taken again after a failure.")
        self._chunks = counter("chunks_finished", "Chunks finished.")
        self._failures = counter("publish_failures", "Segments that a storage did not take.")
        self._chunks_now = gauge("chunks_in_flight", "Chunks held by this worker.")
        self._rows_now = gauge("rows_in_flight", "Rows of these not decoded yet.")
        self._unpublished = gauge("rows_unpublished", "Rows decoded and not in a segment yet.")
        self._busy = counter(
            "engine_busy_seconds",
            "Time in which the engine prefilled or decoded, or its device did so alone.",
        )
        self._kv = gauge("kv_cache_usage_ratio", "Pages of the K/V cache in use, of all.")
        self._queue = gauge("queue_chunks", "Chunks in the queue.", _QUEUE_LABELS)
        self._beat = gauge("last_beat_timestamp_seconds", "When the worker's loop last turned.")
        self._info = gauge(
            "worker_info", "Always 1.", ["worker", "model", "device", "dtype", "version"]
        )
        self._queues_seen: set[tuple[str, str, str]] = set()  # the labels of each count
        self._looked_at = self._read_at = float("-inf")
        self._failures_before = 0
        self._busy_before = 0.0
        self._sums = dict.fromkeys(("decoded", "forwards", "drafted", "accepted"), 0)
        self._times = dict.fromkeys(("compared", "baseline"), 0.0)
        self._server, self._thread = prometheus.start_http_server(
            port, addr=host, registry=registry
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def row(self, completion: Completion) -> None:
        reason = completion.finish_reason
        outcome = {"error": "failed", "cancelled": "cancelled"}.get(reason, "ok")
        decoded = max(completion.completion_tokens - 1, 0)
        self._rows.labels(outcome).inc()
        self._prompt.inc(completion.prompt_tokens)
        self._completion.inc(completion.completion_tokens)
        self._decoded.inc(decoded)
        self._forwards.inc(completion.num_spec_steps)
        self._drafted.inc(completion.num_draft_tokens)
        self._accepted.inc(completion.num_accepted_draft_tokens)
        self._seconds.inc(completion.decode_s)
        sums, times = self._sums, self._times
        sums["decoded"] += decoded
        sums["forwards"] += completion.num_spec_steps
        sums["drafted"] += completion.num_draft_tokens
        sums["accepted"] += completion.num_accepted_draft_tokens
        if completion.baseline_decode_s and completion.decode_s:
            self._baseline.inc(completion.baseline_decode_s)
            self._compared.inc(completion.decode_s)
            times["baseline"] += completion.baseline_decode_s
            times["compared"] += completion.decode_s
        self._length.set(_ratio(sums["decoded"], sums["forwards"]))
        self._rate.set(_ratio(sums["accepted"], sums["drafted"]))
        self._speedup.set(_ratio(times["baseline"], times["compared"]))

    def lease_lost(self) -> None:
        self._lost.inc()

    def chunk_taken(self, attempt: int) -> None:
        if attempt > 1:
            self._retries.inc()

    def chunk_finished(self) -> None:
        self._chunks.inc()

    def model_ready(self, worker: str, model: str, facts: Mapping[str, str]) -> None:
        self._info.clear()
        device, dtype = facts.get("device", ""), facts.get("dtype", "")
        self._info.labels(worker, model, device, dtype, trbatch.__version__).set(1)

    def moment(self, now: Moment, queues: Queues) -> None:
        if time.monotonic() - self._read_at < MOMENT_S:
            return
        self._read_at = time.monotonic()
        self._beat.set_to_current_time()
        self._chunks_now.set(now.chunks_in_flight)
        self._rows_now.set(now.rows_in_flight)
        self._unpublished.set(now.rows_unpublished)
        self._failures.inc(now.publish_failures - self._failures_before)
        self._failures_before = now.publish_failures
        stats = now.engine
        busy_s = stats.get("busy_s", 0.0)
        # Less than before: another model's engine, which counts from its own start.
        self._busy.inc(busy_s - self._busy_before if busy_s >= self._busy_before else busy_s)
        self._busy_before = busy_s
        self._kv.set(_ratio(stats.get("kv_pages_used", 0), stats.get("kv_pages", 0)))
        if time.monotonic() - self._looked_at >= QUEUES_S:
            self._looked_at = time.monotonic()
            self._look_at(queues.queues())

    def _look_at(self, queues: Sequence[QueueInfo]) -> None:
        """Count what is in each queue; one that is no more has no count, and not its last."""
        counts = {
            (str(queue.model), queue.priority, state): getattr(queue, state)
            for queue in queues
            for state in ("queued", "started", "failed")
        }
        for labels in self._queues_seen - counts.keys():
            self._queue.remove(*labels)
        for labels, count in counts.items():
            self._queue.labels(*labels).set(count)
        self._queues_seen = set(counts)


def _ratio(part: float, whole: float) -> float:
    """Not a number, as Prometheus has it, while there is nothing to divide by."""
    return part / whole if whole else float("nan")
