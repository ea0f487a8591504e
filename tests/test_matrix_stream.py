"""The stream through which workers share a matrix, through a real server."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import redis
from matrix_tools import CPU, KEY, TASK, VOCAB, delta, same, small_matrix, write

from trbatch import matrix_stream
from trbatch.engine.calibration import Calibration
from trbatch.engine.paths import PathCounts
from trbatch.engine.replica import Copies
from trbatch.engine.sequence import TaskKey
from trbatch.engine.tasks import Tasks
from trbatch.matrix_stream import ENTRIES_A_SNAPSHOT, MatrixStream


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    connection = redis.Redis.from_url(redis_url)
    yield connection
    connection.close()


class Copy:
    """A worker's copy without its worker."""

    def __init__(self, server: redis.Redis) -> None:
        self.matrix = small_matrix()
        calibration, paths = Calibration(2, CPU), [PathCounts(), PathCounts()]
        self.tasks = Tasks(self.matrix, calibration, paths, places=2, model="m")
        self.tasks.open(TaskKey("other"), busy=set())
        self.index = self.tasks.open(TASK, busy=set()).index
        self.copies = Copies(self.matrix, self.tasks)
        self.stream = MatrixStream(server, KEY)

    def join(self) -> None:
        whole = self.stream.join(self.copies.whole(TASK))
        self.copies.merge(TASK, whole, [], self.stream.position)

    def exchange(self) -> None:
        news = self.stream.exchange(self.copies.take(TASK))
        assert not news.lost
        self.copies.merge(TASK, news.whole, news.deltas, self.stream.position)
        if self.stream.wants_snapshot():
            self.stream.write_snapshot(self.copies.whole(TASK), self.copies.position(TASK))


@pytest.mark.parametrize("seed", range(6))
def test_copies_end_equal_whatever_the_order_and_a_late_one_has_it_all(
    server: redis.Redis, seed: int
) -> None:
    order = random.Random(seed)
    copies = [Copy(server) for _ in range(3)]
    write(copies[0].matrix, 999)  # it comes with a saved matrix
    for copy in copies:
        copy.join()
    assert same(copies[0].matrix, copies[2].matrix), "the first one's is everybody's beginning"
    for step in range(60):
        copy = order.choice(copies)
        if order.random() < 0.6:
            write(copy.matrix, seed * 1000 + step)
        else:
            copy.exchange()
    late = Copy(server)
    late.join()
    for copy in [*copies, late] * 2:
        copy.exchange()
    for other in (*copies[1:], late):
        assert same(copies[0].matrix, other.matrix)
    assert (copies[0].matrix.shared[1] >= 0).any()


def test_what_is_kept_on_the_server_is_bounded(server: redis.Redis) -> None:
    one, other = Copy(server), Copy(server)
    one.join()
    other.join()
    for step in range(4 * ENTRIES_A_SNAPSHOT):
        write(one.matrix, step)
        one.exchange()
        server.delete(f"{KEY}:turn")  # half a minute has passed
    assert server.xlen(KEY) <= ENTRIES_A_SNAPSHOT + 1
    # What was trimmed before the other one read it, the snapshot has.
    write(other.matrix, 5000)
    for copy in (other, one, other):
        copy.exchange()
    assert same(one.matrix, other.matrix)
    assert 0 < server.ttl(KEY) <= 24 * 3600
    assert 0 < server.ttl(f"{KEY}:snapshot") <= 24 * 3600


def test_only_one_worker_writes_the_next_snapshot(server: redis.Redis) -> None:
    copies = [Copy(server), Copy(server)]
    for copy in copies:
        copy.join()
        copy.stream._since_snapshot = ENTRIES_A_SNAPSHOT
    assert [copy.stream.wants_snapshot() for copy in copies] == [True, False]


def test_a_wiped_server_is_noticed_and_joined_again(server: redis.Redis) -> None:
    copy = Copy(server)
    copy.join()
    write(copy.matrix, 1)
    copy.exchange()
    server.flushall()
    write(copy.matrix, 2)
    assert copy.stream.exchange(copy.copies.take(TASK)).lost
    copy.join()
    other = Copy(server)
    other.join()
    assert same(copy.matrix, other.matrix)


def test_entries_and_snapshots_that_cannot_be_read_are_skipped(
    server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = Copy(server), Copy(server)
    one.join()
    other.join()
    server.xadd(KEY, {"d": b"hostile"})
    server.xadd(KEY, {"x": b"nothing of ours"})
    server.xadd(KEY, {"d": delta(tokens=np.array([VOCAB + 5], np.int32)).pack()})
    write(one.matrix, 1)
    for copy in (one, other):
        copy.exchange()
    assert same(one.matrix, other.matrix)
    assert "skipped" in caplog.text
    server.set(f"{KEY}:snapshot", b"not-a-position\nnonsense")
    late = Copy(server)
    late.join()
    late.exchange()
    assert same(one.matrix, late.matrix)


def test_streams_can_be_forgotten(server: redis.Redis) -> None:
    stream = MatrixStream(server, matrix_stream.stream_key("m", TaskKey("night")))
    stream.join(b"whole")
    stream.exchange(b"delta")
    assert server.keys("trbatch:matrix:*")
    matrix_stream.forget(server, "m", TaskKey("night"))
    assert not server.keys("trbatch:matrix:*")
