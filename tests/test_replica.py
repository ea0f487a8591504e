"""A matrix as one of several copies: packed changes make the same rows elsewhere."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_tools import VOCAB, delta, same, small_matrix, write

from trbatch.engine import replica
from trbatch.engine.host_rows import HostRows
from trbatch.engine.replica import BadDelta, unpack


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=4))
def test_changes_packed_and_applied_make_the_same_rows(seeds: list[int]) -> None:
    one, other = small_matrix(), small_matrix()
    for seed in seeds:
        write(one, seed)
    packed = replica.take_changes(one, 1).pack()
    replica.apply(other, 1, unpack(packed, other))
    assert same(one, other)
    assert not len(replica.take_changes(one, 1)), "they are taken once"
    assert not len(replica.take_changes(other, 1)), "what others changed is not ours to send"


def test_what_the_cpus_rows_write_is_a_change_too() -> None:
    one, other = small_matrix(), small_matrix()
    rows = HostRows.of(one)
    rows.write_shared(1, [5, 6, 7], np.array([1, 2, 3, 4], dtype=np.int32))
    replica.apply(other, 1, replica.take_changes(one, 1))
    assert same(one, other)
    assert other.shared[1, 5].tolist() == [1, 2, 3, 4]


def test_a_row_that_changed_here_and_was_not_sent_stays() -> None:
    here, there = small_matrix(), small_matrix()
    write(there, 1)
    write(here, 2)
    before = here.shared[1].clone()
    mine = here.changed[1].clone()
    replica.apply(here, 1, replica.take_changes(there, 1))
    assert torch.equal(here.shared[1][mine], before[mine])
    assert torch.equal(here.shared[1][~mine], there.shared[1][~mine])


def test_what_could_not_be_sent_is_sent_the_next_time() -> None:
    one = small_matrix()
    write(one, 1)
    lost = replica.take_changes(one, 1)
    replica.put_back(one, 1, lost)
    again = replica.take_changes(one, 1)
    assert again.tokens.tolist() == lost.tokens.tolist()
    assert sorted(again.pair_keys.tolist()) == sorted(lost.pair_keys.tolist())


def test_another_task_is_not_touched() -> None:
    one, other = small_matrix(), small_matrix()
    write(one, 1, task=0)
    write(one, 2, task=1)
    replica.apply(other, 1, replica.take_changes(one, 1))
    assert (other.shared[0] == -1).all()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no delta", zlib.compress(b""), zlib.compress(b"TRD1" + b"\xff" * 12),
        delta().pack()[:-4], zlib.compress(zlib.decompress(delta().pack())[:-1]),
        zlib.compress(zlib.decompress(delta().pack()) + b"\0"),
        zlib.compress(b"\0" * (1 << 24)),
        delta(rows=np.ones((1, 3), np.int32), pair_rows=np.ones((1, 3), np.int32)).pack(),
        delta(tokens=np.array([VOCAB], np.int32)).pack(),
        delta(tokens=np.array([-1], np.int32)).pack(),
        delta(rows=np.array([[1, 2, 3, VOCAB]], np.int32)).pack(),
        delta(rows=np.array([[1, 2, 3, -2]], np.int32)).pack(),
        delta(pair_keys=np.array([VOCAB * VOCAB], np.int64)).pack(),
        delta(pair_rows=np.array([[1, 2, 3, 1 << 30]], np.int32)).pack(),
    ],
)  # fmt: skip
def test_what_is_no_delta_for_this_matrix_is_refused(data: bytes) -> None:
    unpack(delta().pack(), small_matrix())
    with pytest.raises(BadDelta):
        unpack(data, small_matrix())
