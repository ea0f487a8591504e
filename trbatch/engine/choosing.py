"""The next token of a sequence at a place in its tree: its processors, then its sampling."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

from torch import Tensor

from trbatch.engine.sampling import Choice, choose, uniform
from trbatch.engine.sequence import Sequence


def choose_tokens(
    sequences: ListLike[Sequence], logits: Tensor, ancestors: ListLike[ListLike[int]]
) -> Tensor:
    """One token for each sequence.

    Args:
        logits: [n, V] raw.
        ancestors: of each place: the drafted tokens between the committed ones and it, which a
            logits processor has to see as if they were committed.

    Returns:
        [n] int64.
    """
    choices, processed = [], logits
    for at, (sequence, path) in enumerate(zip(sequences, ancestors, strict=True)):
        request = sequence.request
        # The place in the output that this token is for: the same in whatever tree.
        position = sequence.generated + len(path)
        noise = 0.0
        if not request.sampling.greedy:
            noise = uniform(request.seed, request.sample_index, position)
        choices.append(Choice(request.sampling, noise))
        if request.logits_processors:
            if processed is logits:
                processed = logits.clone()
            context = [*sequence.tokens, *path]
            for processor in request.logits_processors:
                processed[at] = processor(context, processed[at])
    return choose(processed, choices)
