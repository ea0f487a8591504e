"""Repeated passages followed on the device, against the slow twin and against known texts."""

from __future__ import annotations

import random
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_devices import on_every_device

from trbatch.engine import reference
from trbatch.engine.device_state import Slots
from trbatch.engine.kernels.spine import look_ahead

LONGEST, DEPTH = 700, 13


def slots_of(texts: list[list[int]], device: str) -> Slots:
    slots = Slots.empty(
        len(texts) + 1, stops=1, pages=1, longest=LONGEST, device=torch.device(device)
    )
    for slot, text in enumerate(texts):
        slots.put(slot, text, left=9, stops=[], pages=[0], task=0, turn=slot)
    return slots


def append(slots: Slots, slot: int, tokens: list[int]) -> None:
    length = int(slots.lengths[slot])
    slots.texts[slot, length : length + len(tokens)] = torch.tensor(tokens).to(slots.texts)
    slots.lengths[slot] += len(tokens)


@on_every_device
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_the_kernel_is_its_twin_step_after_step(seed: int, device: str) -> None:
    rng = random.Random(seed)
    texts = [
        [rng.randrange(rng.choice([2, 3, 50])) for _ in range(rng.choice([1, 4, 5, 9, 80, 600]))]
        for _ in range(5)
    ]
    quick, slow = slots_of(texts, device), slots_of(texts, "cpu")
    for _ in range(4):
        rows = rng.sample([0, 1, 2, 3, 4, -1, -1], 4)
        rows = [row for i, row in enumerate(rows) if row < 0 or row not in rows[:i]]
        found = look_ahead(quick, torch.tensor(rows, device=device), DEPTH)
        wanted = reference.look_ahead(slow, torch.tensor(rows), DEPTH)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.cpu(), other)
        for name in ("read", "source", "matched"):
            assert torch.equal(getattr(quick, name).cpu(), getattr(slow, name)), name
        for slot in range(5):
            # Mostly what was expected, sometimes more than a step can give.
            at, length = int(slow.source[slot]), int(slow.lengths[slot])
            said = slow.texts[slot, at : min(at + 9, length)].tolist() if at >= 0 else []
            fresh = said[: rng.randrange(10)] if rng.random() < 0.7 else []
            fresh += [rng.randrange(3)] * rng.choice([0, 1, 2, 20])
            for slots in (quick, slow):
                append(slots, slot, fresh)


@on_every_device
def test_a_text_that_repeats_itself_is_expected_to_go_on(device: str) -> None:
    passage = list(range(10, 22))
    slots = slots_of([[1, 2, *passage, 3, 4, 5, *passage[:5]], [7, 8, 9]], device)
    rows = torch.tensor([1, 0, -1], device=device)
    ahead, matched = look_ahead(slots, rows, DEPTH)
    assert ahead[1].tolist() == [*passage[5:], 3, 4, 5, *passage[:3]]
    assert matched.tolist() == [0, 5, 0]
    assert (ahead[0] == -1).all() and (ahead[2] == -1).all()
    append(slots, 0, passage[5:8])
    ahead, matched = look_ahead(slots, rows, DEPTH)
    assert ahead[1, :4].tolist() == passage[8:] and matched[1] == 8
    append(slots, 0, [99])
    ahead, matched = look_ahead(slots, rows, DEPTH)
    assert (ahead[1] == -1).all() and matched[1] == 0


@on_every_device
def test_the_latest_of_several_occurrences_counts(device: str) -> None:
    text: list[Any] = [*[1, 2, 3, 4, 50] * 2, *[1, 2, 3, 4, 60], *[9] * 3, 1, 2, 3, 4]
    ahead, _ = look_ahead(slots_of([text], device), torch.tensor([0], device=device), DEPTH)
    assert ahead[0, 0] == 60
