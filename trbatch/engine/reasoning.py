"""The reasoning of models that think, apart from their answer.

A text has reasoning if it begins with the first marker, or if the prompt ends with it: some chat
templates open the reasoning themselves. It ends at the second marker; where that never comes, all
of the text is reasoning.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Any

from trbatch.config import SamplingParams

_TAIL = 16  # tokens at a prompt's end among which a marker is looked for


def split(
    tokenizer: Any, params: SamplingParams, prompt: ListLike[int], ids: ListLike[int], text: str
) -> tuple[str | None, str]:
    """Reasoning and answer, without markers and without blanks where they were cut.

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
    if not begins and not _opened(tokenizer, start, prompt):
        return None, text
    if marks[1] is not None and marks[1] in ids:
        thought = _decoded(tokenizer, ids[: ids.index(marks[1])]).removeprefix(start)
        return thought.strip(), text.removeprefix(thought).lstrip()
    thought, _, answer = text.partition(end)
    return thought.strip(), answer.lstrip()


def _special(tokenizer: Any, mark: str) -> int | None:
    """The id of a marker that is left out of texts."""
    if mark not in getattr(tokenizer, "all_special_tokens", ()):
        return None
    return int(tokenizer.convert_tokens_to_ids(mark))


def _opened(tokenizer: Any, start: str, prompt: ListLike[int]) -> bool:
    tail = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False)
    return str(tail).rstrip().endswith(start)


def _decoded(tokenizer: Any, ids: ListLike[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
