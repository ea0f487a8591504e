"""The reasoning of models that think, apart from their answer.

A text has reasoning if it begins with the first marker, or if the prompt ends with it: some chat
templates open the reasoning themselves. It ends at the second marker; where that never comes, all
of the text is reasoning. `split` says so of a text that has ended, `Thought` while it is written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike
from typing import Any

from trbatch.config import SamplingParams

_TAIL = 16  # tokens at a prompt's end among which a marker is looked for


def split(
    tokenizer: Any, params: SamplingParams, prompt: ListLike[int], ids: ListLike[int], text: str
) -> tuple[str | None, str]:
    """Reasoning and answer, without markers and without blanks where they were cut.

    An answer that has to be of some form keeps its blanks: they are part of the form.

    Args:
        ids: what was generated.
        text: the same as text, cut at a stop string.
    """
    start, end = params.reasoning_start, params.reasoning_end
    if not end:
        return None, text
    marks = [_special(tokenizer, mark) for mark in (start, end)]
    begins = bool(ids) and ids[0] == marks[0]  # a special token, which is not in the text
    if not begins:
        begins = text.lstrip().startswith(start)
        text = text.lstrip().removeprefix(start) if begins else text
    if not begins and not _tail(tokenizer, prompt).endswith(start):
        return None, text
    if marks[1] is not None and marks[1] in ids:
        thought = _decoded(tokenizer, ids[: ids.index(marks[1])]).removeprefix(start)
        answer = text.removeprefix(thought)
    else:
        thought, _, answer = text.partition(end)
    return thought.strip(), answer if params.structured else answer.lstrip()


class Thought:
    """Where the answer begins in a text that is being written.

    Args:
        prompt: the tokens before the text.
        piece: a token's bytes in the text; b"" of one that texts do not show.
    """

    def __init__(
        self,
        tokenizer: Any,
        params: SamplingParams,
        prompt: ListLike[int],
        piece: Callable[[int], bytes],
    ) -> None:
        start, end = params.reasoning_start, params.reasoning_end
        self._piece = piece
        self._start, self._end = start.encode(), end.encode()
        self._marks = [_special(tokenizer, mark) for mark in (start, end)]
        tail = _tail(tokenizer, prompt) if end else ""
        self._opened = bool(end) and tail.endswith(start)
        # The token with which the text may open its reasoning, where there is such a one.
        self.opening: int | None = None
        if end and not self._opened and not tail.endswith(end):
            self.opening = _token(tokenizer, start)
        self._ids: list[int] = []
        self._said = bytearray()  # the text of these
        self._ends: list[int] = []  # bytes up to the end of each of them

    @property
    def spelled(self) -> bytes:
        """The second marker, where texts show it; b"" where it is a token of its own."""
        return b"" if self._marks[1] is not None else self._end

    def answer(self, ids: ListLike[int]) -> int | None:
        """How many tokens stand before the answer; None while the text is in its reasoning."""
        if not self._end:
            return 0
        self._read(ids)
        begin = self._begin(ids)
        if begin is None:
            return 0
        if (mark := self._marks[1]) is not None:
            return ids.index(mark) + 1 if mark in ids else None
        found = self._said.find(self._end, begin)
        return None if found < 0 else bisect_left(self._ends, found + len(self._end)) + 1

    def begun(self) -> list[int]:
        """How many bytes of the second marker the text may end with, as last read; 0 among them."""
        end = self.spelled
        return [count for count in range(len(end)) if self._said.endswith(end[:count])]

    def _begin(self, ids: ListLike[int]) -> int | None:
        """Bytes before the reasoning; None if there is none."""
        if ids and ids[0] == self._marks[0]:
            return 0
        said = self._said.lstrip()
        if said.startswith(self._start):
            return len(self._said) - len(said) + len(self._start)
        return 0 if self._opened else None

    def _read(self, ids: ListLike[int]) -> None:
        ids = list(ids)
        same = len(self._ids)
        if ids[:same] != self._ids:
            pairs = enumerate(zip(ids, self._ids, strict=False))
            same = next((at for at, (a, b) in pairs if a != b), min(len(ids), same))
        del self._ends[same:]
        del self._said[self._ends[-1] if self._ends else 0 :]
        for token in ids[same:]:
            self._said += self._piece(token)
            self._ends.append(len(self._said))
        self._ids = ids


def overrunning(end: bytes, pieces: Iterable[bytes]) -> list[list[int]]:
    """The tokens that would end the reasoning and say more at once.

    The answer's form holds from a token on, so its first bytes must not stand in one with a marker.

    Args:
        end: what ends it.
        pieces: each token's bytes.

    Returns:
        For each number of bytes of `end` that stand before the token: their ids.
    """
    found: list[list[int]] = [[] for _ in end]
    for token, piece in enumerate(pieces):
        if end[-1:] not in piece[:-1]:
            continue
        if 0 <= piece.find(end) < len(piece) - len(end):
            found[0].append(token)
        for count in range(1, len(end)):
            if len(piece) > len(end) - count and piece.startswith(end[count:]):
                found[count].append(token)
    return found


def _special(tokenizer: Any, mark: str) -> int | None:
    """The id of a marker that is left out of texts."""
    if mark not in getattr(tokenizer, "all_special_tokens", ()):
        return None
    return int(tokenizer.convert_tokens_to_ids(mark))


def _token(tokenizer: Any, mark: str) -> int | None:
    """The id of a marker that is one token."""
    found = tokenizer.convert_tokens_to_ids(mark)
    return found if found is not None and found != tokenizer.unk_token_id else None


def _tail(tokenizer: Any, prompt: ListLike[int]) -> str:
    """What the prompt ends with, without blanks."""
    return str(tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False)).rstrip()


def _decoded(tokenizer: Any, ids: ListLike[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
