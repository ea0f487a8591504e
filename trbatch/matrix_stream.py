"""The stream through which the workers of a task share its matrix. Bytes in, bytes out.

    <key>            stream of packed deltas, one entry a push
    <key>:snapshot   a whole matrix, with the stream position that it includes, for those who join
    <key>:turn       whoever holds it writes the next snapshot
    <key>:forgotten  changes when all of it was forgotten on purpose, for a file that replaces it

Every worker reads every entry in stream order, its own included. What a snapshot includes is
trimmed from the stream, so both stay small; all of it is forgotten a day after the last push, when
the saved file is the truth again.

A position is `<entry>/<life>`: the last entry that was read, and which beginning of the stream it
belongs to. A server that came back empty, or with an older state of itself, is known by it.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.retry import Retry

from trbatch.engine.sequence import TaskKey
from trbatch.matrices import before
from trbatch.queue import JobQueue
from trbatch.queue_names import matrix_key
from trbatch.storage import folder as storage_folder

BEGIN = "0-0"  # before the first entry
ENTRIES_A_SNAPSHOT = 32
_KEEP_S = 24 * 3600
_TURN_S = 30
_MOST_ENTRIES = 1024  # if nobody manages to write a snapshot
_TIMEOUT_S = 5.0
_LONGEST = 60  # letters of a position: two numbers of 64 bits and a life
_POSITION = re.compile(r"[0-9]+-[0-9]+(/[0-9a-f]*)?")
_JOINS = 3  # tries: what one look finds may be gone at the next
_LARGEST = 512 << 20  # bytes of a snapshot; one of 256,000 tokens has some 10 million


@dataclass(frozen=True, slots=True)
class News:
    """What came since the last time. `whole` replaces everything, then `deltas` are applied.

    `lost`: the server does not know any more what this copy was made of; join again. `stale`: what
    this copy was made of was replaced on purpose; its saved file is the truth.
    """

    whole: bytes | None
    deltas: list[bytes]
    lost: bool = False
    stale: bool = False


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
        self._forgotten: bytes | None = None  # as it was when this copy was made

    def join(self, own: bytes) -> bytes | None:
        """Become one of the copies.

        Args:
            own: this worker's whole matrix; the beginning if nobody has begun.

        Returns:
            The matrix to begin from instead, None to keep one's own.

        Raises:
            redis.RedisError: no answer, or none that lasts.
        """
        for _ in range(_JOINS):
            forgotten = self._redis.get(f"{self._key}:forgotten")
            assert forgotten is None or isinstance(forgotten, bytes)
            self._forgotten = forgotten
            position = f"{BEGIN}/{secrets.token_hex(4)}"
            whole = _with_position(position, own)
            if self._redis.set(f"{self._key}:snapshot", whole, nx=True, ex=_KEEP_S):
                self._redis.delete(self._key)  # of an older time
                self.position = position
                return None
            if (found := self._snapshot()) is not None:
                return found
        raise redis.RedisError(f"{self._key} comes and goes")

    def exchange(self, delta: bytes) -> News:
        """Send what changed here (b"" for nothing) and read what was sent by all.

        Nothing is sent where it does not belong any more, because the stream is another's now.
        """
        last, life = _parted(self.position)
        with self._redis.pipeline() as pipeline:
            pipeline.xrange(self._key, min=last, max=last)
            pipeline.getrange(f"{self._key}:snapshot", 0, 63)
            pipeline.get(f"{self._key}:forgotten")
            ours, head, forgotten = pipeline.execute()
        if forgotten is not None and forgotten != self._forgotten:
            return News(None, [], stale=True)
        included = _position_of(head)
        if not head or _parted(included)[1] != life:
            return News(None, [], lost=True)
        with self._redis.pipeline() as pipeline:
            if delta:
                self._push(pipeline, delta)
                pipeline.expire(f"{self._key}:snapshot", _KEEP_S)
            pipeline.xrange(self._key, min=f"({last}", count=2 * _MOST_ENTRIES)
            entries = pipeline.execute()[-1]
        whole = None
        if before(self.position, included):
            # Entries after our position may be gone: the snapshot has them.
            whole = self._snapshot()
            last, life = _parted(self.position)
            entries = [entry for entry in entries if before(last, entry[0].decode())]
        elif not ours and last != BEGIN and self.position != included:
            # The server has an older state again, without what we have read.
            return News(None, [], lost=True)
        if entries:
            self.position = f"{entries[-1][0].decode()}/{life}"
        self._since_snapshot += len(entries)
        return News(whole, [fields[b"d"] for _, fields in entries if b"d" in fields])

    def wants_snapshot(self) -> bool:
        """Whether it is this worker's turn to write one; then `write_snapshot` should follow."""
        if self._since_snapshot < ENTRIES_A_SNAPSHOT:
            return False
        self._since_snapshot = 0
        return bool(self._redis.set(f"{self._key}:turn", b"1", nx=True, ex=_TURN_S))

    def write_snapshot(self, whole: bytes, position: str, changes: bytes = b"") -> bool:
        """Keep a whole matrix that includes everything up to `position`; trim what it includes.

        Args:
            changes: what of it was not sent yet. It is sent in the same moment: who begins from
                this snapshot has no row that the others will never get.

        Returns:
            Whether it was kept. Not if somebody else has kept a later one meanwhile, or if the
            stream has begun anew: then the changes were not sent.
        """
        key = f"{self._key}:snapshot"
        last, life = _parted(position)
        with self._redis.pipeline() as pipeline:
            pipeline.watch(key)  # type: ignore[no-untyped-call]
            kept = _position_of(pipeline.getrange(key, 0, 63))  # type: ignore[arg-type]
            if _parted(kept)[1] != life or before(position, kept):
                return False
            pipeline.multi()
            if changes:
                self._push(pipeline, changes)
            pipeline.set(key, _with_position(position, whole), ex=_KEEP_S)
            pipeline.xtrim(self._key, minid=last, approximate=False)
            try:
                pipeline.execute()
            except redis.WatchError:
                return False
        return True

    def _push(self, pipeline: Pipeline, delta: bytes) -> None:
        pipeline.xadd(self._key, {"d": delta}, maxlen=_MOST_ENTRIES, approximate=True)
        pipeline.expire(self._key, _KEEP_S)

    def _snapshot(self) -> bytes | None:
        key = f"{self._key}:snapshot"
        if int(self._redis.strlen(key)) > _LARGEST:
            self._redis.delete(key)  # no matrix is as large: it is nobody's
            return None
        found = self._redis.get(key)
        if found is None:
            return None
        assert isinstance(found, bytes)
        if b"\n" not in found:
            self._redis.delete(key)  # nor has any of us written this
            return None
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
    # As the storage understands it: `~` and `file://` are ways to write a path.
    folder = storage_folder(task.folder).path if task.folder is not None else ""
    if "://" not in folder:
        folder = os.path.normpath(folder)
    return matrix_key(model, "\0".join((task.name, folder, task.apart)))


def forget(connection: redis.Redis, model: str, task: TaskKey) -> None:
    """Forget what is shared of this task: its saved file is the truth now.

    Workers that hold a copy hear of it with their next exchange and let go of it.
    """
    key = stream_key(model, task)
    with connection.pipeline() as pipeline:
        pipeline.set(f"{key}:forgotten", secrets.token_hex(8), ex=_KEEP_S)
        pipeline.delete(key, f"{key}:snapshot", f"{key}:turn")
        pipeline.execute()


def _with_position(position: str, whole: bytes) -> bytes:
    return position.encode() + b"\n" + whole


def _position_of(snapshot: bytes) -> str:
    position = snapshot.partition(b"\n")[0].decode("ascii", "replace")
    known = len(position) < _LONGEST and _POSITION.fullmatch(position)  # it comes out of Redis
    return position if known else BEGIN


def _parted(position: str) -> tuple[str, str]:
    entry, _, life = position.partition("/")
    return entry, life
