"""What changes a row's logits before a token is chosen: bias, least length, penalties.

Each is a `LogitsProcessor`: it is called with the committed tokens and those drafted between them
and the place that is asked about, so that drafts change nothing. The order is vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from collections.abc import Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trbatch.config import SamplingParams
from trbatch.engine.sequence import LogitsProcessor, Request
from trbatch.engine.text import EncodingFailed


def with_processors(
    request: Request, prompt_ids: ListLike[int], stop_ids: Set[int], vocab_size: int
) -> Request:
    """The request with the processors that its sampling asks for, in front of its own.

    Args:
        stop_ids: tokens that end its text.

    Raises:
        EncodingFailed: it names a token that the model does not have.
    """
    params, prompt = request.sampling, len(prompt_ids)
    found: list[LogitsProcessor] = []
    _check_known("stop_token_ids", params.stop_token_ids, vocab_size)
    if params.logit_bias:
        found.append(Bias(params, vocab_size))
    ends = sorted(token for token in stop_ids if token < vocab_size)
    if params.min_tokens and ends:
        found.append(MinTokens(prompt + params.min_tokens, ends))
    if params.repetition_penalty != 1.0:
        found.append(RepetitionPenalty(params.repetition_penalty, prompt_ids))
    if params.presence_penalty or params.frequency_penalty:
        found.append(OutputPenalties(params.presence_penalty, params.frequency_penalty, prompt))
    if not found:
        return request
    return replace(request, logits_processors=(*found, *request.logits_processors))


def _check_known(name: str, ids: ListLike[int], vocab_size: int) -> None:
    if (most := max(ids, default=0)) >= vocab_size:
        raise EncodingFailed(
            "invalid_sampling",
            f"{name} names token {most}; the model's last one is {vocab_size - 1}",
        )


class Bias:
    """Adds a number to some tokens' logits."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        ids = [int(token) for token in params.logit_bias]
        _check_known("logit_bias", ids, vocab_size)
        self._ids = torch.tensor(ids)
        self._values = torch.tensor(list(params.logit_bias.values()))

    def __call__(self, tokens: ListLike[int], logits: Tensor) -> Tensor:
        """Args: logits: [V]."""
        ids, values = self._ids.to(logits.device), self._values.to(logits)
        return logits.index_add(0, ids, values)


@dataclass(frozen=True, slots=True)
class MinTokens:
    """Rules out the tokens that end a text while it is shorter than `shortest`, prompt included."""

    shortest: int
    ends: list[int]

    def __call__(self, tokens: ListLike[int], logits: Tensor) -> Tensor:
        """Args: logits: [V]."""
        if len(tokens) >= self.shortest:
            return logits
        return logits.index_fill(0, torch.tensor(self.ends, device=logits.device), -torch.inf)


class RepetitionPenalty:
    """Makes tokens of prompt and output less likely: above 0 divided, below 0 multiplied."""

    def __init__(self, penalty: float, prompt_ids: ListLike[int]) -> None:
        self._penalty, self._prompt = penalty, len(prompt_ids)
        self._prompt_ids = torch.tensor(sorted(set(prompt_ids)))

    def __call__(self, tokens: ListLike[int], logits: Tensor) -> Tensor:
        """Args: logits: [V]."""
        said = torch.tensor(tokens[self._prompt :], dtype=torch.long)
        seen = torch.cat([self._prompt_ids, said]).to(logits.device)
        found = logits[seen]
        changed = torch.where(found < 0, found * self._penalty, found / self._penalty)
        return logits.index_put((seen,), changed)  # one that is there twice gets the same twice


@dataclass(frozen=True, slots=True)
class OutputPenalties:
    """Lowers the logits of tokens that came out: once, and as often as they did."""

    presence: float
    frequency: float
    prompt: int  # tokens of the prompt, which do not count

    def __call__(self, tokens: ListLike[int], logits: Tensor) -> Tensor:
        """Args: logits: [V]."""
        said = torch.tensor(tokens[self.prompt :], dtype=torch.long, device=logits.device)
        counts = torch.zeros_like(logits).index_add(
            0, said, torch.ones_like(said, dtype=logits.dtype)
        )
        return logits - self.frequency * counts - self.presence * (counts > 0)
