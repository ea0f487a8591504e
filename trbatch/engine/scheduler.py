"""Who runs now: first come, first served, as many as slots and pages allow.

A sequence is admitted only when the pages for its prompt, all its output and one tree are free, so
nothing that runs can ever run out of memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable

from trbatch.engine.kv_cache import KVCache
from trbatch.engine.sequence import Sequence


class Scheduler:
    """Waiting and running sequences.

    Args:
        spare: tokens of room behind each sequence's longest text, for the nodes of a tree.
    """

    def __init__(self, cache: KVCache, *, slots: int, spare: int) -> None:
        self._cache = cache
        self._spare = spare
        self._free_slots = list(range(slots))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those that wait."""
        self.waiting.append(sequence)

    def can_admit(self) -> bool:
        """Whether the first that waits fits now."""
        if not self.waiting or not self._free_slots:
            return False
        return self._cache.pool.can_take(self._pages(self.waiting[0]))

    def admit(self) -> Sequence:
        """Give the first that waits a slot (the lowest free one) and its room."""
        sequence = self.waiting.popleft()
        sequence.slot = min(self._free_slots)
        self._free_slots.remove(sequence.slot)
        sequence.room = self._cache.take_room(self._tokens(sequence))
        sequence.begin_anew()
        self.running.append(sequence)
        return sequence

    def retire(self, sequence: Sequence) -> None:
        """Take a sequence out and free what it held."""
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._cache.give_back(sequence.room)

    def prefilling(self) -> list[Sequence]:
        """Those whose prompt is not wholly in the cache."""
        return [sequence for sequence in self.running if not sequence.prefilled]

    def decoding(self) -> list[Sequence]:
        """Those that give tokens, in the order of their slots."""
        ready = (sequence for sequence in self.running if sequence.prefilled)
        return sorted(ready, key=lambda sequence: sequence.slot)

    def drop(self, keys: Iterable[Hashable]) -> list[Sequence]:
        """Take out those with these keys, wherever they are."""
        unwanted = set(keys)

        def is_unwanted(sequence: Sequence) -> bool:
            return sequence.request.key in unwanted

        dropped = _take_out(self.waiting, is_unwanted)
        for sequence in [s for s in self.running if is_unwanted(s)]:
            self.retire(sequence)
            dropped.append(sequence)
        return dropped

    def _tokens(self, sequence: Sequence) -> int:
        return sequence.prompt_length + sequence.max_tokens + self._spare

    def _pages(self, sequence: Sequence) -> int:
        return self._cache.pages_for(self._tokens(sequence))


def _take_out(queue: deque[Sequence], unwanted: Callable[[Sequence], bool]) -> list[Sequence]:
    taken = [sequence for sequence in queue if unwanted(sequence)]
    for sequence in taken:
        queue.remove(sequence)
    return taken
