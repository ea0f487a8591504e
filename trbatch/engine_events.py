"""What the engine's thread tells the worker's."""

from __future__ import annotations

from dataclasses import dataclass, field

from trbatch.engine.sequence import Completion, TaskKey
from trbatch.queue_names import ModelKey
from trbatch.trace import Steps


@dataclass(frozen=True, slots=True)
class Ready:
    """An engine stands: it decodes `capacity` sequences together; loading took `seconds`."""

    model: ModelKey
    capacity: int
    seconds: float
    facts: dict[str, str]  # of the engine, for the dataset's metadata, e.g. its dtype


@dataclass(frozen=True, slots=True)
class Finished:
    """Requests came to their end in one step."""

    completions: list[Completion]
    steps: Steps = field(default_factory=dict)  # that the engine made since the last of these


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The engine of this model could not be made. The thread waits for other orders."""

    model: ModelKey
    error: Exception


@dataclass(frozen=True, slots=True)
class Broken:
    """The engine raised; what it held is lost and the thread has ended."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Changes:
    """What was written to a task's matrix since the last time, and where its copy stands."""

    task: TaskKey
    data: bytes
    position: str


@dataclass(frozen=True, slots=True)
class Whole:
    """A task's whole matrix, which includes the stream up to `position`.

    `data`: b"" if the task is not open. `changes`: if asked for, what of it was not sent yet.
    `cold`: it is to take the place of what was known of the task.
    """

    task: TaskKey
    data: bytes
    position: str
    changes: bytes = b""
    cold: bool = False


Event = Ready | Finished | LoadFailed | Broken | Changes | Whole
