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
    left = server.keys("trbatch:matrix:*")
    assert [key.rpartition(b":")[2] for key in left] == [b"forgotten"]
    assert 0 < server.ttl(left[0]) <= 24 * 3600


def test_what_was_replaced_on_purpose_is_joined_by_nobody_who_held_it(server: redis.Redis) -> None:
    key = matrix_stream.stream_key("m", TaskKey("night"))
    old, new = MatrixStream(server, key), MatrixStream(server, key)
    old.join(b"old")
    matrix_stream.forget(server, "m", TaskKey("night"))
    assert new.join(b"new") is None
    news = old.exchange(b"delta")
    assert news.stale and not news.deltas
    assert server.xlen(key) == 0, "it would be read as the new one's"
    assert not new.exchange(b"").stale
    late = MatrixStream(server, key)
    assert late.join(b"late") == b"new"


def test_who_knows_nothing_yet_and_finds_a_poisoned_snapshot_goes_on(server: redis.Redis) -> None:
    for poison in (b"0-0\n", b"", b"0-0", b"\xff\n"):
        server.set(f"{KEY}:snapshot", poison)
        copy = Copy(server)
        write(copy.matrix, 3)
        copy.join()
        copy.exchange()
        server.flushall()


def test_a_server_that_comes_back_with_an_older_state_is_noticed(server: redis.Redis) -> None:
    """As one does that is restored from its last dump: then all begin again from what it has."""
    one, other = Copy(server), Copy(server)
    one.join()
    other.join()
    write(one.matrix, 1)
    for copy in (one, other):
        copy.exchange()
    dumped = {key: server.dump(key) for key in (KEY, f"{KEY}:snapshot")}
    write(one.matrix, 2)
    for copy in (one, other):
        copy.exchange()
    for key, value in dumped.items():
        server.restore(key, 0, value, replace=True)
    write(other.matrix, 3)
    write(one.matrix, 4)
    for copy in (one, other) * 4:
        news = copy.stream.exchange(data := copy.copies.take(TASK))
        if news.lost:
            copy.copies.put_back(TASK, data)
            copy.join()
        else:
            copy.copies.merge(TASK, news.whole, news.deltas, copy.stream.position)
    assert same(one.matrix, other.matrix)
    late = Copy(server)
    late.join()
    late.exchange()
    assert same(late.matrix, one.matrix)
    assert (one.matrix.shared[1] >= 0).any()


def test_a_snapshot_has_no_row_that_the_others_will_never_get(server: redis.Redis) -> None:
    """Its writer may die before it sends what it has changed since."""
    writer, other = Copy(server), Copy(server)
    for copy in (writer, other):
        copy.join()
    write(writer.matrix, 1)
    writer.exchange()
    write(writer.matrix, 2)
    changes = writer.copies.take(TASK)
    kept = writer.stream.write_snapshot(
        writer.copies.whole(TASK), writer.copies.position(TASK), changes
    )
    assert kept
    late = Copy(server)
    late.join()
    for copy in (late, other):
        copy.exchange()
    assert same(late.matrix, other.matrix) and same(late.matrix, writer.matrix)


def test_a_late_snapshot_takes_no_later_ones_place(server: redis.Redis) -> None:
    slow, quick = Copy(server), Copy(server)
    for copy in (slow, quick):
        copy.join()
    write(slow.matrix, 1)
    slow.exchange()
    whole, position = slow.copies.whole(TASK), slow.copies.position(TASK)
    write(quick.matrix, 2)
    quick.exchange()
    assert quick.stream.write_snapshot(quick.copies.whole(TASK), quick.copies.position(TASK))
    assert not slow.stream.write_snapshot(whole, position, b"changes")
    assert server.xlen(KEY) == 1, "nothing was sent"
    late = Copy(server)
    late.join()
    late.exchange()
    assert same(late.matrix, quick.matrix)
