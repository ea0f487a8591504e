"""What things are called in Redis: queues of models, entries of chunks, sets and streams."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from trbatch.config import PRIORITIES
from trbatch.naming import model_name

PREFIX = "trbatch:"  # of every key that rq does not make itself
CLAIM = f"{PREFIX}claim:"  # and an entry's id: the worker that is about to lease it


class Place(Protocol):
    """Which job folder is meant: jobs of the same name in two stores are two jobs."""

    @property
    def id(self) -> str: ...

    @property
    def path(self) -> str | os.PathLike[str]: ...


class Folder(Place, Protocol):
    """What the queue reads of a `job.JobFolder`."""

    @property
    def manifest(self) -> Any: ...  # with `model`, `revision` and `generation`


@dataclass(frozen=True, slots=True)
class ModelKey:
    """A model as the queue tells models apart: a hub name or an absolute path, and a revision."""

    name: str
    revision: str = ""

    @classmethod
    def of(cls, name: str, revision: str = "") -> Self:
        """The key of a model by the name that a user gave; a job's own name is final already.

        Raises:
            UsageError: it can only be a local model, and there is none.
        """
        return cls(model_name(name), revision)

    @property
    def queue_name(self) -> str:
        """The rq queue of this model: a readable part and a hash that keeps names apart."""
        return self.queue_of("normal")

    @property
    def queue_names(self) -> tuple[str, ...]:
        """The rq queues of this model, the most urgent first."""
        return tuple(self.queue_of(priority) for priority in PRIORITIES)

    def queue_of(self, priority: str) -> str:
        """The rq queue of this model's chunks of a priority."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", Path(self.name).name).strip("-").lower()[:40]
        name = f"trbatch-{slug}-{_digest(self.name, self.revision)}"
        return name if priority == "normal" else f"{name}-{priority}"

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def chunk_id(job: Folder, chunk: int) -> str:
    """The rq job of a chunk: the same chunk of the same job folder always has the same."""
    return f"{_name_of(job)}-{job.manifest.generation}-{chunk}"


def priority_of(queue_name: str) -> str:
    """The priority of the chunks in an rq queue of ours."""
    last = queue_name.rpartition("-")[2]
    return last if last in PRIORITIES else "normal"


def matrix_key(model: str, task: str) -> str:
    """The stream through which workers share the matrix of a task and a model's fingerprint."""
    return f"{PREFIX}matrix:{_digest(model, task)}"


def index_key(job: Place) -> str:
    """The set of the rq jobs of one job's chunks."""
    return f"{PREFIX}chunks:{_name_of(job)}"


def _name_of(job: Place) -> str:
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", job.id)[:60]
    return f"{slug}-{_digest(os.fspath(job.path))}"


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=6).hexdigest()
