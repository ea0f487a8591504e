"""Which queue is used, and what is said of one that cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import redis

from trbatch.errors import Unreachable
from trbatch.queue import JobQueue


def test_without_a_url_the_embedded_server_is_started_and_used(home: Path) -> None:
    with JobQueue.connect() as found:
        assert found.url.startswith("unix://")
        assert found.connection.ping()


def test_the_nearer_url_wins(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    away = "unix:///nowhere/at/all"
    monkeypatch.setenv("REDIS_URL", away)
    monkeypatch.setenv("TRBATCH_REDIS_URL", redis_url)
    with JobQueue.connect() as found:
        assert found.url == redis_url
    monkeypatch.setenv("TRBATCH_REDIS_URL", away)
    with JobQueue.connect(redis_url) as found:
        assert found.url == redis_url


def test_a_server_that_is_away_is_unreachable_and_its_password_stays_secret() -> None:
    with pytest.raises(Unreachable) as caught:
        JobQueue.connect("redis://me:s3cr%40t@localhost:1/0")
    assert caught.value.exit_code == 75
    text = f"{caught.value} {caught.value.hint}"
    assert "redis://me:***@localhost:1/0" in text
    assert "s3cr" not in text


def test_a_wrong_password_is_unreachable(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        connection.config_set("requirepass", "right")
        with pytest.raises(Unreachable):
            JobQueue.connect(f"{redis_url}?password=wrong")
        connection.auth("right")
        connection.config_set("requirepass", "")


def test_the_password_is_not_in_the_repr(redis_url: str) -> None:
    with JobQueue.connect(f"{redis_url}?db=1") as found:
        found.url = "redis://me:secret@host"
        assert "secret" not in repr(found)


def test_the_client_side_imports_no_torch() -> None:
    code = "import sys, trbatch.queue; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
