"""Whether the embedded server runs: its process, and what it answers."""

from __future__ import annotations

import enum
import os
import subprocess
from pathlib import Path
from urllib.parse import quote

import redis

from trbatch.server_place import refuse_strangers, server_folder, socket_path

ANSWER_LIMIT_S = 5.0


class Answer(enum.Enum):
    """What a ping comes to."""

    READY = enum.auto()  # served, or refused: with a full disk, say
    BUSY = enum.auto()  # somebody is there who does not answer, or still loads the log
    NOBODY = enum.auto()


def url_of(folder: Path | None = None) -> str:
    """The URL of the server of a folder; None is this user's own.

    Raises:
        Unreachable: what listens there may be somebody else's.
    """
    folder = folder or server_folder()
    refuse_strangers(folder)
    return "unix://" + quote(str(socket_path(folder)))


def client_of(url: str) -> redis.Redis:
    """A client that waits for no answer longer than `ANSWER_LIMIT_S`."""
    return redis.Redis.from_url(url, socket_timeout=ANSWER_LIMIT_S, retry=None)


def answers(url: str) -> bool:
    """Whether a server serves there, or refuses to."""
    return answer_of(url) is Answer.READY


def answer_of(url: str) -> Answer:
    """What a ping comes to there."""
    with client_of(url) as client:
        try:
            client.ping()
        except (redis.TimeoutError, redis.exceptions.BusyLoadingError):
            return Answer.BUSY
        except (redis.ResponseError, redis.AuthenticationError):
            return Answer.READY
        except redis.ConnectionError:
            return Answer.NOBODY
    return Answer.READY


def pid_of(folder: Path) -> int:
    """The process of this folder's server, as it has written it down; 0 if it has not."""
    try:
        return int((folder / "server.pid").read_text())
    except (FileNotFoundError, ValueError):  # not started, or stopped, or just being written
        return 0


def live_pid(folder: Path) -> int:
    """The process of this folder's server, 0 if it does not live.

    After a crash its number may be another process's by now: ours works in the folder.
    """
    pid = pid_of(folder)
    if not alive(pid):
        return 0
    try:
        return pid if os.path.samefile(f"/proc/{pid}/cwd", folder) else 0
    except OSError:
        if Path("/proc/self").exists():
            return 0
    command = ["ps", "-o", "command=", "-p", str(pid)]
    words = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return pid if str(folder) in words or str(socket_path(folder)) in words else 0


def alive(pid: int) -> bool:
    """Whether a process lives; 0 and a zombie do not."""
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:  # gone since, or a system without /proc
        return not Path("/proc/self").exists()
