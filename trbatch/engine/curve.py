"""How many tokens a step gives by the size of its tree: what a budget of whole steps goes by.

A captured step has one size for all its sequences, so what counts is how many tokens a sequence got
on average from steps of each size. Sizes that were not tried lately borrow from the nearest that
were: with better or worse drafts the whole curve rises or falls.
"""

from __future__ import annotations

from bisect import bisect_left

STEP_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 81)  # tokens a sequence, root included

# Tokens of a step by size, measured with the small model on an H100 (docs/performance.md).
_PRIOR = {1: 1.0, 2: 1.55, 4: 2.2, 5: 2.4, 9: 2.93, 17: 3.48, 81: 4.7, 257: 5.2}
_MEMORY = 2000.0  # sequences' steps after which an old one counts half
_WEIGHT = 200.0  # sequences' steps that the borrowed value is worth


class Curve:
    """Tokens a sequence and step, by size; counted while decoding."""

    def __init__(self) -> None:
        self._tokens: dict[int, float] = {}
        self._steps: dict[int, float] = {}

    def count(self, size: int, tokens: int, sequences: int) -> None:
        """Count a step of `size` tokens a sequence that gave `tokens` to `sequences`."""
        fade = 0.5 ** (sequences / _MEMORY)
        self._tokens[size] = self._tokens.get(size, 0.0) * fade + tokens
        self._steps[size] = self._steps.get(size, 0.0) * fade + sequences

    def expected(self, size: int) -> float:
        """Tokens that a step of this size should give a sequence."""
        if size <= 1:
            return 1.0
        prior = prior_tokens(size)
        borrowed = 1.0 + (prior - 1.0) * self._quality(size)
        steps = self._steps.get(size, 0.0)
        return (self._tokens.get(size, 0.0) + _WEIGHT * borrowed) / (steps + _WEIGHT)

    def _quality(self, size: int) -> float:
        """What drafts give beyond plain decoding, over what the prior says, at the nearest size."""
        total = weight = 0.0
        for other, steps in self._steps.items():
            if other > 1 and steps > 0:
                gained = self._tokens[other] / steps - 1.0
                # Twice the size apart, half the say.
                say = min(steps, _WEIGHT) * min(size, other) / max(size, other)
                total += say * gained / (prior_tokens(other) - 1.0)
                weight += say
        return (total + 0.1 * _WEIGHT) / (weight + 0.1 * _WEIGHT)


def prior_tokens(size: float) -> float:
    """Tokens of a step before anything was counted, linear between what was measured."""
    known = sorted(_PRIOR)
    at = min(max(1, bisect_left(known, size)), len(known) - 1)
    left, right = known[at - 1], known[at]
    share = (size - left) / (right - left)
    return _PRIOR[left] + share * (_PRIOR[right] - _PRIOR[left])
