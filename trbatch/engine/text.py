"""From a request to token ids, and from token ids to text that may have to stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from trbatch.config import SamplingParams, check_chat_template_kwargs
from trbatch.engine.reasoning import split
from trbatch.engine.sequence import Likelihood, Request, TokenLogprob
from trbatch.engine.spelling import spelled
from trbatch.errors import RowError, UsageError
from trbatch.templates import FAILURES


class EncodingFailed(Exception):
    """A request that cannot become tokens. `error` says why, for its error row."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error = RowError(code, message)


def encode(tokenizer: Any, request: Request, vocab_size: int) -> list[int]:
    """The prompt's token ids.

    A `prompt` is taken as it is, with the tokenizer's special tokens; `messages` go through the
    model's chat template with the turn of the assistant opened.

    Raises:
        EncodingFailed: no chat template, a template that refuses the messages, or no tokens.
    """
    (ids,) = encode_all(tokenizer, [request], vocab_size)
    if isinstance(ids, EncodingFailed):
        raise ids
    return ids


def encode_all(
    tokenizer: Any, requests: Sequence[Request], vocab_size: int
) -> list[list[int] | EncodingFailed]:
    """The token ids of many prompts, or why one has none. See `encode`.

    Together, since a tokenizer takes a third of the time for a text among others that it takes for
    one alone; samples of one row are encoded once.
    """
    texts: list[_Text | list[int] | EncodingFailed] = []
    for request in requests:
        try:
            texts.append(_text_of(tokenizer, request))
        except EncodingFailed as failed:
            texts.append(failed)
    ids = _encoded(tokenizer, dict.fromkeys(text for text in texts if isinstance(text, _Text)))
    return [
        _checked(list(ids[text]), vocab_size) if isinstance(text, _Text)
        else _checked(text, vocab_size) if isinstance(text, list)
        else text
        for text in texts
    ]  # fmt: skip


class _Text(NamedTuple):
    """What goes through the tokenizer. `whole`: the special tokens are in it already."""

    text: str
    whole: bool


def _text_of(tokenizer: Any, request: Request) -> _Text | list[int]:
    if request.prompt_token_ids is not None:
        return list(request.prompt_token_ids)
    # The template writes the special tokens itself.
    return _Text(prompt_text(tokenizer, request), whole=request.messages is not None)


def _encoded(tokenizer: Any, texts: Iterable[_Text]) -> dict[_Text, list[int]]:
    found: dict[_Text, list[int]] = {}
    for whole in (True, False):
        group = [text for text in texts if text.whole == whole]
        asked = {"add_special_tokens": not whole}
        if len(group) > 1 and _takes_many(tokenizer):
            ids = tokenizer([text.text for text in group], **asked)["input_ids"]
            found |= zip(group, ids, strict=True)
        else:
            found |= {text: tokenizer(text.text, **asked)["input_ids"] for text in group}
    return found


def _takes_many(tokenizer: Any) -> bool:
    """Whether a text among others surely gets the tokens that it gets alone.

    Code Llama's, for one, looks for the place to fill in lone texts only.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast  # slow to import

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )


def _checked(ids: list[int], vocab_size: int) -> list[int] | EncodingFailed:
    if not ids:
        return EncodingFailed("empty_prompt", "the prompt has no tokens")
    if min(ids) < 0 or max(ids) >= vocab_size:
        return EncodingFailed("invalid_token", f"a prompt token is outside 0 … {vocab_size - 1}")
    return ids


def prompt_text(tokenizer: Any, request: Request) -> str:
    """The text that the model is asked to go on with, without what a tokenizer adds to it.

    Raises:
        EncodingFailed: no chat template, or one that refuses the messages.
    """
    if request.messages is None:
        return request.prompt or ""
    if not getattr(tokenizer, "chat_template", None):
        raise EncodingFailed(
            "no_chat_template",
            "the model has no chat template: give 'prompt' instead of 'messages'",
        )
    arguments = dict(request.chat_template_kwargs or {})
    try:
        check_chat_template_kwargs(arguments)  # once more: whoever wrote the job folder
    except UsageError as error:
        raise EncodingFailed("invalid_chat_template_kwargs", error.message) from error
    # A last message that is to be continued leaves no turn to open.
    arguments.setdefault("add_generation_prompt", not arguments.get("continue_final_message"))
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in request.messages], tokenize=False, **arguments
        )
    except FAILURES as error:
        raise EncodingFailed(
            "chat_template_failed", f"the model's chat template refuses these messages: {error}"
        ) from error
    return text


def opening_ids(tokenizer: Any) -> list[int]:
    """The ids with which the model's answers begin: the chat template's, else its first token."""
    if getattr(tokenizer, "chat_template", None):
        question = [{"role": "user", "content": "?"}]
        try:
            asked, opened = (
                tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=turn)
                for turn in (False, True)
            )
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError):
            asked, opened = "", ""  # a template that wants more than a question
        if opened.startswith(asked) and len(opened) > len(asked):
            return list(tokenizer(opened[len(asked) :], add_special_tokens=False)["input_ids"])
    first = getattr(tokenizer, "bos_token_id", None)
    return [] if first is None else [first]


class StopChecker:
    """Finds the first token at which a text has to end. Fed one token at a time.

    Args:
        eos: the model's end-of-text ids.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams, eos: frozenset[int]) -> None:
        self._tokenizer, self._params = tokenizer, params
        ends = set(params.stop_token_ids)
        self.stop_ids = ends if params.ignore_eos else ends | eos
        self._stops = params.stop
        self._ids: list[int] = []
        self._text = _GrowingText(tokenizer) if params.stop else None
        self._cut: int | None = None  # characters before the stop string
        self._ended_by_id = False

    def takes_all(self, tokens: Sequence[int]) -> bool:
        """Take the next tokens if it is plain that none of them ends the text: nearly always.

        Returns:
            Whether it took them; if not it took none, and has to see them one by one.
        """
        if self._text is not None or not self.stop_ids.isdisjoint(tokens):
            return False
        self._ids += tokens
        return True

    def ends_with(self, token: int) -> bool:
        """Take the next token; whether the text ends with it."""
        self._ids.append(token)
        if token in self.stop_ids:
            self._ended_by_id = True
            return True
        if self._text is None:
            return False
        before = len(self._text.text)
        self._text.push(token)
        if len(self._ids) <= self._params.min_tokens:
            return False
        # A stop string may lie across the border of what was there before.
        reaches = ((stop, max(0, before - len(stop) + 1)) for stop in self._stops)
        found = [at for stop, reach in reaches if (at := self._text.text.find(stop, reach)) >= 0]
        self._cut = min(found, default=None)
        return self._cut is not None

    def text(self) -> str:
        """The text so far, without a stop token and from a stop string on cut away."""
        if self._cut is not None and self._text is not None:
            return self._text.text[: self._cut]
        ids = self._ids[:-1] if self._ended_by_id else self._ids
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def parts(self, prompt: Sequence[int]) -> tuple[str | None, str]:
        """Reasoning, if there is any, and the text without it.

        Args:
            prompt: the tokens before.
        """
        return split(self._tokenizer, self._params, prompt, self._ids, self.text())

    def spelled(self, found: Sequence[Likelihood]) -> list[TokenLogprob]:
        """Likelihoods with their tokens as text."""
        return spelled(self._tokenizer, found)


class _GrowingText:
    """Decodes token by token. A character may take several tokens: it is held back till whole."""

    _KEEP = 6  # tokens decoded again for the sake of spaces and joined bytes

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = ""
        self._ids: list[int] = []
        self._prefix, self._read = 0, 0  # ids before `_read` are in `text`

    def push(self, token: int) -> None:
        self._ids.append(token)
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self.text += now[len(before) :]
            self._prefix = max(0, len(self._ids) - self._KEEP)
            self._read = len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
