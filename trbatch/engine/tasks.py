"""The matrices of tasks: which are in memory, where they are kept, when they were saved.

A task's matrix is one safetensors file per (model, task) in the job store, written whole. It opens
with any safetensors reader: `rows` [V, k] int32, -1 for no candidate; `pair_keys` and `pair_rows`,
the same behind two tokens; `calibration`, which candidates came true (`calibration.py`); `paths`
and `path_counts`, which paths of ranks did (`paths.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from trbatch import matrices
from trbatch.engine import saved
from trbatch.engine.calibration import Calibration
from trbatch.engine.matrix import EMPTY, NO_KEY, Matrix
from trbatch.engine.paths import PathCounts
from trbatch.engine.sequence import TaskKey
from trbatch.errors import InputError, ModelError, Unreachable
from trbatch.matrices import Acceptance, Facts, Place, describe_age, is_there, matrix_file, read
from trbatch.storage import Stat

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Task:
    """One task's place in the matrix and on disk."""

    key: TaskKey
    index: int
    file: Place | None  # None: it is not saved
    changed: bool = False
    used: float = 0.0
    age_s: float | None = None  # of the saved matrix that it began from
    rows: int = 0  # that this matrix had
    position: str = ""  # in the stream that the workers of the task share; "": not shared
    born: str = ""  # of the file that it goes on from; see `matrices.Facts`
    began_cold: bool = False  # it takes the place of what its task has learned before
    anew: bool = False  # what its file holds is not to be gone on from
    outdated: bool = False  # another takes its file's place, or has
    # Of rows drafted with the matrix and without it, since it was saved last.
    with_it: Acceptance = field(default_factory=Acceptance)
    without_it: Acceptance = field(default_factory=Acceptance)


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What was counted of one task here: `saved.Evidence`."""

    calibration: Calibration
    paths: Sequence[PathCounts]
    task: int

    def added_to(
        self, kept: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[saved.Node]]:
        paths = self.paths[self.task].added_to(kept.get("paths"), kept.get("path_counts"))
        calibration = self.calibration.added_to(kept.get("calibration"), self.task)
        return {"calibration": calibration} | paths.to_tensors(), paths.described()

    def saved(self) -> None:
        """All of it is kept."""
        self.calibration.saved(self.task)
        self.paths[self.task].saved()


class Tasks:
    """Open tasks of one engine; the least recently used makes room when there are too many.

    Args:
        model: fingerprint of the model, part of a file's place.
        model_name: for people.
        places: tasks that are open at once; the matrix may have more rows than these use.
    """

    def __init__(
        self,
        matrix: Matrix,
        calibration: Calibration,
        paths: Sequence[PathCounts],
        *,
        places: int,
        model: str,
        model_name: str = "",
    ) -> None:
        self._matrix, self._calibration, self._paths = matrix, calibration, paths
        self._places, self._model, self._model_name = places, model, model_name
        self._tasks: dict[TaskKey, Task] = {}
        self._known: set[TaskKey] = set()  # also those that had to make room
        self._left: set[int] = set()  # places that running rows of outdated tasks still read

    def open(self, key: TaskKey, *, busy: set[int]) -> Task:
        """The task, loaded from its folder if it is new here, not cold, and has a saved matrix.

        Args:
            busy: indices that running sequences use.

        Raises:
            ModelError: all places are used by running sequences.
        """
        task = self._tasks.get(key)
        if task is not None and task.outdated:
            self._try_to_save()  # another's state may be what is read now
            self._left.add(self._tasks.pop(key).index)
            task = None
        if task is None:
            task = self._open(key, busy)
            logger.info(_describe(task))
        task.used = time.monotonic()
        return task

    def _open(self, key: TaskKey, busy: set[int]) -> Task:
        file = matrix_file(key.folder, self._model, key.name) if key.folder else None
        place = self._place(busy)
        # A cold job begins once. What made room for others was saved and goes on, and so does a
        # job that is taken up again another day.
        try:
            cold = key.cold and key not in self._known and not saved.has_begun(file, key.apart)
        except Unreachable as error:
            cold, file = True, None
            logger.warning("task %r begins cold and is not saved: %s", key.name, error)
        task = Task(key, place, file, anew=cold)
        self._empty(task.index)
        if cold and file is not None:
            self._begin_cold(task, file)
        elif file is not None:
            self._load_if_there(task, file)
        self._tasks[key] = task
        self._known.add(key)
        return task

    def _begin_cold(self, task: Task, file: Place) -> None:
        """Let an empty matrix take the place of what was known, before anybody hears of it."""
        task.began_cold = True
        try:
            self._save(task, file)
        except (OSError, Unreachable) as error:
            task.file, task.began_cold = None, False
            logger.warning("task %r begins cold and is not saved: %s", task.key.name, error)
            return
        self._supersede(file)

    def _supersede(self, file: Place) -> None:
        """A cold matrix takes this file's place: whoever holds what it held is not saved again.

        What is no cold job's own is read from the file anew when it is opened the next time.
        """
        for other in self._tasks.values():
            if other.file == file:
                other.file, other.outdated = None, not other.key.cold

    def get(self, key: TaskKey) -> Task | None:
        """The task of this key if it is open."""
        return self._tasks.get(key)

    def current(self, key: TaskKey) -> Task | None:
        """The task of this key if it is open and no other has taken its place."""
        task = self._tasks.get(key)
        return None if task is None or task.outdated else task

    def outdate(self, key: TaskKey) -> None:
        """Save this task no more; what is in its file by then is read when it is opened next."""
        if (task := self._tasks.get(key)) is not None and task.file is not None:
            task.file, task.outdated = None, True

    def ready(self, key: TaskKey) -> Task | None:
        """The task, if it is open and nothing has to be done for it to be used."""
        if (task := self.current(key)) is not None:
            task.used = time.monotonic()
        return task

    def can_open(self, key: TaskKey, busy: set[int]) -> bool:
        """Whether there is a place for this task, given those that running sequences use."""
        return self.current(key) is not None or len(busy) < self._places

    def touch(self, index: int) -> None:
        """Note that a task's rows changed."""
        for task in self._tasks.values():
            if task.index == index:
                task.changed = True

    def count(self, index: int, done: Acceptance, *, alone: bool) -> None:
        """Count a row of a task. `alone`: it was drafted without the task's rows."""
        for task in self._tasks.values():
            if task.index == index and alone:
                task.without_it = task.without_it.plus(done)
            elif task.index == index:
                task.with_it = task.with_it.plus(done)

    def save(self) -> None:
        """Write the matrices that changed.

        Raises:
            Unreachable, OSError: some could not be written; the others were.
        """
        failed: OSError | Unreachable | None = None
        for task in self._tasks.values():
            if task.changed and task.file is not None:
                try:
                    self._save(task, task.file)
                except (OSError, Unreachable) as error:
                    failed = error
        if failed is not None:
            raise failed

    def _try_to_save(self) -> None:
        try:
            self.save()
        except (OSError, Unreachable) as error:
            logger.warning("not all matrices could be saved: %s", error)

    def _save(self, task: Task, file: Place) -> None:
        places = _places_of(self._matrix, task.index)
        rows, pairs = _filled(places)
        facts = Facts(
            task=task.key.name, model=self._model, model_name=self._model_name, rows=rows,
            pairs=pairs, candidates=self._matrix.candidates, position=task.position, born=task.born,
            with_it=task.with_it, without_it=task.without_it,
            cold_jobs=[task.key.apart] if task.began_cold and task.key.apart else [],
        )  # fmt: skip
        evidence = _Evidence(self._calibration, self._paths, task.index)
        written = saved.save(file, places, facts, evidence=evidence, anew=task.anew)
        if written is not None:
            task.with_it, task.without_it = Acceptance(), Acceptance()
            task.changed = task.anew = False
            task.born = written.born
            evidence.saved()
        elif saved.is_replaced(file, task.born):
            logger.info("task %r: its matrix was replaced, and is read anew", task.key.name)
            self.outdate(task.key)

    def forget(self, *, counts: bool = True) -> None:
        """Put all tasks back to their beginning; `counts`: also how far rows can be trusted."""
        for index in range(self._matrix.shared.shape[0]):
            self._empty(index, counts=counts)

    def _empty(self, index: int, *, counts: bool = True) -> None:
        self._matrix.clear_task(index)
        if counts:
            self._calibration.restore(index, None)
            self._paths[index].restore(None, None)

    def _place(self, busy: set[int]) -> int:
        self._left &= busy
        taken = {task.index for task in self._tasks.values()}
        free = set(range(self._places)) - taken - self._left
        if free:
            return min(free)
        idle = [task for task in self._tasks.values() if task.index not in busy]
        if not idle:
            raise ModelError("rows of too many tasks run at the same time")
        oldest = min(idle, key=lambda task: task.used)
        self._try_to_save()
        del self._tasks[oldest.key]
        return oldest.index

    def _load_if_there(self, task: Task, file: Place) -> None:
        seen = None
        try:
            if is_there(file):
                seen = matrices.state_of(file)
                self._load(task, file)
        except Unreachable as error:
            # Decoding goes on; saved over what cannot be read now, this would be its loss.
            task.file = None
            logger.warning("task %r begins empty and is not saved: %s", task.key.name, error)
        except (ModelError, InputError) as error:
            # No fault of the rows that wait: what they say never depends on a matrix.
            logger.warning("task %r begins empty: %s", task.key.name, error)
            self._put_aside(task, file, seen)

    def _put_aside(self, task: Task, file: Place, seen: Stat | None) -> None:
        try:
            if (aside := matrices.put_aside(file, seen)) is not None:
                logger.warning("it was put aside, as %s", aside)
        except (OSError, Unreachable) as error:
            task.file = None
            logger.warning("and is not saved: %s", error)

    def _load(self, task: Task, file: Place) -> None:
        kept, about = saved.load(file), read(file)
        places = _places_of(self._matrix, task.index)
        _check(kept, places, self._matrix.vocab_size, file)
        for name, place in places.items():
            place.copy_(kept[name])
        self._calibration.restore(task.index, kept.get("calibration"))
        self._paths[task.index].restore(kept.get("paths"), kept.get("path_counts"))
        task.rows, task.age_s = sum(_filled(places)), about.age_s
        task.born = about.facts.born


def _places_of(matrix: Matrix, index: int) -> dict[str, torch.Tensor]:
    """The tensors of a task's matrix by the names that they have in its file."""
    return {
        "rows": matrix.shared[index],
        "pair_keys": matrix.pair_keys[index],
        "pair_rows": matrix.pair_rows[index],
    }


def _check(
    kept: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor], vocab: int, file: Place
) -> None:
    """Refuse what is no matrix of this model: who would look up a token beyond its vocabulary?"""
    for name, place in places.items():
        found = kept.get(name)
        if found is None or found.shape != place.shape or found.dtype != place.dtype:
            what = "none" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise ModelError(
                f"the matrix {file} is for another model or version: its {name} are {what}, "
                f"not {tuple(place.shape)} {place.dtype}"
            )
        end = vocab * vocab if name == "pair_keys" else vocab
        first = NO_KEY if name == "pair_keys" else EMPTY
        if found.numel() and not first <= int(found.min()) <= int(found.max()) < end:
            raise ModelError(f"the matrix {file} is damaged: its {name} are not all below {end}")


def _filled(places: dict[str, torch.Tensor]) -> tuple[int, int]:
    return int((places["rows"][:, 0] >= 0).sum()), int((places["pair_keys"] >= 0).sum())


def _describe(task: Task) -> str:
    if task.age_s is None:
        return f"task {task.key.name!r}: begins with an empty matrix"
    age = describe_age(task.age_s)
    return f"task {task.key.name!r}: matrix of {task.rows} rows, saved {age} ago"
