"""A tiny random-weight model as files, with a tokenizer of one word a token."""

from __future__ import annotations

from pathlib import Path

import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(5, tiny.VOCAB)]
CHAT = "{% for m in messages %}user {{ m['content'] }} {% endfor %}assistant"


def write_model(folder: Path) -> None:
    """Write the model and its tokenizer as a hub would have them."""
    tiny.network("llama").save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "user", "assistant", *WORDS]
    known = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
