"""Tiny models that speak in letters: a fast tokenizer made here, so that grammars can be kept.

97 tokens as `tiny` has them: three special ones, most of printable ASCII, and a few of two letters
and more, so that a text can be cut into tokens in several ways.
"""

from __future__ import annotations

import functools
import string
from typing import Any

import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trbatch.engine.model import LoadedModel, from_network

_SPECIAL = ["<pad>", "<s>", "</s>"]
_LETTERS = string.ascii_letters + string.digits + ' !"#$%&()*+,-./:;=?[]_{}'
_PAIRS = [('"', ":"), ("a", "n"), ("o", "n"), ("an", "on"), ("y", "e"), ("ye", "s")]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a file."""
    plain = [letter.replace(" ", "Ġ") for letter in _LETTERS]
    words = [*_SPECIAL, *plain, *(a + b for a, b in _PAIRS)]
    assert len(words) <= tiny.VOCAB
    words += [f"<spare {number}>" for number in range(tiny.VOCAB - len(words))]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(_PAIRS)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def loaded(**changes: Any) -> LoadedModel:
    """A tiny Llama with that tokenizer."""
    network = tiny.network("llama", **changes)
    return from_network(network, tokenizer(), name="letters")
