"""What several test files share: a home of their own with its own embedded server."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trbatch import server

OUTSIDE = ("TRBATCH_REDIS_URL", "REDIS_URL", "TRBATCH_MODEL", "TRBATCH_STORE", "TRBATCH_SERVER")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private `TRBATCH_HOME` with nothing of the user's; its server, if started, is stopped."""
    folder = Path(tempfile.mkdtemp(prefix="trb-", dir="/tmp"))
    monkeypatch.setenv("TRBATCH_HOME", str(folder))
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    yield folder
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def redis_url(home: Path) -> str:
    """The URL of a running embedded server that belongs to this test alone."""
    return server.ensure()
