"""Choosing one token from logits, with noise that belongs to the row and not to the batch.

The token is the one with the highest sum of its logit over the temperature and its Gumbel noise
(`engine.noise`), which depends on (row seed, sample, position, token) alone. The same row therefore
gives the same tokens whatever the batch, the tree or the worker (up to two sums that are closer
than rounding), and verification can choose the model's own token at any node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from trbatch.config import SamplingParams
from trbatch.engine.likeliest import argmax, blocks_of
from trbatch.engine.noise import gumbel


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
    """How the next token of one place is chosen: a row's settings and the key of its noise."""

    params: SamplingParams
    key: int  # `noise.place_key`; of greedy rows any


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
    # The likeliest comes to 0: sums of noise and of what has a chance are rounded little.
    weights = logits - logits.amax(-1, keepdim=True)
    weights = _min_p(weights.div_(_column(choices, "temperature", logits)), choices)
    keys = [choice.key for choice in choices]
    return argmax(blocks_of(weights.add_(gumbel(keys, logits.shape[1], logits.device))))


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


def _min_p(weights: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Logarithms of weights [n, V], the likeliest 0, without those that min-p leaves out."""
    if not any(choice.params.min_p > 0 for choice in choices):
        return weights
    return weights.masked_fill_(weights.exp() < _column(choices, "min_p", weights), -torch.inf)


def _column(choices: Sequence[Choice], name: str, like: Tensor) -> Tensor:
    values = [getattr(choice.params, name) for choice in choices]
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
