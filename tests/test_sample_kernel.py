"""Sampling on the device, against the host's."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_devices import on_every_device, tl, triton

from trbatch.config import SamplingParams
from trbatch.engine import noise as twin
from trbatch.engine.device_state import Noise, Slots
from trbatch.engine.kernels import noise as kernels
from trbatch.engine.kernels.floors import bits_of, floors, key_of
from trbatch.engine.kernels.sample import sample
from trbatch.engine.noise import place_key
from trbatch.engine.sampling import Choice, Kind, choose, kept

SIZE = 2


@triton.jit
def write_keys(logits, keys, vocab, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    place = tl.program_id(0) * vocab + at
    logit = tl.load(logits + place, mask=at < vocab, other=0.0).to(tl.float32)
    tl.store(keys + place, key_of(logit, BITS), mask=at < vocab)


@triton.jit
def write_noise(places, keys, bits, numbers, noise, vocab, BLOCK: tl.constexpr):
    row, token = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = places + row * 3
    key = kernels.place_key(tl.load(place), tl.load(place + 1), tl.load(place + 2))
    tl.store(keys + row, key)
    hashed = kernels.hashes(key, token)
    at, there = row * vocab + token, token < vocab
    tl.store(bits + at, hashed.to(tl.int32, bitcast=True), mask=there)
    tl.store(numbers + at, kernels.uniforms(hashed), mask=there)
    tl.store(noise + at, kernels.gumbel(key, token), mask=there)


def some_noise(rng: random.Random, begin: int) -> Noise:
    return Noise(
        begin, rng.choice([0.0, 0.3, 0.7, 1.0, 2.5]), rng.choice([0.0, 0.0, 0.05, 0.9, 1.0]),
        rng.choice([0, 1, 2**63 - 1, rng.randrange(2**63)]), rng.randrange(1024),
        rng.choice([0, 0, 1, 5, 40, 10**6]), rng.choice([1.0, 1.0, 0.95, 0.5, 0.01]),
    )  # fmt: skip


def params_of(noise: Noise) -> SamplingParams:
    return SamplingParams(
        temperature=noise.temperature, min_p=noise.min_p, top_k=noise.top_k, top_p=noise.top_p
    )


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**32), vocab=st.sampled_from([7, 97, 2049, 5000]))
def test_top_k_and_top_p_leave_what_the_host_leaves(
    seed: int, vocab: int, dtype: torch.dtype, device: str
) -> None:
    """Equal logits, of which 16 bits leave many, stay or go together."""
    rng = random.Random(seed)
    slots = Slots.empty(4, stops=1, pages=1, longest=64, device=torch.device(device))
    noises = [some_noise(rng, 1) for _ in range(4)]
    for slot, noise in enumerate(noises):
        slots.put(slot, [1], left=9, stops=[], pages=[0], task=0, turn=slot, noise=noise)
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, vocab, generator=generator) * rng.choice([1, 5])).to(dtype)
    logits[:, ::3] = 0.0
    logits[:, ::6] = -0.0
    on_device = logits.to(device)
    least = floors(slots, torch.arange(4, device=device), on_device, on_device.argmax(1))
    keys = torch.empty(4, vocab, dtype=torch.int64, device=device)
    write_keys[(4,)](on_device, keys, vocab, BITS=bits_of(logits), BLOCK=8192)
    for at, noise in enumerate(noises):
        choice = Choice(params_of(noise), 0)
        left = kept(logits[at : at + 1].float(), [choice])[0]
        if Kind.of(choice.params) is not Kind.FILTERED:
            left = torch.ones(vocab, dtype=torch.bool)
        assert torch.equal((keys[at] >= least[at]).cpu(), left), noise


@on_every_device
def test_noise_is_that_of_the_host(device: str) -> None:
    """Keys, bits and uniform numbers to the bit, logarithms to what rounding leaves of them."""
    vocab, rng = 30_000, random.Random(1)
    places = [(0, 0, 0), (2**63 - 1, 1023, 2**20)]
    places += [(rng.randrange(2**63), rng.randrange(9), rng.randrange(999)) for _ in range(6)]
    keys = torch.empty(len(places), dtype=torch.int64, device=device)
    bits = torch.empty(len(places), vocab, dtype=torch.int32, device=device)
    numbers, noise = torch.empty(2, len(places), vocab, device=device)
    write_noise[(len(places), triton.cdiv(vocab, 8192))](
        torch.tensor(places, device=device), keys, bits, numbers, noise, vocab, BLOCK=8192
    )  # fmt: skip
    expected = [twin.place_key(*place) for place in places]
    assert [key % 2**64 for key in keys.tolist()] == expected
    hashed = twin.hashes(expected, vocab)
    assert torch.equal(bits.cpu(), hashed)
    assert torch.equal(numbers.cpu(), twin.uniforms(hashed))
    assert (noise.cpu() - twin.gumbel(expected, vocab)).abs().max() < 3e-6


@on_every_device
@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**32), vocab=st.sampled_from([7, 97, 2049, 5000]))
def test_tokens_are_those_of_the_host(seed: int, vocab: int, device: str) -> None:
    rng = random.Random(seed)
    slots = Slots.empty(5, stops=1, pages=1, longest=64, device=torch.device(device))
    noises = []
    for slot in range(5):
        begin, more = rng.randrange(1, 20), rng.randrange(20)
        noises.append((some_noise(rng, begin), more))
        slots.put(slot, [1] * (begin + more), left=9, stops=[], pages=[0], task=0, turn=slot,
                  noise=noises[-1][0])  # fmt: skip
    rows = [4, -1, 0]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows) * SIZE, vocab, generator=generator) * rng.choice([1, 5, 30])
    depths = torch.tensor([[0, 1]] * len(rows)).flatten()
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
        params = params_of(noise)
        key = place_key(noise.seed, noise.sample, more + int(depths[at]))
        assert token == int(choose(logits[at : at + 1], [Choice(params, key)])[0])


@on_every_device
def test_tokens_come_as_often_as_they_are_likely(device: str) -> None:
    vocab, count = 5, 200
    slots = Slots.empty(1, stops=1, pages=1, longest=1024, device=torch.device(device))
    slots.put(0, [1], left=9, stops=[], pages=[0], task=0, turn=0,
              noise=Noise(0, temperature=1.0, seed=7))  # fmt: skip
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5], device=device)
    places = torch.arange(count, device=device)
    found = sample(
        slots, torch.tensor([0], device=device), logits.expand(count, vocab).contiguous(),
        torch.full((count,), 2, device=device), places, filtering=False,
    )  # fmt: skip
    seen = torch.bincount(found.cpu(), minlength=vocab) / count
    assert torch.allclose(seen, torch.softmax(logits.cpu(), 0), atol=0.08)


@on_every_device
@pytest.mark.parametrize("filtering", [False, True])
def test_logits_that_are_no_numbers_give_some_token(device: str, filtering: bool) -> None:
    vocab = 2500
    slots = Slots.empty(1, stops=1, pages=1, longest=64, device=torch.device(device))
    slots.put(0, [1], left=9, stops=[], pages=[0], task=0, turn=0,
              noise=Noise(0, temperature=1.0, min_p=0.5, top_k=3, top_p=0.5))  # fmt: skip
    logits = torch.full((1, vocab), float("nan"), device=device)
    found = sample(
        slots, torch.tensor([0], device=device), logits, torch.tensor([5], device=device),
        torch.tensor([0], device=device), filtering=filtering,
    )  # fmt: skip
    assert 0 <= int(found) < vocab
