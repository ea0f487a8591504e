"""Rows that take slots on the device: all of a step at once, and before anything is started."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import tiny
import torch

from trbatch.engine.step_plain import PlainOperations

PROMPTS = tiny.repetitive(5, seed=4) + tiny.prompts(4, seed=5)
LENGTH = 8


def engine(slots: int) -> Any:
    return tiny.engine(
        tiny.loaded("llama"), operations=PlainOperations(), enforce_eager=True, tree_size=5,
        max_num_seqs=slots,
    )  # fmt: skip


def requests() -> list[Any]:
    return [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(PROMPTS)]


def expected(*keys: int) -> dict[int, list[int]]:
    network = tiny.network("llama")
    return {key: tiny.generate(network, PROMPTS[key], LENGTH) for key in keys}


def texts(one: Any) -> dict[int, list[int]]:
    return {key: done.token_ids for key, done in tiny.decode(one, []).items()}


def noted(one: Any, *keys: int) -> list[Any]:
    """Rows that have slots and pages, and are not on the device yet."""
    for key in keys:
        one.add(requests()[key])
    one._stepper.write_admitted, write = lambda: None, one._stepper.write_admitted
    one._admit()
    one._stepper.write_admitted = write
    return [s for s in one._scheduler.running if s.slot in one._stepper._noted]


def test_nothing_is_started_before_all_that_were_admitted_are_on_the_device() -> None:
    one = engine(4)
    rows = noted(one, 0, 1)
    stepper = one._stepper
    assert len(rows) == 2 and not stepper.state.slots.active.any()
    for start in (
        lambda: stepper.launch(rows, 5),
        lambda: stepper.first(rows, torch.zeros(2, one.loaded.vocab_size)),
        lambda: one._device_prefiller.run(rows, 64),
        lambda: one._make_room(5),
    ):
        with pytest.raises(AssertionError, match="not on the device"):
            start()
    with pytest.raises(AssertionError, match="twice"):
        stepper.admit(rows[0])
    stepper.write_admitted()
    for sequence in rows:
        slots, slot = stepper.state.slots, sequence.slot
        assert slots.texts[slot, : slots.lengths[slot]].tolist() == sequence.tokens
        pages = slots.pages[slot]
        assert pages[pages >= 0].tolist() == sequence.room.pages
    assert texts(one) == expected(0, 1)


def test_rows_that_leave_before_they_were_written_never_are() -> None:
    """And their slots are others' then."""
    one = engine(3)
    rows = noted(one, 0, 1, 2)
    one.abort([rows[1].request.key])
    one._preempt(rows[2])
    assert list(one._stepper._noted) == [rows[0].slot]
    one.add(requests()[3])
    assert texts(one) == expected(0, 2, 3)


def test_rows_that_memory_did_not_suffice_for_are_admitted_again() -> None:
    one = engine(4)
    admit, failures = one._stepper.operations.admit, count()

    def failing(state: Any, packed: Any, many: int) -> None:
        if next(failures) == 0:
            raise torch.OutOfMemoryError("no more")
        admit(state, packed, many)

    one._stepper.operations.admit = failing
    for request in requests():
        one.add(request)
    assert texts(one) == expected(*range(len(PROMPTS))) and next(failures) > 1


def test_all_that_a_step_admits_goes_to_the_device_at_once() -> None:
    one = engine(6)
    admit, counts = one._stepper.operations.admit, []

    def counted(state: Any, packed: Any, many: int) -> None:
        counts.append(many)
        admit(state, packed, many)

    one._stepper.operations.admit = counted
    for request in requests():
        one.add(request)
    one.step()
    assert counts == [6]
    tiny.decode(one, [])
    assert sum(counts) == len(PROMPTS)
