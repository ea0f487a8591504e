"""The kernel that gives slots to sequences, and its slow twin.

Where there is no GPU it runs in Triton's interpreter; where there is one, compiled on it.
"""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_devices import compiled, on_every_device

from trbatch.engine.admission import HEADER, Newcomer, pack, unpack
from trbatch.engine.device_state import MOST_TURNS, Noise, Slots
from trbatch.engine.device_step import State
from trbatch.engine.kernels import admit as kernel
from trbatch.engine.matrix import Matrix
from trbatch.engine.step_plain import PlainOperations
from trbatch.engine.transfer import to_device

SLOTS, STOPS = 7, 5
PAGES, LONGEST = 1500, 9000  # more than the programs of one row write at a time
NUMBERS = [field.name for field in fields(Slots)]


def used_slots(seed: int, device: str) -> Slots:
    """Slots that somebody had before."""
    torch.manual_seed(seed)
    slots = Slots.empty(
        SLOTS, stops=STOPS, pages=PAGES, longest=LONGEST, device=torch.device(device)
    )
    for name in NUMBERS:
        table = getattr(slots, name)
        table.copy_(torch.randint(0, 2 if table.dtype == torch.bool else 1000, table.shape))
    return slots


def used_matrix(seed: int, device: str, orders: int) -> Matrix:
    """Rows whose slots somebody had before."""
    torch.manual_seed(seed)
    matrix = Matrix(
        slots=SLOTS, vocab_size=8, tasks=1, device=torch.device(device), orders=orders,
        own_rows=4096, pair_rows=8,
    )  # fmt: skip
    matrix.keys.copy_(torch.randint(0, 1 << 40, matrix.keys.shape))
    return matrix


def newcomers(seed: int, count: int) -> list[Newcomer]:
    """Any, of all lengths, with the largest numbers among theirs."""
    rng = random.Random(seed)
    word = 1 << 31

    def some(most: int, *, least: int = 0) -> list[int]:
        length = rng.choice([least, 1, 2, 3, rng.randint(1, most), most])
        return [rng.choice([0, rng.randrange(word), word - 1]) for _ in range(min(length, most))]

    return [
        Newcomer(
            slot, some(LONGEST, least=1), rng.choice([1, 77, word - 1]), some(STOPS), some(PAGES),
            rng.randrange(9), rng.choice([0, rng.randrange(MOST_TURNS), MOST_TURNS - 1]),
            rng.choice([Noise(), Noise(
                rng.randrange(100), rng.uniform(0, 2), rng.random(),
                rng.choice([-1, -(1 << 63), (1 << 63) - 1, rng.randrange(1 << 63)]),
                rng.randrange(word), rng.randrange(1000), rng.random(),
            )]),
        )
        for slot in rng.sample(range(SLOTS), count)
    ]  # fmt: skip


def put(slots: Slots, matrix: Matrix, group: list[Newcomer]) -> None:
    """As it is done one by one, without any numbers in between."""
    for one in group:
        slots.put(
            one.slot, one.tokens, left=one.left, stops=one.stops, pages=one.pages, task=one.task,
            turn=one.turn, noise=one.noise,
        )  # fmt: skip
        matrix.clear_slot(one.slot)


@on_every_device
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**32), count=st.integers(1, SLOTS), orders=st.sampled_from([0, 1, 3]))
def test_slots_are_what_the_slow_twin_makes_of_them(
    device: str, seed: int, count: int, orders: int
) -> None:
    group = newcomers(seed, count)
    places: list[Any] = [
        (used_slots(seed, device), used_matrix(seed, device, orders)) for _ in range(3)
    ]
    packed = to_device(pack(group, places[0][0]), torch.device(device), torch.int32)
    kernel.admit(*places[0], packed, count)
    slots, matrix = places[1]
    state: Any = State(None, matrix, None, slots, packed, packed, False)  # type: ignore[arg-type]
    PlainOperations().admit(state, packed, count)
    put(*places[2], group)
    for slots, matrix in places[:2]:
        for name in NUMBERS:
            assert torch.equal(getattr(slots, name), getattr(places[2][0], name)), name
        assert torch.equal(matrix.keys, places[2][1].keys)


@given(seed=st.integers(0, 2**32), count=st.integers(0, SLOTS))
@settings(deadline=None, max_examples=20)
def test_all_that_was_packed_is_found_again(seed: int, count: int) -> None:
    group = newcomers(seed, count)
    slots = Slots.empty(
        SLOTS, stops=STOPS, pages=PAGES, longest=LONGEST, device=torch.device("cpu")
    )
    packed = torch.from_numpy(pack(group, slots))
    rest = sum(len(one.stops) + len(one.pages) + len(one.tokens) for one in group)
    assert len(packed) == HEADER * count + rest
    for found, wanted in zip(unpack(packed, count), group, strict=True):
        for name in ("slot", "tokens", "left", "stops", "pages", "task", "turn"):
            assert getattr(found, name) == getattr(wanted, name), name
        for field in fields(Noise):
            mine, theirs = (getattr(one.noise, field.name) for one in (found, wanted))
            assert mine == pytest.approx(theirs, rel=1e-6), field.name


@pytest.mark.parametrize(
    "wrong",
    [
        {"left": 0},
        {"turn": MOST_TURNS},
        {"tokens": [1] * (LONGEST + 1)},
        {"pages": [1] * (PAGES + 1)},
        {"stops": [1] * (STOPS + 1)},
    ],
)
def test_what_a_slot_cannot_hold_is_refused(wrong: dict[str, Any]) -> None:
    slots = Slots.empty(
        SLOTS, stops=STOPS, pages=PAGES, longest=LONGEST, device=torch.device("cpu")
    )
    right = {"slot": 0, "tokens": [1], "left": 1, "stops": [], "pages": [0], "task": 0, "turn": 0}
    pack([Newcomer(**right)], slots)
    with pytest.raises(AssertionError):
        pack([Newcomer(**{**right, **wrong})], slots)
    with pytest.raises(AssertionError, match="twice"):
        pack([Newcomer(**right), Newcomer(**{**right, "turn": 1})], slots)


@pytest.mark.parametrize("device", [compiled])  # nothing is compiled by the interpreter
def test_texts_of_all_lengths_are_one_kernel(device: str) -> None:
    slots, matrix = used_slots(0, device), used_matrix(0, device, 3)
    before = None
    for seed in range(6):
        group = newcomers(seed, 1 + seed)
        packed = to_device(pack(group, slots), torch.device(device), torch.int32)
        kernel.admit(slots, matrix, packed, len(group))
        kernels = kernel._admit.device_caches[torch.cuda.current_device()][0]
        before = before or len(kernels)
        assert len(kernels) == before
