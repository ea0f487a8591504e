"""The noise of rows that sample: uniform, independent, and robust against rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from trbatch.config import SamplingParams
from trbatch.engine.noise import BELOW_ONE, gumbel, hashes, place_key, uniforms
from trbatch.engine.sampling import Choice, choose

VOCAB = 49_152
SEEDS = [0, 1, 7, 2**63 - 1, 0x9E3779B97F4A7C15 >> 1]


def triple32(x: int, low: int, high: int) -> int:
    """The definition, number by number."""
    mask = 0xFFFFFFFF
    x ^= low
    x = (x ^ x >> 17) * 0xED5AD4BB & mask ^ high
    x = (x ^ x >> 11) * 0xAC4C1B51 & mask
    x = (x ^ x >> 15) * 0x31848BAB & mask
    return x ^ x >> 14


def test_bits_are_those_of_the_definition() -> None:
    for key in (0, 1, 2**64 - 1, 0x0123456789ABCDEF, 0xFEDCBA9876543210):
        found = hashes([key], 2000)[0].tolist()
        expected = [triple32(token, key & 0xFFFFFFFF, key >> 32) for token in range(2000)]
        assert [h & 0xFFFFFFFF for h in found] == expected


def test_a_key_depends_on_each_argument_and_splits_evenly() -> None:
    keys = [place_key(s, n, p) for s in range(20) for n in range(20) for p in range(20)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    for shift in (0, 32):
        halves = [((key >> shift) % 2**32 + 0.5) / 2**32 for key in keys]
        assert stats.kstest(halves, "uniform").pvalue > 1e-3


def neighbours(other: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform numbers [n, V] of places or tokens, and of what lies beside each of them."""
    steps = {"seed": (1, 0, 0), "sample": (0, 1, 0), "position": (0, 0, 1), "token": (0, 0, 0)}
    seed, sample, position = steps[other]
    places = [(5 + 2 * i, 2 * (i % 40), 3 * i) for i in range(40)]
    mine = uniforms(hashes([place_key(*place) for place in places], VOCAB))
    if other == "token":
        return mine[:, :-1], mine[:, 1:]
    beside = [place_key(s + seed, n + sample, p + position) for s, n, p in places]
    return mine, uniforms(hashes(beside, VOCAB))


@pytest.mark.parametrize("other", ["token", "position", "sample", "seed"])
def test_neighbours_are_independent(other: str) -> None:
    """Pairs fill a square evenly, in their highest bits and in those of small numbers alone."""
    one, two = (part.flatten().double().numpy() for part in neighbours(other))
    for begin in (1.0, 2.0**-6):  # the whole square, and pairs whose first is among 64 the least
        inside = one < begin
        table, _, _ = np.histogram2d(one[inside], two[inside], bins=32, range=[[0, begin], [0, 1]])
        assert stats.chisquare(table.flatten()).pvalue > 1e-3
        assert stats.chi2_contingency(table).pvalue > 1e-3
    bound = 4.5 / math.sqrt(len(one))
    assert abs(np.corrcoef(one, two)[0, 1]) < bound
    assert abs(np.corrcoef(np.log(one), np.log(two))[0, 1]) < bound


def test_every_bit_of_token_and_key_changes_half_of_all_bits() -> None:
    """Avalanche: each input bit flips each output bit in half of all cases."""
    generator = np.random.default_rng(3)
    keys = [int(key) for key in generator.integers(0, 2**64, size=16, dtype=np.uint64)]
    vocab = 1 << 12

    def bits(some: list[int]) -> torch.Tensor:
        return (hashes(some, vocab)[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1

    plain = bits(keys)
    flips = [bits([key ^ (1 << bit) for key in keys]) ^ plain for bit in range(64)]
    tokens = torch.arange(vocab)
    flips += [plain[:, tokens ^ (1 << bit)] ^ plain for bit in range(12)]
    share = torch.stack([flip.double().mean((0, 1)) for flip in flips])  # [76, 32]
    # 2**16 cases each, of tokens half as many pairs; the mixer's own bias is far below the bound.
    assert (share - 0.5).abs().max() < 0.02, share


def test_numbers_keep_the_bits_of_small_ones_and_stay_between_0_and_1() -> None:
    hashed = torch.tensor([0, 1, 1000, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    found = uniforms(hashed).double().tolist()
    assert found[:3] == [0.5 * 2.0**-32, 1.5 * 2.0**-32, 1000.5 * 2.0**-32]
    assert found[3:] == [0.5, 0.5, BELOW_ONE]
    noise = gumbel([place_key(9, 0, i) for i in range(64)], VOCAB)
    assert noise.isfinite().all() and float(noise.min()) > -3 and float(noise.max()) < 23


def test_noise_has_gumbels_distribution() -> None:
    noise = gumbel([place_key(3, 1, 4)], 200_000)[0].double().numpy()
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize("settings", [{}, {"top_k": 12}, {"top_p": 0.9}, {"min_p": 0.02}], ids=str)
def test_tokens_come_as_often_as_they_are_likely(settings: dict[str, float]) -> None:
    """Down to one in 20,000, of a vocabulary in which the likely are spread."""
    runs, vocab = 40_000, 300
    generator = torch.Generator().manual_seed(4)
    shares = 1.0 / torch.arange(1, vocab + 1).double() ** 1.8
    shares = shares[torch.randperm(vocab, generator=generator)]
    shares /= shares.sum()
    left, order = shares.sort(descending=True)
    ranks = torch.arange(vocab)
    kept = (ranks < settings.get("top_k", vocab)) & (
        left.cumsum(0) - left < settings.get("top_p", 1.0)
    )
    kept &= left >= settings.get("min_p", 0.0) * left[0]
    expected = torch.zeros_like(shares).scatter(0, order, left * kept)
    expected /= expected.sum()
    params = SamplingParams(temperature=0.5, **settings)  # type: ignore[arg-type]
    logits = (shares.log() * 0.5).float()
    seen = torch.zeros(vocab)
    for begin in range(0, runs, 4000):
        choices = [Choice(params, place_key(8, 0, begin + i)) for i in range(4000)]
        chosen = choose(logits.expand(4000, vocab), choices)
        seen += torch.bincount(chosen, minlength=vocab)
    assert seen[expected == 0].sum() == 0
    common = expected * runs >= 5
    rest = expected > 0
    rest &= ~common
    observed = [*seen[common].tolist(), float(seen[rest].sum())]
    wanted = [*(expected[common] * runs).tolist(), float(expected[rest].sum() * runs)]
    if not rest.any():
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def inverted(logits: torch.Tensor, temperature: float, numbers: torch.Tensor) -> torch.Tensor:
    """The other way to sample: where one number a place falls among the sums of all shares."""
    sums = torch.softmax(logits / temperature, -1).double().cumsum(-1)
    return torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True)[:, 0]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rounding_of_logits_changes_next_to_no_token(temperature: float) -> None:
    """Two ways to compute a forward differ in the last bits: sampled texts must not.

    The inverse transform shows that the same errors are large enough to change tokens elsewhere.
    """
    places, batch, flips, others = 1500, 50, 0, 0
    generator = torch.Generator().manual_seed(6)
    params = SamplingParams(temperature=temperature)
    for begin in range(0, places, batch):
        # A few likely tokens and a long tail: 2.0 nats at temperature 0.7, 4.6 at 1.
        logits = torch.randn(batch, VOCAB, generator=generator) * 3
        logits[:, :40] += torch.linspace(10, 4, 40)
        # Of a sum the error is as large as its largest parts, however small what comes out.
        errors = torch.randn(batch, VOCAB, generator=generator) * 1e-6
        rounded = logits + errors * logits.abs().amax(1, keepdim=True)
        choices = [Choice(params, place_key(1, 0, begin + i)) for i in range(batch)]
        flips += int((choose(logits, choices) != choose(rounded, choices)).sum())
        numbers = torch.rand(batch, generator=generator, dtype=torch.float64)
        one, two = (inverted(some, temperature, numbers) for some in (logits, rounded))
        others += int((one != two).sum())
    assert flips <= 1
    assert others >= 5, "the errors are too small to show anything"
