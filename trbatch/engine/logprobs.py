"""Log probabilities of tokens, by the model's raw logits: before penalties, bias and temperature.

They are kept with the sequence by position: whoever has to be run again writes them again.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from trbatch.engine.sequence import Likelihood, Sequence


def record(
    sequences: ListLike[Sequence], logits: Tensor, tokens: Tensor, depths: ListLike[int]
) -> None:
    """Keep what the model says of tokens that are proposed to those who asked for it.

    Args:
        logits: [n, V] raw.
        tokens: [n] that were chosen.
        depths: drafted tokens between each one's text and its place.
    """
    asking = [at for at, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
    if not asking:
        return
    most = max(sequences[at].request.sampling.logprobs or 0 for at in asking)
    found = of_tokens(logits[asking], tokens[asking], most)
    for at, one in zip(asking, found, strict=True):
        sequence = sequences[at]
        del sequence.logprobs[sequence.generated + depths[at] :]
        wanted = sequence.request.sampling.logprobs or 0
        sequence.logprobs.append(one._replace(top=one.top[:wanted]))


def record_prompt(pieces: ListLike[tuple[Sequence, int]], logits: Tensor) -> None:
    """Keep the same of prompt tokens, before the pieces are counted as cached.

    Args:
        logits: [N, V] at all tokens of the pieces, one piece after the other.
    """
    start = 0
    for sequence, count in pieces:
        first, end = sequence.cached, sequence.cached + count
        if sequence.wants_prompt_logprobs:
            most = sequence.request.sampling.prompt_logprobs or 0
            following = sequence.tokens[first + 1 : min(end + 1, sequence.prompt_length)]
            place = logits[start : start + len(following)]
            del sequence.prompt_logprobs[first:]
            sequence.prompt_logprobs += of_tokens(place, torch.tensor(following), most)
        start += count


def of_tokens(logits: Tensor, tokens: Tensor, most: int) -> list[Likelihood]:
    """What the model says of one token at each place, and of the `most` likeliest there.

    Args:
        logits: [n, V] raw.
        tokens: [n].
    """
    if not len(tokens):
        return []
    all_of_them = torch.log_softmax(logits.float(), -1)
    own = all_of_them.gather(1, tokens.to(logits.device, torch.long)[:, None])
    ranks = (all_of_them > own).sum(1) + 1
    values, ids = all_of_them.topk(min(most, logits.shape[1]), dim=1)
    columns = (tokens, own[:, 0], ranks, ids, values)
    return [
        Likelihood(token, logprob, rank, list(zip(ids, values, strict=True)))
        for token, logprob, rank, ids, values in zip(*(c.tolist() for c in columns), strict=True)
    ]
