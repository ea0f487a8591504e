"""The stream through which the workers of a task share its matrix. Bytes in, bytes out.

    <key>            stream of packed deltas, one entry a push
    <key>:snapshot   a whole matrix, with the stream position that it includes, for those who join
    <key>:turn       whoever holds it writes the next snapshot

Every worker reads every entry in stream order, its own included. What a snapshot includes is
trimmed from the stream, so both stay small; all of it is forgotten a day after the last push, when
the saved file is the truth again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from trbatch.engine.sequence import TaskKey
from trbatch.matrices import before
from trbatch.queue import JobQueue
from trbatch.queue_names import matrix_key

BEGIN = "0-0"  # before the first entry
ENTRIES_A_SNAPSHOT = 32
_KEEP_S = 24 * 3600
_TURN_S = 30
_MOST_ENTRIES = 1024  # if nobody manages to write a snapshot
_TIMEOUT_S = 5.0
_LONGEST = 42  # letters of a position: two numbers of 64 bits
_LARGEST = 512 << 20  # bytes of a snapshot; one of 256,000 tokens has some 10 million


@dataclass(frozen=True, slots=True)
class News:
    """What came since the last time. `whole` replaces everything, then `deltas` are applied.

    `lost`: the server knows nothing any more; join again.
    """

    whole: bytes | None
    deltas: list[bytes]
    lost: bool = False


class MatrixStream:
    """One worker's place in the stream of one task.

    Args:
        connection: to the queue's server; see `connect`.
        key: of the stream.
    """

    def __init__(self, connection: redis.Redis, key: str) -> None:
        self._redis, self._key = connection, key
        self.position = BEGIN
        self._since_snapshot = 0

    def join(self, own: bytes) -> bytes | None:
        """Become one of the copies.

        Args:
            own: this worker's whole matrix; the beginning if nobody has begun.

        Returns:
            The matrix to begin from instead, None to keep one's own.
        """
        begun = self._redis.set(
            f"{self._key}:snapshot", _with_position(BEGIN, own), nx=True, ex=_KEEP_S
        )
        if begun:
            self._redis.delete(self._key)  # of an older time
            self.position = BEGIN
            return None
        return self._snapshot() or self.join(own)

    def exchange(self, delta: bytes) -> News:
        """Send what changed here (b"" for nothing) and read what was sent by all, in one go."""
        with self._redis.pipeline() as pipeline:
            if delta:
                pipeline.xadd(self._key, {"d": delta}, maxlen=_MOST_ENTRIES, approximate=True)
                pipeline.expire(self._key, _KEEP_S)
                pipeline.expire(f"{self._key}:snapshot", _KEEP_S)
            pipeline.xrange(self._key, min=f"({self.position}", count=2 * _MOST_ENTRIES)
            pipeline.getrange(f"{self._key}:snapshot", 0, 63)
            answers = pipeline.execute()
        entries, head = answers[-2], answers[-1]
        whole = None
        if not head:
            return News(None, [], lost=True)
        if before(self.position, included := _position_of(head)):
            # Entries after our position may be gone: the snapshot has them.
            whole = self._snapshot()
            entries = [entry for entry in entries if before(included, entry[0].decode())]
        if entries:
            self.position = entries[-1][0].decode()
        self._since_snapshot += len(entries)
        return News(whole, [fields[b"d"] for _, fields in entries if b"d" in fields])

    def wants_snapshot(self) -> bool:
        """Whether it is this worker's turn to write one; then `write_snapshot` should follow."""
        if self._since_snapshot < ENTRIES_A_SNAPSHOT:
            return False
        self._since_snapshot = 0
        return bool(self._redis.set(f"{self._key}:turn", b"1", nx=True, ex=_TURN_S))

    def write_snapshot(self, whole: bytes, position: str) -> None:
        """Keep a whole matrix that includes everything up to `position`; trim what it includes."""
        with self._redis.pipeline() as pipeline:
            pipeline.set(f"{self._key}:snapshot", _with_position(position, whole), ex=_KEEP_S)
            pipeline.xtrim(self._key, minid=position, approximate=False)
            pipeline.execute()

    def _snapshot(self) -> bytes | None:
        key = f"{self._key}:snapshot"
        if int(self._redis.strlen(key)) > _LARGEST:
            self._redis.delete(key)  # no matrix is as large: it is nobody's
            return None
        found = self._redis.get(key)
        if found is None:
            return None
        assert isinstance(found, bytes)
        self.position = _position_of(found)
        return found.partition(b"\n")[2]


def connect(jobs: JobQueue) -> redis.Redis:
    """A connection for streams: one that gives up soon, since decoding goes on without."""
    return redis.Redis.from_url(
        jobs.url,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


def stream_key(model: str, task: TaskKey) -> str:
    """Where the workers of a task share its matrix.

    A store's path is part of it: stores share no matrices, and all workers read a job by one path.
    """
    folder = os.fspath(task.folder) if task.folder is not None else ""
    if folder and "://" not in folder:
        folder = os.path.abspath(folder)
    return matrix_key(model, "\0".join((task.name, folder, task.apart)))


def forget(connection: redis.Redis, model: str, task: TaskKey) -> None:
    """Forget what is shared of this task: its saved file is the truth now."""
    key = stream_key(model, task)
    connection.delete(key, f"{key}:snapshot", f"{key}:turn")


def _with_position(position: str, whole: bytes) -> bytes:
    return position.encode() + b"\n" + whole


def _position_of(snapshot: bytes) -> str:
    position = snapshot.partition(b"\n")[0].decode("ascii", "replace")
    milliseconds, _, number = position.partition("-")
    short = len(position) < _LONGEST  # it comes out of Redis
    return position if short and milliseconds.isdecimal() and number.isdecimal() else BEGIN
