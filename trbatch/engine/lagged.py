"""Decoding whose results are read one step late, so that the device never waits for the host.

While the host reads what step n gave, step n + 1 runs already. What the host learns a step late:

- that a text has ended. The device itself sees end tokens and lengths, and a slot that has ended
  writes nothing; only stop strings are the host's, and what a slot gave after one is thrown away.
- that a slot is free. A sequence keeps its slot and its pages until the last step that was started
  with it has been read, because that step may still write to them.

Whoever takes a running sequence out, or moves pages, must `drain` first. The device's half is a
`Stepper`. The engine does not decode this way yet: the host's half and its protocol are here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any, Protocol

from trbatch.engine.budget import Budget
from trbatch.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step gave one sequence.

    `tokens`: those that it took, cut at its end; `drafted`: nodes verified behind its root;
    `accepted`: how many of the tokens had been drafted.
    """

    tokens: list[int]
    drafted: int
    accepted: int


class Stepper(Protocol):
    """The device's half of decoding."""

    def can_take(self, sequence: Sequence) -> bool:
        """Whether the device knows all that decides a sequence's tokens."""
        ...

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence whose prompt is in the cache and whose first token is known."""
        ...

    def launch(self, members: ListLike[Sequence], size: int) -> Any:
        """Start a step of `size` tokens a sequence; returns what `read` wants."""
        ...

    def read(self, handle: Any) -> list[Outcome]:
        """Wait for a step and get what it gave each of its members."""
        ...


@dataclass(frozen=True, slots=True)
class Settled:
    """A step whose results are known: its members, its size, how long it took."""

    members: list[Sequence]
    outcomes: list[Outcome]
    size: int
    seconds: float
    context: float


@dataclass(frozen=True, slots=True)
class _Ticket:
    members: list[Sequence]
    size: int
    handle: Any
    context: float


class LaggedDecoder:
    """Starts steps and reads them one late.

    Args:
        size: tokens a sequence of every step, the root included; 0: by the budget.
    """

    def __init__(self, stepper: Stepper, budget: Budget, *, size: int = 0) -> None:
        self._stepper, self._budget, self._size = stepper, budget, size
        self._pending: _Ticket | None = None
        self._read_at = 0.0

    def admit(self, sequence: Sequence) -> bool:
        """Decode this sequence from the next step on, if it is one for the device."""
        if not self._stepper.can_take(sequence):
            return False
        self._stepper.admit(sequence)
        return True

    def run(self, members: ListLike[Sequence]) -> int:
        """Start a step of these sequences and read the one before.

        Returns:
            How many tokens that one gave.
        """
        context = sum(len(s.tokens) for s in members) / max(1, len(members))
        size = self._size or (self._budget.choose_size(len(members), context) if members else 1)
        settled = self.step(members, size)
        return self._account(settled) if settled is not None else 0

    def drain(self) -> int:
        """Read the step that is under way, if there is one. Returns how many tokens it gave."""
        return self.run([])

    def step(self, members: ListLike[Sequence], size: int) -> Settled | None:
        """Start a step of these sequences, then read the one before, None if there is none.

        Args:
            members: those that have not ended, as far as is known.
            size: tokens a sequence, the root included.
        """
        before, self._pending = self._pending, None
        if members:
            if before is None:
                self._read_at = time.perf_counter()
            handle = self._stepper.launch(members, size)
            context = sum(len(sequence.tokens) for sequence in members) / len(members)
            self._pending = _Ticket(list(members), size, handle, context)
            for sequence in members:
                sequence.in_flight += 1
        return self._settle(before) if before is not None else None

    def _account(self, settled: Settled) -> int:
        """Write a step into its sequences' figures and the budget's. Returns its tokens."""
        count, size = len(settled.members), settled.size
        plain_s = self._budget.plain_seconds(count, settled.context)
        given = alive = 0
        for sequence, outcome in zip(settled.members, settled.outcomes, strict=True):
            if outcome.tokens:
                alive += 1
                given += len(outcome.tokens)
                sequence.figures.count_forward(
                    tokens=len(outcome.tokens), accepted=outcome.accepted, drafted=outcome.drafted,
                    seconds=settled.seconds, plain_s=plain_s,
                )  # fmt: skip
        self._budget.count(size * count, count, settled.context, settled.seconds)
        if alive:
            self._budget.count_tokens(size, given, alive)
        return given

    def _settle(self, ticket: _Ticket) -> Settled:
        outcomes = self._stepper.read(ticket.handle)
        now = time.perf_counter()
        seconds, self._read_at = now - self._read_at, now
        kept = []
        for sequence, outcome in zip(ticket.members, outcomes, strict=True):
            sequence.in_flight -= 1
            kept.append(_taken(sequence, outcome))
        return Settled(ticket.members, kept, ticket.size, seconds, ticket.context)


def _taken(sequence: Sequence, outcome: Outcome) -> Outcome:
    """Append an outcome's tokens to its text; what comes after its end is thrown away."""
    if sequence.ended:
        return Outcome([], 0, 0)
    count = sequence.take(outcome.tokens)
    return Outcome(outcome.tokens[:count], outcome.drafted, min(count, outcome.accepted))
