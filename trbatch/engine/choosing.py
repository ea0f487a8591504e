"""The next token of a sequence at a place in its tree: its processors, then its sampling.

What goes wrong with one sequence's choice is that sequence's end and nobody else's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from trbatch.config import SamplingParams
from trbatch.engine.logprobs import record
from trbatch.engine.noise import place_key
from trbatch.engine.sampling import Choice, choose
from trbatch.engine.sequence import Sequence
from trbatch.errors import RowError

logger = logging.getLogger(__name__)

_ANY = Choice(SamplingParams(), 0)  # a token for a sequence that has failed: it goes nowhere
_OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)  # nothing would work after it


def choose_tokens(
    sequences: ListLike[Sequence], logits: Tensor, ancestors: ListLike[ListLike[int]]
) -> Tensor:
    """One token for each sequence. One whose choice raises gets an `error` and any token.

    Args:
        logits: [n, V] raw.
        ancestors: of each place: the drafted tokens between the committed ones and it, which a
            logits processor has to see as if they were committed.

    Returns:
        [n] int64.
    """
    processed = _process(sequences, logits, ancestors)
    choices = [_choice(s, len(path)) for s, path in zip(sequences, ancestors, strict=True)]
    try:
        chosen = choose(processed, choices)
    except _OF_THE_DEVICE:
        raise
    except Exception:  # noqa: BLE001  one by one it will show whose it was
        chosen = torch.cat(
            [
                _choose_alone(sequence, processed[at : at + 1], choices[at])
                for at, sequence in enumerate(sequences)
            ]
        )
    record(sequences, logits, chosen, list(map(len, ancestors)))
    return chosen


def takes_likeliest(sequence: Sequence) -> bool:
    """Whether its next token is the likeliest by raw logits, and nothing else is asked of them."""
    request = sequence.request
    plain = request.sampling.greedy and request.sampling.logprobs is None
    return plain and not request.logits_processors


def _process(
    sequences: ListLike[Sequence], logits: Tensor, ancestors: ListLike[ListLike[int]]
) -> Tensor:
    """The logits after each sequence's processors, [n, V]; those given are left as they are."""
    processed = logits
    for at, (sequence, path) in enumerate(zip(sequences, ancestors, strict=True)):
        if not sequence.request.logits_processors or sequence.error is not None:
            continue
        if processed is logits:
            processed = logits.clone()
        context = [*sequence.tokens, *path]
        try:
            for processor in sequence.request.logits_processors:
                processed[at] = processor(context, processed[at])
        except _OF_THE_DEVICE:
            raise
        except Exception as error:  # noqa: BLE001  a processor may be anybody's code
            _fail(sequence, error)
    return processed


def _choice(sequence: Sequence, depth: int) -> Choice:
    request = sequence.request
    if sequence.error is not None:
        return _ANY
    if request.sampling.greedy:
        return Choice(request.sampling, 0)
    # The place in the output that this token is for: the same in whatever tree.
    position = sequence.generated + depth
    return Choice(request.sampling, place_key(request.seed, request.sample_index, position))


def _choose_alone(sequence: Sequence, logits: Tensor, choice: Choice) -> Tensor:
    try:
        return choose(logits, [choice])
    except _OF_THE_DEVICE:
        raise
    except Exception as error:  # noqa: BLE001  whatever its settings made torch raise
        _fail(sequence, error)
        return choose(logits, [_ANY])


def _fail(sequence: Sequence, error: Exception) -> None:
    said = f"{type(error).__name__}: {error}"
    logger.warning("choosing a token of request %s failed: %s", sequence.request.key, said)
    sequence.error = RowError("sampling_failed", f"choosing its next token failed: {said}")
