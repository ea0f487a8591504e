"""The jobs of a store, and how fast a model was in them: what an estimate of time is made of."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from trbatch.errors import TrbatchError
from trbatch.figures import Figures, covered_seconds
from trbatch.job import JobFolder
from trbatch.manifest import Manifest
from trbatch.naming import MATRICES
from trbatch.storage import LocalFolder, folder
from trbatch.submission import MANIFEST

MOST_OBJECTS = 200  # jobs of an object store that are looked at: each look is a request or three
_MOST_READ = 500  # manifests, the newest
_MOST_USED = 5  # jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What was measured in the last jobs of a model, by as many workers as there were then."""

    jobs: int
    tokens_per_s: float  # generated, over the seconds in which at least one worker decoded
    tokens_per_sample: float  # generated, on average


def newest_first(store: str) -> list[str]:
    """The job folders of a store, those first whose manifest was written last.

    Of an object store with more than `MOST_OBJECTS` jobs, those of the last names.

    Raises:
        Unreachable: the storage fails.
    """
    place = folder(store)
    names = [name for name in place.folders("") if name != MATRICES]
    if not isinstance(place, LocalFolder):
        names = names[-MOST_OBJECTS:]
    dated = []
    for name in names:
        inner = folder(place.join(name))
        with contextlib.suppress(FileNotFoundError):  # no job, or one that is removed now
            dated.append((inner.stat(MANIFEST).modified, inner.path))
    return [path for _, path in sorted(dated, reverse=True)]


def earlier_pace(store: str, model: str, revision: str, task: str) -> Pace | None:
    """The pace of a model's last jobs, of this task if there are any; None if there are none.

    Raises:
        Unreachable: the storage fails.
    """
    found: list[tuple[bool, str, str]] = []
    for path in newest_first(store)[:_MOST_READ]:
        inner = folder(path)
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
