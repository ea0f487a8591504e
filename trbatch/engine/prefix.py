"""Prompts that begin alike: what one has put into the cache, the others need not run again.

A page that is full of prompt is known by a hash of its tokens and all tokens before it. A prompt
whose first pages are known takes them and runs the rest, at least its last token. Pages stay known
when nobody holds them any more, until they are needed for something else. They are never written
again: a sequence writes behind what it has, and that is behind the last page that it shares.

A whole prompt that another sequence has run, and that still decodes, needs its last token only:
what does not fill a page is copied. So the samples of a row run its prompt once.

What prompts teach must not depend on who ran them first: the candidates after each token are kept
beside its keys and values, and are learned from where the pages are taken.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as ListLike
from collections.abc import Set
from itertools import takewhile
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from trbatch.engine.kv_cache import KVCache
from trbatch.engine.sequence import Sequence

Piece = tuple[Sequence, int]  # whose text, and how many of its tokens come next
_KEY_BYTES = 16
_WORTH_WAITING = 4  # pages that another is about to fill


class Prefixes:
    """Known pages of one cache, which holds one model's keys and values.

    Where a sequence's pages should be neighbours, known pages are copied to its own; else they are
    held by all that begin alike.

    Args:
        candidates: k, of each token; 0: none are kept.
        sharing: whether anything is shared at all.
    """

    def __init__(self, cache: KVCache, *, candidates: int, sharing: bool = True) -> None:
        self._cache, self._pool, self.page_size = cache, cache.pool, cache.page_size
        self._sharing = sharing
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._recalled: set[int] = set()  # known pages whose candidates are kept
        # Those that have run a whole prompt. Who has ended is kept by nobody, so not here either.
        self._whole: WeakValueDictionary[bytes, Sequence] = WeakValueDictionary()
        # [slots, k] what the model said after each token that was run as a prompt.
        self.candidates: Tensor | None = None
        if sharing and candidates:
            slots = cache.pool.pages * cache.page_size
            self.candidates = torch.zeros(slots, candidates, dtype=torch.int32, device=cache.device)
        self.hit_tokens = 0  # that did not have to be run
        cache.pool.forget = self._forget

    def share(self, sequence: Sequence) -> None:
        """Give a sequence what comes next in its text, as far as it is known."""
        self._share_pages(sequence)
        self._copy_tail(sequence)

    def _share_pages(self, sequence: Sequence) -> None:
        found: list[int] = []
        begin = sequence.cached // self.page_size
        for index in range(begin, self._last(sequence) if self._at_border(sequence) else 0):
            page = self._pages.get(self._key(sequence, index))
            if page is None:
                break
            found.append(page)
        if not found:
            return
        self._pool.hold(found)
        if self._cache.adjacent:
            self._copy(found, sequence.room.pages[begin : begin + len(found)])
            self._pool.give_back(found)
        else:
            self._pool.give_back(sequence.room.put(begin, found))
        if sequence.recalled == sequence.cached:
            kept = [page in self._recalled for page in found]
            sequence.recalled += self.page_size * [*kept, False].index(False)
        sequence.cached += self.page_size * len(found)
        self.hit_tokens += self.page_size * len(found)

    def _copy_tail(self, sequence: Sequence) -> None:
        """Behind its last whole page, what one with the same prompt has there."""
        first, end = sequence.cached, sequence.goal - 1
        if first != self._last(sequence) * self.page_size or not self._is_fresh(sequence):
            return
        other = self._whole.get(self._whole_key(sequence))
        if other is None or not other.decodes or first == end:
            return
        source, target = (one.room.slots[first:end] for one in (other, sequence))
        self._copy_slots(source, target)
        if sequence.recalled == first and other.recalled >= end:
            sequence.recalled = end
        sequence.cached = end
        self.hit_tokens += end - first

    def is_worth_waiting(self, sequence: Sequence, under_way: Set[bytes]) -> bool:
        """Whether others are about to fill many of the pages that come next, or run all of it."""
        left = sequence.goal - sequence.cached
        if left > 1 and self._is_fresh(sequence) and self._whole_key(sequence) in under_way:
            return True
        begin = sequence.cached // self.page_size
        end = self._last(sequence) if self._at_border(sequence) else begin
        keys = (self._key(sequence, index) for index in range(begin, end))
        found = sum(1 for _ in takewhile(under_way.__contains__, keys))
        return found >= _WORTH_WAITING

    def keys_of(self, sequence: Sequence, count: int) -> list[bytes]:
        """What the pages say that are full when the next `count` tokens have been run.

        And what the whole prompt says: others that say the same wait for all of it.
        """
        if not self._sharing:
            return []
        begin, end = sequence.cached // self.page_size, (sequence.cached + count) // self.page_size
        whole = [self._whole_key(sequence)] if not sequence.generated else []
        return [*(self._key(sequence, index) for index in range(begin, end)), *whole]

    def publish(self, sequence: Sequence, count: int) -> None:
        """Others may have the pages that were filled by the last `count` tokens that were run."""
        if not self._sharing:
            return
        if sequence.decodes and not sequence.generated:
            # The newest, which is likely to decode longest.
            self._whole[self._whole_key(sequence)] = sequence
        end = sequence.cached // self.page_size
        for index in range((sequence.cached - count) // self.page_size, end):
            key, page = self._key(sequence, index), sequence.room.pages[index]
            if key not in self._pages:
                self._pages[key], self._keys[page] = page, key
                self._pool.know(page)
                if sequence.recalled >= (index + 1) * self.page_size:
                    self._recalled.add(page)

    def keep(self, pieces: ListLike[Piece], candidates: Tensor) -> None:
        """Keep what the model said after the tokens that come next.

        Args:
            candidates: [N, k] of all pieces, one after the other.
        """
        if self.candidates is None:
            return
        slots = [s.room.slots[s.cached : s.cached + count] for s, count in pieces]
        self.candidates.index_copy_(0, torch.cat(slots), candidates.to(torch.int32))
        self.count_kept(pieces)

    def count_kept(self, pieces: ListLike[Piece]) -> None:
        """What the model said after the tokens that come next is kept, or is about to be."""
        for sequence, count in pieces:
            if sequence.recalled == sequence.cached:
                sequence.recalled += count

    def recall(self, sequence: Sequence, first: int, end: int) -> Tensor:
        """[end - first, k] int64: what was kept of a sequence's tokens, up to `recalled`."""
        assert self.candidates is not None and end <= sequence.recalled
        return self.candidates[sequence.room.slots[first:end]].to(torch.int64)

    def clear(self) -> None:
        """Forget all pages."""
        for page in list(self._keys):
            self._pool.unknow(page)
            self._forget(page)
        self._whole.clear()

    def _last(self, sequence: Sequence) -> int:
        """Pages that it may share: its last token has to be run."""
        if not self._sharing or sequence.wants_prompt_logprobs:
            return 0
        return (sequence.goal - 1) // self.page_size

    def _is_fresh(self, sequence: Sequence) -> bool:
        """Whether all that it runs is a prompt that others may have run."""
        return self._sharing and not sequence.generated and not sequence.wants_prompt_logprobs

    def _whole_key(self, sequence: Sequence) -> bytes:
        """What its whole prompt says; no page has this key."""
        if not sequence.prompt_key:
            pages = sequence.prompt_length // self.page_size
            digest = hashlib.blake2b(digest_size=_KEY_BYTES, person=b"whole prompt")
            digest.update(self._key(sequence, pages - 1) if pages else b"")
            rest = sequence.tokens[pages * self.page_size : sequence.prompt_length]
            digest.update(array("q", rest).tobytes())
            sequence.prompt_key = digest.digest()
        return sequence.prompt_key

    def _at_border(self, sequence: Sequence) -> bool:
        return sequence.cached % self.page_size == 0

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys = sequence.page_keys
        while len(keys) <= index:
            begin = len(keys) * self.page_size
            text = array("q", sequence.tokens[begin : begin + self.page_size])
            assert len(text) == self.page_size, "only a full page has a key"
            digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=_KEY_BYTES)
            digest.update(text.tobytes())
            keys.append(digest.digest())
        return keys[index]

    def _copy(self, source: ListLike[int], target: ListLike[int]) -> None:
        places = (self._cache.room_of(source).slots, self._cache.room_of(target).slots)
        self._copy_slots(*places)

    def _copy_slots(self, source: Tensor, target: Tensor) -> None:
        self._cache.move(source, target)
        if self.candidates is not None:
            self.candidates[target] = self.candidates[source]

    def _forget(self, page: int) -> None:
        del self._pages[self._keys.pop(page)]
        self._recalled.discard(page)
