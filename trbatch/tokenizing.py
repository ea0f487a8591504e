"""A model's tokenizer on the client: transformers without torch, as the extra `tokenizers` has it.

The same tokenizer and the same chat template as a worker's, so that what is counted here is what a
worker counts. Only `trbatch submit --dry-run` needs it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trbatch.config import DEFAULT_MODEL, LONGEST_BY_DEFAULT
from trbatch.engine.sequence import Request
from trbatch.engine.text import EncodingFailed, prompt_text
from trbatch.errors import ModelError, RowError
from trbatch.models import known_folder, quiet_transformers

EXTRA = "pip install 'trbatch[tokenizers]'"


class NoTokenizer(Exception):
    """Tokens cannot be counted here. Says why, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Counted:
    """A prompt as the model gets it, or why it cannot."""

    text: str
    tokens: int
    error: RowError | None = None


class PromptCounter:
    """Renders and counts the prompts of one model.

    Args:
        model: as in `JobSpec`.
        revision: of a hub name.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        NoTokenizer: transformers is not installed, or has no tokenizer of this model here.
    """

    def __init__(self, model: str, revision: str = "", *, trust_remote_code: bool = False) -> None:
        # Its advice to install torch is not for who left it out.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        try:
            from transformers import AutoConfig, AutoTokenizer
        except ImportError as error:
            raise NoTokenizer(
                f"tokens are counted by the package transformers, without torch: {EXTRA}"
            ) from error
        source = _source(model)
        options = {"revision": revision or None, "trust_remote_code": trust_remote_code}
        try:
            with quiet_transformers():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(source, **options)
                config = AutoConfig.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise NoTokenizer(f"cannot load the tokenizer of {model}: {reason}") from error
        positions = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
        self.longest = min(positions, LONGEST_BY_DEFAULT)  # of a worker without --max-model-len

    def count(self, requests: Sequence[Request]) -> list[Counted]:
        """Render and count prompts, many at once: that is much quicker than one by one."""
        found = [self._rendered(request) for request in requests]
        for raw in (True, False):
            places = [
                place
                for place, request in enumerate(requests)
                if found[place].error is None and (request.messages is None) is raw
            ]
            lengths = self._lengths([found[place].text for place in places], special=raw)
            for place, tokens in zip(places, lengths, strict=True):
                found[place] = self._checked(found[place].text, tokens)
        return found

    def _rendered(self, request: Request) -> Counted:
        try:
            return Counted(prompt_text(self._tokenizer, request), 0)
        except EncodingFailed as failed:
            return Counted("", 0, failed.error)

    def _lengths(self, texts: list[str], *, special: bool) -> list[int]:
        """Tokens of each text; a chat template writes the special ones itself."""
        if not texts:
            return []
        with quiet_transformers():
            encoded = self._tokenizer(texts, add_special_tokens=special)
        return [len(ids) for ids in encoded["input_ids"]]

    def _checked(self, text: str, tokens: int) -> Counted:
        error = None
        if tokens == 0:
            error = RowError("empty_prompt", "the prompt has no tokens")
        elif tokens >= self.longest:
            cause = f"the prompt has {tokens:,} tokens; prompt and output together may have"
            error = RowError(
                "prompt_too_long", f"{cause} {self.longest:,} unless a worker's --max-model-len"
                " says otherwise",
            )  # fmt: skip
        return Counted(text, tokens, error)


def _source(model: str) -> str:
    try:
        folder = known_folder(model)
    except ModelError as error:
        raise NoTokenizer(error.message) from error
    if folder is None:
        what = "fetched" if model == DEFAULT_MODEL else "converted"
        raise NoTokenizer(f"{model} is {what} by the first worker or `trbatch run`, not here")
    return folder
