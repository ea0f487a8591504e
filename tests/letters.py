"""Tiny models that speak in letters: a fast tokenizer made here, so that grammars can be kept.

97 tokens as `tiny` has them: three special ones, most of printable ASCII, and a few of two letters
and more, so that a text can be cut into tokens in several ways.
"""

from __future__ import annotations

import functools
import string
from typing import Any

import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trbatch.engine.model import LoadedModel, from_network

THINK = ["<think>", "</think>"]
_SPECIAL = ["<pad>", "<s>", "</s>"]
_LETTERS = string.ascii_letters + string.digits + ' !"#$%&()*+,-./:;=?[]_{}'
_PAIRS = [('"', ":"), ("a", "n"), ("o", "n"), ("an", "on"), ("y", "e"), ("ye", "s")]


@functools.cache
def tokenizer(marks: str = "") -> PreTrainedTokenizerFast:
    """Byte-level BPE without a file.

    Args:
        marks: "shown": `<think>` and `</think>` are tokens; "hidden": ones that texts do not show.
    """
    plain = [letter.replace(" ", "Ġ") for letter in _LETTERS]
    words = [*_SPECIAL, *plain, *(a + b for a, b in _PAIRS)]
    assert len(words) <= tiny.VOCAB
    words += THINK if marks else []
    words += [f"<spare {number}>" for number in range(tiny.VOCAB - len(words))]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(_PAIRS)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    hidden = marks == "hidden"
    if marks:
        made.add_tokens([AddedToken(mark, special=hidden, normalized=False) for mark in THINK])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=THINK if hidden else [],
    )  # fmt: skip


def loaded(marks: str = "", **changes: Any) -> LoadedModel:
    """A tiny Llama with that tokenizer."""
    network = tiny.network("llama", **changes)
    return from_network(network, tokenizer(marks), name="letters")
