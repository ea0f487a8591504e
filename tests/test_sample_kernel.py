"""Sampling on the device, against the host's."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch.config import SamplingParams
from trbatch.engine.device_state import Noise, Slots
from trbatch.engine.sampling import Choice, choose, uniform

pytest.importorskip("triton")

from trbatch.engine.kernels.sample import sample

interpreted = pytest.param(
    "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here")
)
compiled = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                       reason="no GPU here")]
)  # fmt: skip
on_every_device = pytest.mark.parametrize("device", [interpreted, compiled])
SIZE = 3


def some_noise(rng: random.Random, begin: int) -> Noise:
    return Noise(
        begin, rng.choice([0.0, 0.3, 0.7, 1.0, 2.5]), rng.choice([0.0, 0.0, 0.05, 0.9, 1.0]),
        rng.choice([0, 1, 2**63 - 1, rng.randrange(2**63)]), rng.randrange(1024),
    )  # fmt: skip


@on_every_device
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), vocab=st.sampled_from([7, 97, 2048, 2049, 9000]))
def test_tokens_are_those_of_the_host(seed: int, vocab: int, device: str) -> None:
    rng = random.Random(seed)
    slots = Slots.empty(5, stops=1, pages=1, longest=64, device=torch.device(device))
    noises = []
    for slot in range(5):
        begin, more = rng.randrange(1, 20), rng.randrange(20)
        noises.append((some_noise(rng, begin), more))
        slots.put(slot, [1] * (begin + more), left=9, stops=[], pages=[0], task=0, turn=slot,
                  noise=noises[-1][0])  # fmt: skip
    rows = [4, -1, 0, 2]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows) * SIZE, vocab, generator=generator) * rng.choice([1, 5, 30])
    depths = torch.tensor([[0, 1, 1]] * len(rows)).flatten()
    top = logits.argmax(1)
    found = sample(
        slots, torch.tensor(rows, device=device), logits.to(device), top.to(device),
        depths.to(device),
    ).cpu()  # fmt: skip
    for at, token in enumerate(found.tolist()):
        slot = rows[at // SIZE]
        if slot < 0:
            assert token == top[at], "a padding row"
            continue
        noise, more = noises[slot]
        params = SamplingParams(temperature=noise.temperature, min_p=noise.min_p)
        drawn = uniform(noise.seed, noise.sample, more + int(depths[at]))
        assert token == int(choose(logits[at : at + 1], [Choice(params, drawn)])[0])


@on_every_device
def test_tokens_come_as_often_as_they_are_likely(device: str) -> None:
    vocab, count = 5, 600
    slots = Slots.empty(1, stops=1, pages=1, longest=1024, device=torch.device(device))
    slots.put(0, [1], left=9, stops=[], pages=[0], task=0, turn=0,
              noise=Noise(0, temperature=1.0, seed=7))  # fmt: skip
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5], device=device)
    places = torch.arange(count, device=device)
    found = sample(
        slots, torch.tensor([0], device=device), logits.expand(count, vocab).contiguous(),
        torch.full((count,), 2, device=device), places,
    )  # fmt: skip
    seen = torch.bincount(found.cpu(), minlength=vocab) / count
    assert torch.allclose(seen, torch.softmax(logits.cpu(), 0), atol=0.06)
