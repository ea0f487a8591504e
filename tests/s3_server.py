"""A server of the S3 protocol (moto's) in a process of its own, and what it was asked."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Nothing of the user's: neither a profile nor a request for a machine's own credentials.
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_REQUEST = re.compile(r'"(GET|PUT|POST|DELETE|HEAD) (\S+) HTTP')


class S3Server:
    """Where it listens, and its log of requests."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to find it."""
        return ENVIRONMENT | {"AWS_ENDPOINT_URL": self.url}

    def requests(self, bucket: str) -> list[tuple[str, str]]:
        """(method, path below the bucket) of every request for a bucket so far, in order."""
        found = _REQUEST.findall(self._log.read_text())
        start = f"/{bucket}/"
        return [(verb, path.removeprefix(start)) for verb, path in found if path.startswith(start)]

    def make_bucket(self, name: str) -> None:
        urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/{name}", method="PUT"), timeout=10
        ).close()


@contextmanager
def running(folder: Path) -> Iterator[S3Server]:
    """The server, started and waited for; ended with the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "s3.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            server = S3Server(f"http://127.0.0.1:{port}", log)
            _await(server.url, process)
            yield server
        finally:
            process.kill()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "moto's server did not start"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.1)
