"""A queue server with options of its own, and a TLS terminator to put in front of it."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trbatch.server_place import server_binary


@contextlib.contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[int]:
    """The server of the package on a port of this host alone; gives the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [str(server_binary()), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--dir", str(folder), "--save", "", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 20
            while True:
                assert process.poll() is None, "the server did not start"
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield port
        finally:
            process.kill()


@dataclass
class Terminator:
    """Takes TLS in and passes on what is inside, as stunnel or a cloud's load balancer does."""

    context: ssl.SSLContext
    target: int  # port
    port: int = 0
    sent: bytearray = field(default_factory=bytearray)  # what came from clients, as on the wire

    @contextlib.contextmanager
    def running(self) -> Iterator[Terminator]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            thread = threading.Thread(target=self._accept, args=(listener,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join(5)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, wire: socket.socket) -> None:
        """One client: ciphertext on one side, plain text on the other."""
        inbox, outbox = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self.context.wrap_bio(inbox, outbox, server_side=True)
        lock = threading.Lock()
        with (
            wire,
            socket.create_connection(("127.0.0.1", self.target)) as inside,
            contextlib.suppress(OSError, ssl.SSLError),
        ):
            if not self._shake_hands(wire, tls, inbox, outbox):
                return
            arguments = (inside, wire, tls, outbox, lock)
            threading.Thread(target=self._answer, args=arguments, daemon=True).start()
            while True:
                try:
                    with lock:
                        data = tls.read(65536)
                    if not data:
                        return
                    inside.sendall(data)
                except ssl.SSLWantReadError:
                    if not self._receive(wire, inbox):
                        return

    def _shake_hands(
        self, wire: socket.socket, tls: ssl.SSLObject, inbox: ssl.MemoryBIO, outbox: ssl.MemoryBIO
    ) -> bool:
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                wire.sendall(outbox.read())
                if not self._receive(wire, inbox):
                    return False
                continue
            except ssl.SSLError:
                wire.sendall(outbox.read())  # the alert that says why
                return False
            wire.sendall(outbox.read())
            return True

    def _receive(self, wire: socket.socket, inbox: ssl.MemoryBIO) -> bool:
        data = wire.recv(65536)
        self.sent += data
        inbox.write(data)
        return bool(data)

    @staticmethod
    def _answer(
        inside: socket.socket,
        wire: socket.socket,
        tls: ssl.SSLObject,
        outbox: ssl.MemoryBIO,
        lock: threading.Lock,
    ) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := inside.recv(65536):
                with lock:
                    tls.write(data)
                    cipher = outbox.read()
                wire.sendall(cipher)
            wire.shutdown(socket.SHUT_RDWR)
