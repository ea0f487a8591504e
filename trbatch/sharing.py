"""How a worker shares its tasks' matrices with the other workers: what is sent and read when.

The worker's own thread talks to the stream (`matrix_stream`), the engine's thread holds the matrix;
between them go packed bytes. A worker that cannot reach the server goes on with what it has and
sends what it learned when it can.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import redis

from trbatch.engine.sequence import TaskKey
from trbatch.engine_events import Broken, Changes, Whole
from trbatch.engine_thread import EngineThread
from trbatch.matrix_stream import MatrixStream, connect, forget, stream_key
from trbatch.queue import JobQueue

logger = logging.getLogger("trbatch.worker")

EVERY_S = 3.0  # between two exchanges
RETRY_S = 30.0  # after a server that did not answer
MOST_ABSENT = 200  # answers, some ten minutes, after which a task's next chunk opens it again
CLOSE_S = 10.0  # for the last exchange of a worker that ends


@dataclass(slots=True)
class _Share:
    """One task's matrix, as far as it is shared."""

    stream: MatrixStream
    model: str  # fingerprint
    joined: bool = False
    asked: bool = False  # the engine was asked for something and has not answered
    finishing: bool = False  # exchange at once, then save
    last: bool = False  # what was asked for was asked for after the end: all is in it
    due: float = 0.0
    snapshot: bool = False  # the whole that was asked for is to be kept as the next snapshot
    replaces: bool | None = None  # what was shared of the task is yet to be forgotten; not known
    absent: int = 0  # times that the engine had no such task open


class Sharing:
    """The shared matrices of the model that the engine holds.

    Args:
        engine: the engine's thread.
        jobs: the queue, on whose server the streams lie.
    """

    def __init__(self, engine: EngineThread, jobs: JobQueue) -> None:
        self._engine, self._jobs = engine, jobs
        self._connection: redis.Redis | None = None
        self._shares: dict[TaskKey, _Share] = {}
        self._silent = False  # whether the last exchange failed, so that it is said once

    def forget(self) -> None:
        """Another model is loaded: its tasks are opened anew."""
        self._shares.clear()

    def open(self, task: TaskKey, model: str) -> None:
        """Share this task's matrix, of the model with this fingerprint, from now on."""
        if task in self._shares:
            return
        if self._connection is None:
            self._connection = connect(self._jobs)
        if task.cold:
            self._shares.pop(_warm(task), None)
        stream = MatrixStream(self._connection, stream_key(model, task))
        self._shares[task] = _Share(stream, model)
        self._ask(task)

    def tick(self) -> None:
        """Begin the exchanges that are due."""
        now = time.monotonic()
        for task, share in self._shares.items():  # answers, which may end one, come later
            if not share.asked and (share.finishing or now >= share.due):
                self._ask(task)

    def finish(self, task: TaskKey) -> None:
        """Exchange to the end of the stream, then save: a job has come to its end."""
        share = self._shares.get(task)
        if share is None:
            self._engine.save()
            return
        share.finishing = True
        self.tick()

    def close(self) -> None:
        """A last exchange of every task, waited for: others shall have what this one learned."""
        for task in self._shares:
            self.finish(task)
        end = time.monotonic() + CLOSE_S
        while any(share.finishing for share in self._shares.values()) and time.monotonic() < end:
            self.tick()
            alive = self._engine.alive  # asked first: behind its last event comes nothing
            events = self._engine.next_events(0.1)
            if not events and not alive:
                return
            for event in events:
                match event:
                    case Changes() | Whole():
                        self.heed(event)
                    case Broken(error):
                        logger.warning("the engine failed at the end: %s", error)
                        return
                    case _:
                        logger.debug("too late: %s", type(event).__name__)

    def heed(self, event: Changes | Whole) -> None:
        """Go on with what the engine has answered."""
        share = self._shares.get(event.task)
        if share is None:
            return
        share.asked = False
        share.due = time.monotonic() + EVERY_S
        try:
            if isinstance(event, Whole):
                self._heed_whole(event, share)
            else:
                self._exchange(event, share)
            self._silent = False
        except redis.RedisError as error:
            self._fail(event, share, error)
        if (share.finishing or share.snapshot) and event.task in self._shares:
            self._ask(event.task)

    def _ask(self, task: TaskKey) -> None:
        share = self._shares[task]
        share.asked, share.last = True, share.finishing
        if share.snapshot:
            self._engine.send_whole(task, with_changes=True)
        elif share.joined:
            self._engine.send_changes(task)
        else:
            self._engine.send_whole(task)

    def _heed_whole(self, event: Whole, share: _Share) -> None:
        if not event.data:
            # It has no room for this task now, or had to make some. Its rows may wait for a place.
            share.absent += 1
            share.joined = share.snapshot = False
            if share.finishing or share.absent > MOST_ABSENT:
                self._drop(event.task, share)
            return
        share.absent = 0
        if share.snapshot:
            self._keep_snapshot(event, share)
            return
        whole = share.stream.join(event.data)
        share.joined = True
        # It takes the place of what its task has learned, on the server as in the file.
        share.replaces = event.cold if share.replaces is None else share.replaces
        self._engine.merge(event.task, whole, [], share.stream.position)

    def _keep_snapshot(self, event: Whole, share: _Share) -> None:
        share.snapshot = False
        in_place = event.position == share.stream.position
        if not in_place or not share.stream.write_snapshot(
            event.data, event.position, event.changes
        ):
            self._put_back(event.task, event.changes)

    def _exchange(self, event: Changes, share: _Share) -> None:
        if event.position != share.stream.position:
            # The engine had to make room and has loaded the matrix again: begin again, too.
            share.joined = False
            self._put_back(event.task, event.data)
            return
        if share.replaces and self._connection is not None:
            forget(self._connection, share.model, _warm(event.task))
            share.replaces = False
        news = share.stream.exchange(event.data)
        if news.stale:
            self._engine.outdate(event.task)
            self._drop(event.task, share)
            return
        if news.lost:
            share.joined = False
            self._put_back(event.task, event.data)
            return
        self._engine.merge(event.task, news.whole, news.deltas, share.stream.position)
        if share.finishing and share.last:
            share.finishing = False
            self._engine.save()
        share.snapshot = share.stream.wants_snapshot()

    def _fail(self, event: Changes | Whole, share: _Share, error: redis.RedisError) -> None:
        if not self._silent:
            logger.warning("the shared matrix cannot be reached, going on without: %s", error)
        self._silent = True
        share.due, share.snapshot = time.monotonic() + RETRY_S, False
        self._put_back(event.task, event.data if isinstance(event, Changes) else event.changes)
        self._save_if_finishing(share)

    def _drop(self, task: TaskKey, share: _Share) -> None:
        """Share this task no longer; its next chunk opens it again."""
        del self._shares[task]
        self._save_if_finishing(share)

    def _save_if_finishing(self, share: _Share) -> None:
        if share.finishing:
            share.finishing = False
            self._engine.save()

    def _put_back(self, task: TaskKey, changes: bytes) -> None:
        if changes:
            self._engine.put_back(task, changes)


def _warm(task: TaskKey) -> TaskKey:
    """The task that a cold job belongs to, as its other jobs open it."""
    return replace(task, apart="", cold=False)
