"""How a worker process died, and whether it was its own doing.

Only a process that died of what it did makes its rows suspect. Its own doing are: an exit code that
no worker gives on purpose, a signal that the processor or the C library raises (SIGSEGV, SIGBUS,
SIGABRT, …), a hang, and a SIGKILL by the kernel for the memory that this very process took. Every
other signal came from outside, and the rows are innocent. In doubt it was somebody else.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trbatch.errors import ModelError, Unreachable, UsageError

OWN_SIGNALS = frozenset(
    {
        signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV,
        signal.SIGSYS, signal.SIGTRAP,
    }
)  # fmt: skip
OWN_SHARE = 0.5  # of the memory there is: a process with less did not fill it

STOPPED = frozenset(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
_OF_OTHERS = {0, Unreachable.exit_code, *STOPPED}  # or of nobody
_ON_PURPOSE = {*_OF_OTHERS, UsageError.exit_code, ModelError.exit_code}
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a process."""

    code: int  # as of a `subprocess.Popen`: negative is a signal
    cause: str  # in words
    own: bool  # of what it did itself

    @property
    def on_purpose(self) -> bool:
        """Whether it ended as a worker ends, well or with an error that it has told."""
        return self.code in _ON_PURPOSE


def judge(code: int, *, hung: bool = False, out_of_memory: bool = False) -> Death:
    """What is to be thought of an exit code.

    Args:
        code: as of a `subprocess.Popen`.
        hung: whether the supervisor killed it, since its engine gave no sign of life.
        out_of_memory: whether the kernel killed it for its memory.
    """
    if hung:
        return Death(code, "its engine hung", own=True)
    if code >= 0:
        return Death(code, f"exit code {code}", own=code not in _OF_OTHERS)
    name = _signal_name(-code)
    if -code == signal.SIGKILL and out_of_memory:
        return Death(code, f"{name}: the kernel ran out of memory", own=True)
    if -code in OWN_SIGNALS:
        return Death(code, name, own=True)
    return Death(code, f"{name} from outside", own=False)


class MemoryWatch:
    """Tells a SIGKILL of the kernel, for a process' memory, from anybody else's.

    The kernel counts whom it kills, for this process' group and for the machine, but names nobody
    that an ordinary user may read. So the process must also have had most of the memory itself.

    Args:
        root: of the filesystem; another one for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._events = list(self._counters())
        self._limit = self._least_limit()
        self._before = self._kills()
        self._now = self._before
        self._resident = 0

    def look(self, pid: int) -> None:
        """Note the size of the process and the kernel's count; call it about once a second."""
        self._before, self._now = self._now, self._kills()
        with contextlib.suppress(OSError, ValueError, IndexError):  # it is ending just now
            pages = int((self._root / f"proc/{pid}/statm").read_text().split()[1])
            self._resident = pages * _PAGE

    def killed(self) -> bool:
        """Whether the process, dead since the last look, was killed for its memory."""
        return self._kills() > self._before and self._resident >= OWN_SHARE * self._limit

    def _kills(self) -> int:
        """How often the kernel has killed, by the nearest count that there is."""
        for file in self._events:
            for line in _lines(file):
                name, _, count = line.partition(" ")
                if name == "oom_kill" and count.strip().isdigit():
                    return int(count)
        return 0

    def _counters(self) -> Iterator[Path]:
        for folder in self._groups():
            yield folder / "memory.events"  # version 2
            yield folder / "memory.oom_control"  # version 1
        yield self._root / "proc/vmstat"

    def _least_limit(self) -> float:
        """Bytes that there are: of the group, else of the machine."""
        limits = [float("inf")]
        for folder in self._groups():
            for name in ("memory.max", "memory.limit_in_bytes"):
                limits += [float(line) for line in _lines(folder / name) if line.isdigit()]
        for line in _lines(self._root / "proc/meminfo"):
            if line.startswith("MemTotal:"):
                limits.append(float(line.split()[1]) * 1024)
        return min(limits)

    def _groups(self) -> Iterator[Path]:
        """Folders of this process' memory group; in a container its own name may lead nowhere."""
        for line in _lines(self._root / "proc/self/cgroup"):
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                mount = self._root / "sys/fs/cgroup" / kinds
                yield mount / path.lstrip("/")
                yield mount


def is_stopped(pid: int) -> bool:
    """Whether somebody has stopped the process (SIGSTOP, a debugger): that is no hang."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "Tt"
    except (OSError, IndexError):  # gone, or no Linux
        return False


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # this machine has no such file
        return []


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
