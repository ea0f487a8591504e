"""What can go wrong, for callers to catch and for the command line to turn into an exit code.

    TrbatchError              1   anything below, or a mistake of ours
    ├── UsageError            2   an option, a setting or a combination of them is wrong
    │   └── MissingExtra      2   a package is not installed that what was asked for needs
    ├── InputError            2   a file cannot be read or a whole input is unusable
    ├── ModelError            4   a model cannot be found, loaded or run by this engine
    │   └── WorkerError       4   not here and now: device, memory, network or an option
    ├── JobFailed             4   the job cannot be finished
    ├── Cancelled             5   somebody cancelled it
    ├── TimedOut              6   a time limit passed first
    │   └── Expired           6   the job's own: its deadline
    ├── ResumeRefused         7   a job of this name exists and was made with other settings
    └── Unreachable          75   Redis or the storage cannot be reached

A row that fails is none of these: it becomes an error row (see `RowError`) and the job runs on.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_OK = 0
EXIT_ROWS_FAILED = 3  # the job finished, some of its rows are error rows

# What the program's exit codes mean, for its help and its documentation.
EXIT_CODES = (
    ("0", "Every row is ok."),
    ("1", "An unexpected error: please report it."),
    ("2", "Usage: an option, a setting or the whole input is wrong."),
    ("3", "Finished, and some rows failed."),
    ("4", "The job failed: rows are missing, or the model cannot be loaded."),
    ("5", "Somebody cancelled the job."),
    ("6", "A time limit or the job's deadline has passed."),
    ("7", "A job of this name was made with other settings; nothing was changed."),
    ("75", "The queue or the storage cannot be reached; try again later."),
    ("129", "Stopped by SIGHUP, as when a terminal closes; the same command goes on."),
    ("130", "Stopped by Ctrl-C; the same command goes on."),
    ("143", "Stopped by SIGTERM; the same command goes on."),
)


class TrbatchError(Exception):
    """Base of every error that trbatch raises on purpose.

    Args:
        message: what is wrong, with the file, line or option that it is about.
        hint: what to do about it, shown on a line of its own behind `hint:`.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TrbatchError):
    """An option, a setting or a combination of them is wrong."""

    exit_code = 2


class MissingExtra(UsageError):
    """What was asked for needs a package that is not installed; the hint names the extra."""


class InputError(TrbatchError):
    """A file cannot be read, or a whole input is unusable."""

    exit_code = 2


class ModelError(TrbatchError):
    """A model cannot be found, loaded or run by this engine."""

    exit_code = 4


class WorkerError(ModelError):
    """A model cannot be loaded here and now, through no fault of its own.

    The device, the memory, the network or an option of this process keeps it from being loaded;
    another worker may be able to.
    """


class JobFailed(TrbatchError):
    """The job cannot be finished."""

    exit_code = 4


class Cancelled(TrbatchError):
    """Somebody cancelled the job."""

    exit_code = 5


class TimedOut(TrbatchError):
    """A time limit passed before the work was done."""

    exit_code = 6


class Expired(TimedOut):
    """The job's deadline passed before all of its rows were done."""


class ResumeRefused(TrbatchError):
    """A job of this name exists and was made with other settings or other input."""

    exit_code = 7


class Unreachable(TrbatchError):
    """Redis or the storage cannot be reached."""

    exit_code = 75


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row has no text: a stable `code` for programs and a `message` for people."""

    code: str
    message: str
