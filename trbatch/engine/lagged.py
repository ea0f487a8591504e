"""Decoding whose results are read one step late, so that the device never waits for the host.

While the host reads what step n gave, step n + 1 runs already. What the host learns a step late:

- that a text has ended. The device itself sees end tokens and lengths, and a slot that has ended
  writes nothing; only stop strings are the host's, and what a slot gave after one is thrown away.
- that a slot is free. A sequence keeps its slot and its pages until the last step that was started
  with it has been read, because that step may still write to them.

Prompts go the same way: the token after a prompt is chosen on the device, and the step that follows
is started before the host has seen it. Whoever takes a running sequence out, or moves pages, must
`drain` first. The device's half is a `Stepper`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from trbatch.engine.budget import Budget
from trbatch.engine.charging import Charges
from trbatch.engine.device_state import NO_RANK
from trbatch.engine.paths import PathCounts
from trbatch.engine.sequence import Sequence

_PATHS_OF = 32  # one row in so many is looked at for paths of ranks: the host is busy enough


class Outcome(NamedTuple):
    """What one step gave one sequence.

    `tokens`: those that it took, cut at its end; `drafted`: nodes verified behind its root;
    `accepted`: how many of the tokens had been drafted; `ranks`: of the tokens in the rows that
    should have predicted them, -1 for none, `NO_RANK` where nobody looked.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    ranks: ListLike[int] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What a step gave its members, and for how many seconds the device was busy with it.

    `lent`: whether a shape for more rows made it.
    """

    outcomes: list[Outcome]
    seconds: float
    lent: bool = False


class Stepper(Protocol):
    """The device's half of decoding."""

    def is_ready(self, members: ListLike[Sequence], size: int) -> bool:
        """Whether a step of these can be started without making something first."""
        ...

    def prepare(self, members: ListLike[Sequence], size: int) -> None:
        """Make what such steps need, once: nothing may be under way."""
        ...

    def launch(self, members: ListLike[Sequence], size: int) -> Any:
        """Start a step of `size` tokens a sequence; returns what `read` wants."""
        ...

    def read(self, handle: Any) -> Reading:
        """Wait for a step, and what it gave."""
        ...


@dataclass(frozen=True, slots=True)
class _Ticket:
    """What was started and is not read yet: a step, or the end of some prompts."""

    members: list[Sequence]
    handle: Any
    size: int = 0  # of a step; 0: prompts
    context: float = 0.0
    pieces: ListLike[tuple[Sequence, int]] = ()  # of prompts, and their tokens

    @property
    def gives(self) -> int:
        """Tokens for each member, at most."""
        return self.size or 1


class LaggedDecoder:
    """Starts steps and reads them one late.

    Args:
        size: tokens a sequence of every step, the root included; 0: by the budget.
        paths: of each task, where ranks are counted; none: they are not.
    """

    def __init__(
        self,
        stepper: Stepper,
        budget: Budget,
        *,
        size: int = 0,
        paths: ListLike[PathCounts] = (),
    ) -> None:
        self._stepper, self._budget, self._size, self._paths = stepper, budget, size, paths
        self._pending: deque[_Ticket] = deque()
        self._after_prompts = False  # whether the newest is one of prompts
        self._charges = Charges()
        self._before = 0  # size of the step that was read last
        self._starting = 0, 0  # sequences of the step that is being started, tokens of each
        self._given = 0  # tokens that were read and nobody was told of
        self._device_s = 0.0  # that the device was busy with what was read last
        self.done_at = 0.0  # the clock when it is through with what is under way, if as quickly

    def after_prompts(
        self,
        pieces: ListLike[tuple[Sequence, int]],
        members: ListLike[Sequence],
        handle: Any,
        *,
        began: float,
    ) -> None:
        """Note that a prefill was started.

        Args:
            pieces: its sequences and how many tokens of each.
            members: those whose prompt it ends.
            handle: what `read` wants, to tell the first token of each member.
            began: the clock before it was started.
        """
        self._push(_Ticket(list(members), handle, pieces=list(pieces)), began)
        self._charges.aside(time.perf_counter())
        self._after_prompts = True

    @property
    def under_way(self) -> bool:
        """Whether anything was started and is not read yet."""
        return bool(self._pending)

    def begin_step(self, *, others: bool = True) -> None:
        """The host turns to the next step.

        Args:
            others: whether it did something for rows that come and go since the last one.
        """
        if self._pending:
            charge = self._charges.aside if others else self._charges.work
            charge(time.perf_counter())

    def next_size(self, members: ListLike[Sequence]) -> int:
        """How many tokens a sequence gets in the next step of these, the root included."""
        return self._size or self._budget.choose_size(len(members), _context(members))

    def run(self, members: ListLike[Sequence], size: int = 0) -> int:
        """Start a step of these sequences and read what was started before it.

        Args:
            members: those that have not ended, as far as is known. They have room for the step.
            size: tokens of each; 0: `next_size`.

        Returns:
            How many tokens were read, those included that were read before an error came instead
            of a number.
        """
        if members:
            context = _context(members)
            size = size or self.next_size(members)
            if not self._stepper.is_ready(members, size):
                # So that no step's time has it in it.
                self._settle_to(0)
                members = [sequence for sequence in members if not sequence.ended]
                if members:
                    self._starting = len(members), size
                    self._stepper.prepare(members, size)
        if members:
            began = time.perf_counter()
            self._starting = len(members), size
            handle = self._stepper.launch(members, size)
            self._starting = 0, 0
            self._push(_Ticket(list(members), handle, size, context), began)
        left = 1 if members or self._after_prompts else 0
        self._after_prompts = False
        self._settle_to(left)
        if self._pending:
            self._charges.work(time.perf_counter())
        given, self._given = self._given, 0
        return given

    def drain(self) -> int:
        """Read all that is under way. Returns how many tokens it gave."""
        self.begin_step()  # whoever wants it has done something else
        self._after_prompts = False
        return self.run([])

    def shrink(self) -> int:
        """Make steps smaller, if it was one that memory did not suffice for just now.

        Returns:
            Tokens of the largest step from now on; 0: no step failed, or none can be smaller with
            as many sequences.
        """
        (count, size), self._starting = self._starting, (0, 0)
        if self._size or not count:
            return 0
        most = max(1, count * size // 2)
        self._budget.limit(most)  # of a plain one, too: fewer sequences must not have as many
        return most if size > 1 else 0

    def _settle_to(self, left: int) -> None:
        while len(self._pending) > left:
            self._settle(self._pending.popleft())

    def _push(self, ticket: _Ticket, began: float) -> None:
        """Note what was started; `began`: the clock before."""
        if not self._pending:
            self._charges.begin(began)
        self.done_at = max(time.perf_counter(), self.done_at) + self._device_s
        self._pending.append(ticket)
        for sequence in ticket.members:
            sequence.in_flight += 1
            sequence.ahead += ticket.gives

    def _settle(self, ticket: _Ticket) -> None:
        """Wait for what was started and write it down."""
        if not ticket.size:
            self._charges.work(time.perf_counter())  # it wrote down the step before
        reading = self._stepper.read(ticket.handle)
        now = time.perf_counter()
        self._device_s = reading.seconds
        self.done_at = now + len(self._pending) * reading.seconds
        if ticket.size:
            self._settle_step(ticket, reading, self._charges.step(now, reading.seconds))
        else:
            self._settle_prompts(ticket, reading, self._charges.prompts(now))

    def _settle_prompts(self, ticket: _Ticket, reading: Reading, seconds: float) -> None:
        for sequence, outcome in zip(ticket.members, reading.outcomes, strict=True):
            sequence.in_flight -= 1
            sequence.ahead -= 1
            if not sequence.ended:
                self._given += sequence.take(outcome.tokens)
        total = sum(count for _, count in ticket.pieces)
        for sequence, count in ticket.pieces:
            sequence.figures.prefill_s += seconds * count / total

    def _settle_step(self, ticket: _Ticket, reading: Reading, seconds: float) -> None:
        """Write a step into its sequences, their figures and the budget's."""
        count, size, context = len(ticket.members), ticket.size, ticket.context
        plain_s = self._budget.plain_seconds(count, context)
        # What held this one up would have held up a plain one as well.
        delay_s = seconds - self._budget.step_seconds(count, size, context)
        alive = given = 0
        for sequence, outcome in zip(ticket.members, reading.outcomes, strict=True):
            sequence.in_flight -= 1
            sequence.ahead -= size
            # What a slot gave after its text's end is thrown away.
            if sequence.ended or not (taken := sequence.take(outcome.tokens)):
                continue
            alive += 1
            given += taken
            sequence.figures.count_forward(
                taken, min(taken, outcome.accepted), outcome.drafted, seconds, plain_s, delay_s
            )
            if self._paths and sequence.request.seed % _PATHS_OF == 0:
                self._count_paths(sequence, outcome.ranks[:taken])
        # In the time between two readings the host has written down the step before, and started
        # the next one: where these are of another kind, it says little of this one.
        around = {self._before, *(later.size for later in self._pending if later.size)}
        self._before = size
        self._budget.count(
            size * count, count, context, seconds, typical=around == {size}, lent=reading.lent
        )
        if alive:
            self._budget.count_tokens(size, given, alive)
        self._given += given

    def _count_paths(self, sequence: Sequence, ranks: ListLike[int]) -> None:
        paths = self._paths[sequence.reads]
        for rank in ranks:
            if rank != NO_RANK:
                paths.count(sequence.ranks, None if rank < 0 else rank)


def _context(members: ListLike[Sequence]) -> float:
    return sum(len(sequence.tokens) for sequence in members) / len(members)
