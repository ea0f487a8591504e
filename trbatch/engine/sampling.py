"""Choosing one token from logits, with noise that belongs to the row and not to the batch.

The noise of a token is one uniform number from a counter-based generator keyed by (row seed,
sample, position). The same row therefore gives the same tokens whatever the batch, the tree or the
worker (up to floating-point ties), and verification can choose the model's own token at any node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from trbatch.config import SamplingParams
from trbatch.engine.likeliest import argmax, blocks_of

_MASK = (1 << 64) - 1


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments.

    SplitMix64's finaliser (Steele, Lea and Flood, 2014) over each argument in turn; 53 bits.
    """
    state = 0
    for part in (seed, sample, position):
        state = _mix((state + part + 0x9E3779B97F4A7C15) & _MASK)
    return (state >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Kind(IntEnum):
    """What it takes to choose a row's token; a higher one can do what a lower one does."""

    GREEDY = 0
    SAMPLED = 1
    FILTERED = 2  # top-k or top-p

    @classmethod
    def of(cls, params: SamplingParams) -> Kind:
        """What these settings need."""
        if params.greedy:
            return cls.GREEDY
        return cls.FILTERED if params.top_p < 1.0 or params.top_k > 0 else cls.SAMPLED


@dataclass(frozen=True, slots=True)
class Choice:
    """How the next token of one place is chosen: a row's settings and its noise."""

    params: SamplingParams
    noise: float


def choose(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """One token for each place.

    Which arithmetic a row goes through depends on its own settings alone, never on its neighbours.

    Args:
        logits: [n, V] float32.
        choices: n of them.

    Returns:
        [n] int64 token ids.
    """
    tokens = torch.empty(len(choices), dtype=torch.long, device=logits.device)
    kinds = [Kind.of(choice.params) for choice in choices]
    for kind, function in zip(Kind, (_greedy, _sample, _sample_filtered), strict=True):
        members = [i for i, other in enumerate(kinds) if other == kind]
        if members:
            index = torch.tensor(members, device=logits.device)
            tokens[index] = function(logits[index], [choices[i] for i in members])
    return tokens


def _greedy(logits: Tensor, _: Sequence[Choice]) -> Tensor:
    return argmax(blocks_of(logits))


def _sample(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Temperature and min-p: no sorting."""
    probabilities = torch.softmax(logits / _column(choices, "temperature", logits), -1)
    return _invert(_min_p(probabilities, choices), choices)


def _sample_filtered(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Temperature, top-k, top-p, min-p."""
    left = logits.masked_fill(~kept(logits, choices), -torch.inf)
    return _sample(left, choices)


def kept(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """[n, V] bool: what top-k, and then top-p, leave of the vocabulary.

    A token stays if fewer than k are likelier, and if the likelier ones that top-k left have less
    than top_p of the weight of all that it left: equal tokens stay or go together.
    """
    ordered = logits.sort(dim=-1, descending=True).values
    vocab = logits.shape[-1]
    ranks = [min(c.params.top_k, vocab) if c.params.top_k > 0 else vocab for c in choices]
    least = ordered.gather(1, torch.tensor(ranks, device=logits.device)[:, None] - 1)
    weights = (ordered / _column(choices, "temperature", logits)).masked_fill(
        ordered < least, -torch.inf
    )
    share = torch.softmax(weights, -1).double()
    top_p = _column(choices, "top_p", logits)
    # Rounding may add shares up to more than 1, and 1 leaves nothing out.
    inside = (share.cumsum(-1) - share < top_p) | (top_p >= 1.0)
    inside[:, 0] = True
    last = inside.long().sum(-1, keepdim=True) - 1  # shares only add up, so these are the first
    return logits >= torch.maximum(least, ordered.gather(1, last))


def _min_p(probabilities: Tensor, choices: Sequence[Choice]) -> Tensor:
    floor = _column(choices, "min_p", probabilities) * probabilities.amax(-1, keepdim=True)
    return probabilities.masked_fill(probabilities < floor, 0.0)


def _invert(probabilities: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Inverse transform sampling of unnormalised probabilities [n, V], in float64."""
    cumulative = probabilities.double().cumsum(-1)
    noise = torch.tensor([c.noise for c in choices], dtype=torch.float64, device=cumulative.device)
    target = noise[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding can push the target to the very top: then the last token that has any probability.
    last = (probabilities > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(found, last)


def _column(choices: Sequence[Choice], name: str, like: Tensor) -> Tensor:
    values = [getattr(choice.params, name) for choice in choices]
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
