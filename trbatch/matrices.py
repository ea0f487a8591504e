"""The saved matrices of tasks: where they lie and what their files say of themselves. No torch.

    <store>/matrices/<model fingerprint>/<task>-<digest>.safetensors

A file's facts stand in its safetensors header, so that thousands are listed without reading one
row. The rows themselves are written and read by `engine.saved`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import orjson

from trbatch.errors import InputError, UsageError
from trbatch.storage import Stat, place, writing
from trbatch.storage import folder as storage_folder

logger = logging.getLogger("trbatch")

METADATA = "trbatch_matrix"  # key of the facts in a file's header
PARTS = ("rows", "pair_keys", "pair_rows")  # tensors that each file has
_FINGERPRINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LENGTH = struct.Struct("<Q")  # of the header, the first bytes of a safetensors file
_LONGEST_HEADER = 16 << 20
_COLD_JOBS = 256  # whose beginning is remembered
_MEMORY_TOKENS = 200_000.0  # after which what was counted of acceptance counts half

# A file or a folder: a path on a disk, a URL's text in an object store.
Place = Path | str


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Tokens that decode forwards gave, and these forwards; old ones count less."""

    tokens: float = 0.0
    forwards: float = 0.0

    @property
    def mean_length(self) -> float | None:
        """Tokens for each forward; None before the first."""
        return self.tokens / self.forwards if self.forwards else None

    def plus(self, other: Acceptance) -> Acceptance:
        """Both together."""
        return Acceptance(self.tokens + other.tokens, self.forwards + other.forwards)

    def times(self, factor: float) -> Acceptance:
        """The same evidence with another weight."""
        return Acceptance(self.tokens * factor, self.forwards * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a matrix file says of itself.

    `with_it` and `without_it` count rows drafted with the task's rows and, beside them in the same
    runs, a few drafted without. `tree`: the learned tree in falling order, each node as its path of
    ranks and the chance that it comes true. `position`: in the stream that workers share.
    `cold_jobs`: the latest jobs that began cold and whose matrix took the place of an earlier one.
    `born`: differs from what was there before it was reset, imported or begun cold.
    """

    task: str
    model: str  # fingerprint
    model_name: str = ""
    rows: int = 0  # tokens that have candidates
    pairs: int = 0  # pairs of tokens that have
    candidates: int = 0  # a row
    position: str = ""
    with_it: Acceptance = field(default_factory=Acceptance)
    without_it: Acceptance = field(default_factory=Acceptance)
    tree: list[tuple[list[int], float]] = field(default_factory=list)
    cold_jobs: list[str] = field(default_factory=list)
    born: str = ""

    def to_metadata(self) -> dict[str, str]:
        """As the header of a safetensors file takes it."""
        return {METADATA: orjson.dumps(asdict(self)).decode()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> Self:
        """The facts of a header. Raises ValueError, KeyError or TypeError: there are none."""
        values = orjson.loads(metadata[METADATA])
        for name in ("with_it", "without_it"):
            counted = {key: float(value) for key, value in values[name].items()}
            values[name] = Acceptance(**counted)
        values["tree"] = [([int(rank) for rank in path], float(p)) for path, p in values["tree"]]
        facts = cls(**values)
        _check_types(facts)
        return facts

    def known_cold(self, earlier: Facts) -> Facts:
        """These facts with the cold jobs that `earlier` knows of as well."""
        jobs = dict.fromkeys([*earlier.cold_jobs, *self.cold_jobs])
        return replace(self, cold_jobs=list(jobs)[-_COLD_JOBS:])

    def after(self, earlier: Facts) -> Facts:
        """These facts with what was counted before `earlier` was saved as well."""
        both = [
            self.with_it.plus(earlier.with_it),
            self.without_it.plus(earlier.without_it),
        ]
        if both[0].tokens > _MEMORY_TOKENS:
            both = [acceptance.times(0.5) for acceptance in both]
        return replace(self, with_it=both[0], without_it=both[1])


@dataclass(frozen=True, slots=True)
class SavedMatrix:
    """A matrix in its file."""

    file: Place
    size: int  # bytes
    saved_at: float  # seconds since 1970
    facts: Facts

    @property
    def age_s(self) -> float:
        """Seconds since it was saved."""
        return max(0.0, time.time() - self.saved_at)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tree, for tables and JSON."""
        facts = self.facts
        return {
            "task": facts.task,
            "model": facts.model_name or facts.model,
            "fingerprint": facts.model,
            "rows": facts.rows,
            "pairs": facts.pairs,
            "bytes": self.size,
            "age_s": round(self.age_s, 1),
            "acceptance_with_it": _rounded(facts.with_it.mean_length),
            "acceptance_without_it": _rounded(facts.without_it.mean_length),
            "file": str(self.file),
        }


def matrix_file(folder: Place, model: str, task: str) -> Place:
    """Where the matrix of a task lies: readable name, and a digest so that no two names meet."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", task)[:60]
    digest = blake2b(task.encode(), digest_size=4).hexdigest()
    return below(folder, f"{model}/{readable}-{digest}.safetensors")


def below(folder: Place, name: str) -> Place:
    """What lies in a folder under this name."""
    if isinstance(folder, str) and "://" in folder:
        return f"{folder.rstrip('/')}/{name}"
    return Path(folder) / name


def is_there(file: Place) -> bool:
    """Whether there is such a file."""
    parent, name = place(file)
    return parent.exists(name)


@contextlib.contextmanager
def locked(file: Place) -> Iterator[None]:
    """Nobody else on this host writes this matrix meanwhile. Makes its folder.

    An object store has no locks: the last one to write wins. Workers of a task hold equal copies,
    so that hardly anything is lost by it.
    """
    if isinstance(file, str):
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read(file: Place) -> SavedMatrix:
    """A saved matrix by its file.

    Raises:
        InputError: it cannot be read, or is none.
        Unreachable: the object store does not answer.
    """
    parent, name = place(file)
    try:
        header, _ = _header(file)
        facts = Facts.from_metadata(header["__metadata__"])
        stat = parent.stat(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no matrix that trbatch saved: {error}") from error
    return SavedMatrix(file, stat.size, stat.modified, facts)


def all_in(folder: Place) -> list[SavedMatrix]:
    """The matrices in a folder, by task and model. What cannot be read is logged and left out."""
    found, top = [], storage_folder(folder)
    for model in top.folders(""):
        for name in top.names(model):
            if not name.endswith(".safetensors"):
                continue
            try:
                found.append(read(below(folder, f"{model}/{name}")))
            except InputError as error:
                logger.warning("%s", error.message)
    return sorted(found, key=lambda saved: (saved.facts.task, saved.facts.model))


def find(folder: Place, task: str, model: str = "") -> SavedMatrix:
    """The matrix of a task.

    Args:
        model: name or beginning of the fingerprint, where the task has matrices of several.

    Raises:
        UsageError: there is none, or more than one.
    """
    known = all_in(folder)
    fitting = [
        saved
        for saved in known
        if saved.facts.task == task
        and (model == saved.facts.model_name or saved.facts.model.startswith(model))
    ]
    if not fitting:
        tasks = sorted({saved.facts.task for saved in known})
        raise UsageError(
            f"no matrix of task {task!r} in {folder}",
            hint=f"there are: {', '.join(tasks)}" if tasks else "the first job saves one",
        )
    if len(fitting) > 1:
        models = ", ".join(f"{s.facts.model} ({s.facts.model_name})" for s in fitting)
        raise UsageError(f"task {task!r} has matrices of {models}", hint="choose with --model")
    return fitting[0]


def export(saved: SavedMatrix, target: Path, *, force: bool = False) -> None:
    """Copy a matrix to a file of its own.

    Args:
        force: put it in the place of a file that is there.

    Raises:
        UsageError: there is a file already.
    """
    if not force:
        _refuse_present(target)
    parent, name = place(saved.file)
    with writing(target) as out:
        out.write(parent.read(name))


def import_file(source: Path, folder: Place, *, task: str = "", force: bool = False) -> Place:
    """Put an exported matrix into a store.

    Args:
        task: that it shall belong to; "" is the one that it came from.
        force: put it in the place of one that is there.

    Returns:
        The file that was made.

    Raises:
        InputError: the file is no matrix, or not a whole one.
        UsageError: the task has one already.
    """
    facts = read(source).facts
    header, body = _header(source)
    _check_whole(source, header, body)
    if not _FINGERPRINT.fullmatch(facts.model):  # it becomes a folder's name
        raise InputError(f"{source} is for no model: its fingerprint is {facts.model!r:.80}")
    # Positions are those of another server's stream, and jobs those of another store.
    facts = replace(facts, task=task or facts.task, position="", cold_jobs=[], born=new_birth())
    target = matrix_file(folder, facts.model, facts.task)
    header["__metadata__"] |= facts.to_metadata()
    raw = orjson.dumps(header)
    raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of 8
    with locked(target):
        if not force:
            _refuse_present(target)
        with writing(target) as out, source.open("rb") as data:
            data.seek(body)
            out.write(_LENGTH.pack(len(raw)) + raw + data.read())
    return target


def new_birth() -> str:
    """What tells a matrix that begins anew from the one whose place it takes."""
    return secrets.token_hex(4)


def state_of(file: Place) -> Stat | None:
    """What tells a file from one that has taken its place; None if there is none."""
    parent, name = place(file)
    try:
        return parent.stat(name)
    except FileNotFoundError:
        return None


def put_aside(file: Place, seen: Stat | None) -> Place | None:
    """Let a file that cannot be used make room for a sound one.

    Args:
        seen: its state before it was read: another worker may have replaced it since.

    Returns:
        Its new place; None if it is gone already.
    """
    parent, name = place(file)
    aside = f"{name}.unusable"
    with locked(file):
        if seen is None or state_of(file) != seen:
            return None
        parent.write(aside, parent.read(name))
        parent.remove(name)
    return parent.join(aside)


def remove(saved: SavedMatrix) -> None:
    """Delete a saved matrix: the task's next run begins cold."""
    parent, name = place(saved.file)
    with locked(saved.file):
        parent.remove(name)


def describe_age(seconds: float) -> str:
    """A time span in words, in the largest unit that fits."""
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{int(seconds)} s"


def before(one: str, other: str) -> bool:
    """Whether one position stands before another of the same life of the stream.

    A position is `<milliseconds>-<number>/<life>`; without a life it is of one that has none.
    """
    (entry, _, life), (other_entry, _, other_life) = one.partition("/"), other.partition("/")
    return life == other_life and _order(entry) < _order(other_entry)


def _order(entry: str) -> tuple[int, int]:
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number)


def _refuse_present(target: Place) -> None:
    if is_there(target):
        raise UsageError(f"{target} is there already", hint="--force puts this in its place")


def _header(file: Place) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    parent, name = place(file)
    with parent.open(name) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        prefix = stream.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise ValueError("it is too short")
        (length,) = _LENGTH.unpack(prefix)
        if length > min(_LONGEST_HEADER, size):
            raise ValueError("it is not in the safetensors format")
        header = orjson.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("it is not in the safetensors format")
    return header, _LENGTH.size + length


def _check_whole(file: Path, header: dict[str, Any], body: int) -> None:
    """Refuse a file that was cut short on its way, or that lacks a part."""
    size = file.stat().st_size
    try:
        parts = {name: part for name, part in header.items() if name != "__metadata__"}
        end = max(int(part["data_offsets"][1]) for part in parts.values())
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no matrix that trbatch saved: {error!r}") from error
    if missing := [name for name in PARTS if name not in parts]:
        raise InputError(f"{file} is no whole matrix: it has no {', '.join(missing)}")
    if body + end != size:
        hint = "copy it again"
        raise InputError(f"{file} has {size:,} bytes where {body + end:,} belong", hint=hint)


def _check_types(facts: Facts) -> None:
    for one in fields(facts):
        value, wanted = getattr(facts, one.name), {"str": str, "int": int}.get(str(one.type))
        if wanted is not None and type(value) is not wanted:
            raise TypeError(f"its {one.name} is {value!r:.80}")
    jobs = facts.cold_jobs
    if not isinstance(jobs, list) or not all(isinstance(job, str) for job in jobs):
        raise TypeError(f"its cold_jobs are {jobs!r:.80}")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
