"""How fast a model was in earlier jobs of a store: what an estimate of time is made of."""

from __future__ import annotations

from dataclasses import dataclass

from trbatch.errors import TrbatchError
from trbatch.figures import Figures, covered_seconds
from trbatch.job import JobFolder
from trbatch.manifest import Manifest
from trbatch.naming import MATRICES
from trbatch.storage import folder
from trbatch.submission import MANIFEST

_MOST_LOOKED_AT = 500  # job folders; in an object store each takes a request
_MOST_USED = 5  # jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What was measured in the last jobs of a model, by as many workers as there were then."""

    jobs: int
    tokens_per_s: float  # generated, over the seconds in which at least one worker decoded
    tokens_per_sample: float  # generated, on average


def earlier_pace(store: str, model: str, revision: str, task: str) -> Pace | None:
    """The pace of a model's last jobs, of this task if there are any; None if there are none.

    Raises:
        Unreachable: the storage fails.
    """
    found: list[tuple[bool, str, str]] = []
    for name in folder(store).folders("")[:_MOST_LOOKED_AT]:
        inner = folder(folder(store).join(name))
        if name == MATRICES or not inner.exists(MANIFEST):
            continue
        try:
            manifest = Manifest.from_json(inner.read(MANIFEST), inner.join(MANIFEST))
        except (TrbatchError, FileNotFoundError):  # another's damage is not this job's matter
            continue
        if (manifest.model, manifest.revision) == (model, revision):
            found.append((manifest.task == task, manifest.created, inner.path))
    total, busy, jobs = Figures(), 0.0, 0
    for is_same_task, _, path in sorted(found, reverse=True):
        if jobs == _MOST_USED or (jobs and not is_same_task):
            break
        figures, seconds = _measured(path)
        if figures.rows_ok and seconds > 0:
            total.add(figures)
            busy += seconds
            jobs += 1
    if not jobs or not total.completion_tokens:
        return None
    return Pace(
        jobs=jobs,
        tokens_per_s=total.completion_tokens / busy,
        tokens_per_sample=total.completion_tokens / total.rows_ok,
    )


def _measured(path: str) -> tuple[Figures, float]:
    figures = Figures()
    footers = JobFolder.open(path).ledger.footers()
    for footer in footers:
        figures.add(footer[0])
    return figures, covered_seconds(footer[1] for footer in footers)
