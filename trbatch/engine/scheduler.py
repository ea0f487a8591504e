"""Who runs now, and in how much room.

Of those that wait, the one with the most to do goes first: what is long must not begin last, when
there is nothing left to run beside it. Nobody waits much longer than by their turn, though: only
the first few that wait are looked at, and none is let in that many places later than it came.

A sequence is admitted when its prompt fits and the others can still grow by two of their largest
steps; from there on it gets pages as it grows. When none is left, others give back what they have
ahead of need, though nothing that the next step writes to; then whoever was admitted last gives all
of its own back and goes to the front of those that wait; it runs its text again later and goes on
where it was. One sequence alone always fits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from itertools import islice

from trbatch.engine.kv_cache import KVCache
from trbatch.engine.sequence import Sequence

_ENDLESS = 1 << 60  # tokens
_SLACK, _ADJACENT_SLACK = 4, 16  # pages that a sequence gets beyond its need, where there are many


class Scheduler:
    """Waiting and running sequences.

    Args:
        spare: tokens of room behind each sequence's longest text, for the nodes of a tree; no step
            of it has more.
        window: how many that wait are looked at; 1: first come, first served.
        most_tokens: of a step of all that are read late, where its trees shrink as there are more
            of them; 0: they do not.
    """

    def __init__(
        self, cache: KVCache, *, slots: int, spare: int, window: int = 1, most_tokens: int = 0
    ) -> None:
        self._cache, self._pool = cache, cache.pool
        self._spare, self._window, self._most_tokens = spare, window, most_tokens
        self._free_slots = list(range(slots))
        self.most = slots  # sequences that may run together
        self.waiting: deque[Sequence] = deque()
        self._returned: deque[Sequence] = deque()  # those that ran already and had to give way
        self.running: list[Sequence] = []  # in the order in which they were admitted
        self._arrived = self._gone = 0  # of those that waited for the first time
        self.preemptions = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self._returned) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those that wait."""
        sequence.place = self._arrived
        self._arrived += 1
        self.waiting.append(sequence)

    def next(self) -> Sequence | None:
        """Who is admitted next, if there is a slot for it and it fits."""
        first = self._first() if len(self.running) < self.most else None
        if first is None:
            return None
        need = self._pages(first, self._begin_tokens(first))
        # With room for all that they may ever ask for, nobody has to be asked: there are many.
        if self._pool.can_take(need + self._most_reserve()):
            return first
        return first if self._can_take(need + self._reserve(), first) else None

    def admit(self, sequence: Sequence) -> None:
        """Give the one that `next` named a slot (the lowest free one) and its room."""
        if self._returned:
            self._returned.popleft()
        else:
            self.waiting.remove(sequence)
            self._gone += 1
        sequence.slot = min(self._free_slots)
        self._free_slots.remove(sequence.slot)
        count = self._wish(sequence, self._pages(sequence, self._begin_tokens(sequence)), 0)
        sequence.room = self._cache.room_of(self._pool.take(count))
        sequence.begin_anew()
        self.running.append(sequence)

    def has_room(self, sequence: Sequence, size: int) -> bool:
        """Whether a sequence that runs has all that its next step may write to. See `grow`."""
        capacity: int = sequence.room.capacity
        return self._need(sequence, size) <= capacity

    def grow(self, sequence: Sequence, size: int) -> bool:
        """Give a sequence room for its next step, if there is.

        Whoever has room for this step keeps it, whoever else is given some: so nobody has to be
        looked at twice.

        Args:
            size: tokens of each sequence whose steps are read late.

        Returns:
            Whether it has it now.
        """
        need, have = self._pages(sequence, self._need(sequence, size)), len(sequence.room.pages)
        if need <= have:
            return True
        if not self._can_take(need - have, sequence, size):
            return False
        count = self._wish(sequence, need, have) - have
        sequence.room.put(have, self._pool.take(count, behind=sequence.room.pages[-1]))
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence out and put it in front of those that wait."""
        assert sequence.in_flight == 0, "drain first"
        self.retire(sequence)
        sequence.slot = -1
        self._returned.appendleft(sequence)
        self.preemptions += 1

    def retire(self, sequence: Sequence) -> None:
        """Take a sequence out and free what it held."""
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._cache.give_back(sequence.room)
        sequence.room = None

    def prefilling(self) -> list[Sequence]:
        """Those whose prompt is not wholly in the cache."""
        return [sequence for sequence in self.running if not sequence.prefilled]

    def decoding(self) -> list[Sequence]:
        """Those that give tokens, in the order of their slots."""
        ready = (sequence for sequence in self.running if sequence.decodes)
        return sorted(ready, key=lambda sequence: sequence.slot)

    def drop(self, keys: Iterable[Hashable]) -> list[Sequence]:
        """Take out those with these keys, wherever they are. None may be under way.

        Returns:
            Those of them that ran.
        """
        unwanted = set(keys)

        def is_unwanted(sequence: Sequence) -> bool:
            return sequence.request.key in unwanted

        self._gone += len(_take_out(self.waiting, is_unwanted))
        _take_out(self._returned, is_unwanted)
        dropped = [sequence for sequence in self.running if is_unwanted(sequence)]
        for sequence in dropped:
            self.retire(sequence)
        return dropped

    def _first(self) -> Sequence | None:
        if self._returned:
            return self._returned[0]
        if not self.waiting or self._gone >= self.waiting[0].place + self._window - 1:
            return self.waiting[0] if self.waiting else None
        return max(islice(self.waiting, self._window), key=lambda s: s.prompt_length + s.max_tokens)

    def _begin_tokens(self, sequence: Sequence) -> int:
        return len(sequence.tokens) + self._largest_step(sequence, len(self.running) + 1)

    def _need(self, sequence: Sequence, size: int) -> int:
        """Tokens of room that its next step may need. See `grow`."""
        step = size if sequence.lagged else self._spare
        return len(sequence.tokens) + sequence.ahead + step

    def _pages(self, sequence: Sequence, tokens: int) -> int:
        """Pages for so many tokens, but never more than its longest text with a tree takes."""
        longest = sequence.prompt_length + sequence.max_tokens + self._spare
        return self._cache.pages_for(min(tokens, longest))

    def _wish(self, sequence: Sequence, need: int, have: int) -> int:
        """How many pages it gets: what it needs, and some more where there are many."""
        most = self._pages(sequence, _ENDLESS)
        wishes = [min(need + _SLACK, most)]
        if self._cache.adjacent:
            # All that it may ever need, so that its pages stay neighbours.
            wishes = [most, min(need + _ADJACENT_SLACK, most)]
        others = 2 * _SLACK * len(self.running)
        return next((w for w in wishes if self._pool.can_take(w - have + others)), need)

    def _largest_step(self, sequence: Sequence, count: int) -> int:
        """Tokens that it has in the largest step that `count` sequences may make."""
        if not self._most_tokens or not sequence.lagged:
            return self._spare
        return max(1, min(self._spare, self._most_tokens // count))

    def _late(self) -> int:
        """How many share the next step."""
        return sum(sequence.lagged and sequence.decodes for sequence in self.running)

    def _soon(self, sequence: Sequence, late: int) -> int:
        """Pages that a running sequence has after two of the largest steps.

        Args:
            late: see `_late`. Who does not decode yet will share its steps with all that run.
        """
        largest = self._largest_step(sequence, late if sequence.decodes else len(self.running))
        return self._pages(sequence, len(sequence.tokens) + sequence.ahead + 2 * largest)

    def _most_reserve(self) -> int:
        """No less than `_reserve`: each has room for what it has, and may begin a page behind."""
        return len(self.running) * (self._cache.pages_for(2 * self._spare) + 1)

    def _reserve(self) -> int:
        """Pages that those that run will ask for next."""
        late = self._late()
        return sum(max(0, self._soon(s, late) - len(s.room.pages)) for s in self.running)

    def _can_take(self, count: int, sequence: Sequence, size: int = 0) -> bool:
        """Whether it can have so many pages, if need be those that others have ahead of need.

        Args:
            size: of the step that room is made for, of which nobody loses any; see `grow`.
        """
        if not self._pool.can_take(count):
            late = self._late()
            for other in self.running:
                keep = max(self._soon(other, late), self._pages(other, self._need(other, size)))
                if keep < len(other.room.pages) and other is not sequence:
                    self._pool.give_back(other.room.cut(keep))
        return self._pool.can_take(count)


def _take_out(queue: deque[Sequence], unwanted: Callable[[Sequence], bool]) -> list[Sequence]:
    taken = [sequence for sequence in queue if unwanted(sequence)]
    for sequence in taken:
        queue.remove(sequence)
    return taken
