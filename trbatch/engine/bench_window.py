"""One engine timed over many prompts: the window in which its batch is full, and the tail apart.

A job has far more prompts than a batch, so what counts is how fast tokens come while every slot is
taken; the last sequences, for which nobody waits, are reported apart. A step is timed in those
calls of `Engine.step` in which no prompt can have been waiting for its prefill.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from trbatch.engine.bench_runs import checked
from trbatch.engine.engine import Engine
from trbatch.engine.sequence import Completion, Request

_FEW = 4  # calls of which no median is taken


@dataclass(slots=True)
class Span:
    """Tokens that came, and the seconds in which they did."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Tokens a second, None if nothing was timed."""
        return self.tokens / self.seconds if self.seconds else None


@dataclass(slots=True)
class Measured:
    """What an engine gave while decoding many requests."""

    slots: int  # sequences decoded together
    full: Span = field(default_factory=Span)  # every slot was taken
    tail: Span = field(default_factory=Span)  # nobody waited any more
    steps: Counter[int] = field(default_factory=Counter)  # of the full window, by tokens a sequence
    seconds: dict[int, list[float]] = field(default_factory=dict)  # of those without prefill
    contexts: list[float] = field(default_factory=list)  # of these: committed tokens a sequence
    done: list[Completion] = field(default_factory=list)

    @property
    def step_s(self) -> float | None:
        """Seconds of a step without prefill while the batch was full, None of too few.

        The mean over sizes of their medians: a step may be captured in the call that makes it
        first, which is no part of what steps cost.
        """
        medians = {size: self.step_s_of(size) for size in self.seconds}
        known = {size: median for size, median in medians.items() if median is not None}
        if not known:
            return None
        total = sum(median * len(self.seconds[size]) for size, median in known.items())
        return total / sum(len(self.seconds[size]) for size in known)

    @property
    def timed(self) -> int:
        """How many steps were timed."""
        return sum(map(len, self.seconds.values()))

    def step_s_of(self, size: int) -> float | None:
        """Median seconds of such steps of one size, None of too few."""
        times = self.seconds.get(size, [])
        return statistics.median(times) if len(times) >= _FEW else None

    @property
    def usual_size(self) -> int:
        """Tokens a sequence that most steps of the full window had."""
        return max(self.steps, key=lambda size: self.steps[size], default=1)

    @property
    def acceptance(self) -> float | None:
        """Tokens of a decode step and sequence; 1 without drafts."""
        forwards = sum(one.num_spec_steps for one in self.done)
        tokens = sum(one.completion_tokens - 1 for one in self.done)
        return tokens / forwards if forwards else None

    @property
    def context(self) -> float:
        """Committed tokens of a sequence in the steps timed; of all its decoding if none was."""
        middles = (one.prompt_tokens + one.completion_tokens / 2 for one in self.done)
        return statistics.mean(self.contexts or middles)


def measure(engine: Engine, requests: Sequence[Request], lengths: Sequence[int]) -> Measured:
    """Decode all requests.

    Args:
        requests: more than the engine has slots, or there is no tail to tell apart; they are
            taken in this order.
        lengths: tokens of their prompts.

    Raises:
        InputError: one of them failed.
    """
    for request in requests:
        engine.add(request)
    measured, chunk = Measured(engine.capacity), engine.config.prefill_chunk
    coming = iter(lengths)
    admitted = sum(islice(coming, engine.capacity))
    committed = admitted  # tokens of those that run
    # Tokens of prompts that may still wait for their prefill. One piece more than there are: what
    # a step gave may be read one call late.
    prefill = chunk + admitted
    tokens, sizes = _so_far(engine)
    end = time.perf_counter()
    while engine.unfinished:
        full = engine.unfinished >= engine.capacity
        finished = engine.step()
        start, end = end, time.perf_counter()  # what is counted between two calls counts as well
        before, (tokens, sizes) = (tokens, sizes), _so_far(engine)
        gained, made = tokens - before[0], sizes - before[1]
        span = measured.full if full else measured.tail
        span.tokens += gained
        span.seconds += end - start
        if full:
            measured.steps += made
        if full and prefill <= 0 and made.total() == 1:
            measured.seconds.setdefault(next(iter(made)), []).append(end - start)
            measured.contexts.append(committed / engine.capacity)
        admitted = sum(islice(coming, len(finished)))
        prefill -= chunk
        if finished:
            prefill = max(0, prefill) + chunk + admitted
        committed += gained + admitted
        committed -= sum(one.prompt_tokens + one.completion_tokens for one in finished)
        measured.done += finished
    measured.done = checked(measured.done)
    return measured


def _so_far(engine: Engine) -> tuple[int, Counter[int]]:
    """Tokens that an engine gave, and its steps by tokens a sequence."""
    stats = engine.stats()
    return int(stats["tokens"]), Counter(stats["tree_sizes"])
