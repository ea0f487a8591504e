"""Tokens as text and as bytes: what log probabilities are told with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from trbatch.engine.sequence import Alternative, Likelihood, TokenLogprob

_SPELLED: WeakKeyDictionary[Any, dict[int, tuple[str, bytes | None]]] = WeakKeyDictionary()
_BROKEN = "\ufffd"  # what a part of a character is decoded to
_A_BYTE = re.compile("<0x([0-9A-F]{2})>")


def spelled(tokenizer: Any, found: Sequence[Likelihood]) -> list[TokenLogprob]:
    """Likelihoods with their tokens as text. One that is part of a character has a \ufffd in its
    text, and its bytes beside it.
    """
    known = _SPELLED.setdefault(tokenizer, {})

    def spell(token: int) -> tuple[str, bytes | None]:
        if token not in known:
            text = str(tokenizer.decode([token], skip_special_tokens=False))
            known[token] = text, _bytes_of(tokenizer, token, text)
        return known[token]

    def alternative(token: int, logprob: float) -> Alternative:
        text, raw = spell(token)
        return Alternative(text, token, logprob, raw)

    made = []
    for one in found:
        text, raw = spell(one.token_id)
        top = [alternative(token, logprob) for token, logprob in one.top]
        made.append(TokenLogprob(text, one.token_id, one.logprob, one.rank, top, raw))
    return made


def _bytes_of(tokenizer: Any, token: int, text: str) -> bytes | None:
    """A token's bytes where its text does not say them; None where it does, or nothing does."""
    if _BROKEN not in text:
        return None
    word = tokenizer.convert_ids_to_tokens(token)
    if isinstance(word, bytes):
        return word
    if found := _A_BYTE.fullmatch(word):
        return bytes([int(found[1], 16)])
    letters = _byte_letters()
    if not all(letter in letters for letter in word):
        return None
    raw = bytes(letters[letter] for letter in word)
    return raw if raw.decode(errors="replace") == text else None


@cache
def _byte_letters() -> dict[str, int]:
    """The letters by which GPT-2 and its successors write bytes in their vocabularies."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
