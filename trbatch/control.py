"""What people want of a job after it was made: go on, pause, cancel; by when; how urgently.

It lies in the job folder as `control.json` and nowhere else, so that it holds whatever becomes of
the queue. Workers look at it every few seconds. Whoever changes it writes it whole; of two who do
so at once, the last one counts.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Self

import orjson

from trbatch.config import PRIORITIES
from trbatch.errors import UsageError
from trbatch.moments import moment_of, written
from trbatch.storage import Folder

CONTROL = "control.json"
DEADLINE = "deadline"  # error code of the rows that it cut off
_HOLDS = ("", "paused", "cancelled")
_NO_DEADLINE = "none"  # what lifts a deadline


@dataclass(frozen=True, slots=True)
class RowEnd:
    """What becomes of the rows that nobody will decode any more."""

    finish_reason: str
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What people want of a job. Times are Unix seconds."""

    hold: str = ""  # "", paused or cancelled
    since: float = 0.0  # when that was asked
    priority: str = "normal"
    deadline: float | None = None  # rows that are not done by then become error rows
    deadline_asked: str = ""  # as it was written; the same words again change nothing

    def __post_init__(self) -> None:
        if self.hold not in _HOLDS or self.priority not in PRIORITIES:
            raise TypeError(f"hold {self.hold!r}, priority {self.priority!r}")
        if self.deadline is not None and not isinstance(self.deadline, int | float):
            raise TypeError(f"deadline {self.deadline!r}")

    @classmethod
    def of(cls, job: Folder) -> Self:
        """What is wanted of the job in this folder; without the file, nothing special.

        Raises:
            UsageError: the file is damaged.
        """
        try:
            data = job.read(CONTROL)
        except FileNotFoundError:
            return cls()
        try:
            return cls(**orjson.loads(data))
        except (orjson.JSONDecodeError, TypeError) as error:
            raise UsageError(
                f"{job.join(CONTROL)} is damaged: {error}",
                hint="remove it; the job then goes on without pause, deadline or priority",
            ) from error

    def write(self, job: Folder) -> None:
        """Make this what is wanted of the job in this folder."""
        job.write(CONTROL, orjson.dumps(dataclasses.asdict(self), option=orjson.OPT_INDENT_2))

    def asked(self, *, priority: str = "", deadline: str = "") -> Self:
        """The same with what a command asks for; "" leaves as it is.

        Raises:
            UsageError: the deadline is no point in time.
        """
        changed = self
        if priority:
            changed = dataclasses.replace(changed, priority=priority)
        if deadline and deadline != self.deadline_asked:
            lifted = deadline == _NO_DEADLINE
            changed = dataclasses.replace(
                changed,
                deadline=None if lifted else moment_of(deadline).timestamp(),
                deadline_asked="" if lifted else deadline,
            )
        return changed

    def held(self, hold: str) -> Self:
        """The same job paused, cancelled or, with "", neither."""
        return dataclasses.replace(self, hold=hold, since=time.time())

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.time() >= self.deadline

    @property
    def stopped(self) -> bool:
        """Whether nothing of this job should be decoded now."""
        return bool(self.hold) or self.expired

    def row_end(self) -> RowEnd | None:
        """What becomes of the rows that are missing now; None while they may still come."""
        if self.hold == "cancelled":
            return RowEnd(
                "cancelled", "cancelled", "the job was cancelled before this row was done"
            )
        if self.expired and self.deadline is not None:
            when = written(self.deadline)
            return RowEnd("error", DEADLINE, f"the deadline {when} passed before this row was done")
        return None
