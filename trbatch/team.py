"""Who decodes a job: what each worker has done for it, and how it fares now."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from trbatch.figures import Figures
from trbatch.segments import Footer

LATELY_S = 60.0  # of work that a worker's pace is taken of


class Live(Protocol):
    """A worker as the queue knows it. See `queue.WorkerInfo`."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def chunks(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One worker's part of a job."""

    worker: str  # "": several, of which a compacted segment no longer tells who did what
    state: str  # as the queue has it: busy, idle, …; "gone": not there; "": the queue was not asked
    chunks: int  # in its hands, of whatever job
    rows: int
    rows_failed: int
    completion_tokens: int
    tokens_per_s: float | None  # in the last minute of its work
    mean_acceptance_length: float | None
    speedup: float | None
    last_rows_s: float | None  # since it last published rows

    @property
    def present(self) -> bool:
        """Whether the worker lives and holds the job's model."""
        return self.state not in ("", "gone")


def team_of(
    footers: Iterable[Footer], live: Sequence[Live] | None, now: float | None = None
) -> list[Share]:
    """Everyone who has decoded rows of a job or holds its model now, by name.

    Args:
        footers: of the job's segments, oldest first.
        live: workers that hold the job's model; None: nobody asked.
        now: Unix seconds; the present if None.
    """
    now = time.time() if now is None else now
    known = {worker.name: worker for worker in live or ()}
    by_worker: dict[str, list[Footer]] = {name: [] for name in known}
    for footer in footers:
        by_worker.setdefault(footer.worker, []).append(footer)
    absent = "" if live is None else "gone"
    return [
        _share(name, found, known.get(name), absent, now)
        for name, found in sorted(by_worker.items())
    ]


def _share(
    name: str, footers: Sequence[Footer], live: Live | None, absent: str, now: float
) -> Share:
    total = Figures()
    for footer in footers:
        total.add(footer.figures)
    return Share(
        worker=name,
        state=live.state if live else absent,
        chunks=live.chunks if live else 0,
        rows=total.rows,
        rows_failed=total.rows_failed,
        completion_tokens=total.completion_tokens,
        tokens_per_s=_lately(footers),
        mean_acceptance_length=total.mean_acceptance_length,
        speedup=total.speedup,
        last_rows_s=max(0.0, now - footers[-1].span[1]) if footers else None,
    )


def _lately(footers: Sequence[Footer]) -> float | None:
    tokens, seconds = 0, 0.0
    for footer in reversed(footers):  # one worker's spans do not overlap
        tokens += footer.figures.completion_tokens
        seconds += footer.span[1] - footer.span[0]
        if seconds >= LATELY_S:
            break
    return tokens / seconds if seconds > 0 else None
