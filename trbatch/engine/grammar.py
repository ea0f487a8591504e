"""Masks of grammars: which tokens may come next in a text that has to be of some form.

A row's grammar is a logits processor like any other, so speculation needs no rules of its own: at
each node that verification comes by, the grammar is where the committed text and the node's
ancestors have led it, and a drafted token that it forbids is never the model's. The walk only comes
by nodes whose tokens are then committed, so there is one mask for each token of the text, and a
step back only where a text begins anew.

A grammar often leaves one way to go on, e.g. the name of the next key. These forced tokens are
drafted first (`forced`), whatever the rows say.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Sequence as ListLike
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trbatch import structured
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Completion, Request
from trbatch.errors import MissingExtra, RowError

_KEPT = 256  # compiled grammars


class GrammarFailed(Exception):
    """A request whose grammar cannot be used here. `error` says why, for its error row."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error = RowError(code, message)


class Grammars:
    """The grammars of one engine's rows, each compiled once."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded, self.ends = loaded, loaded.eos_token_ids
        self._tokenizer: Any = None  # llguidance's, made when the first row needs it: half a second
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # matchers at their beginning
        self.masks, self.seconds, self.compile_seconds = 0, 0.0, 0.0

    def constrained(self, request: Request, prompt_length: int) -> Request:
        """The request with its grammar as the last of its processors, if it asks for one.

        Raises:
            GrammarFailed: there is no library, or none for this tokenizer, or the grammar is bad.
        """
        asked = request.sampling.structured
        if asked is None:
            return request
        grammar = Grammar(self, self._matcher(dict(asked)), prompt_length, dict(asked))
        return replace(request, logits_processors=(*request.logits_processors, grammar))

    def checked(self, completion: Completion, request: Request) -> Completion:
        """The completion; an error if it ended by itself and its text is not of the asked form."""
        grammar = grammar_of(request)
        if grammar is None or completion.finish_reason != "stop":
            return completion
        if not (why := grammar.faults(completion)):
            return completion
        return replace(
            completion, finish_reason="error", text="", token_ids=[],
            error_code="structured_output_failed", error_message=why,
        )  # fmt: skip

    def _matcher(self, asked: dict[str, Any]) -> Any:
        key = json.dumps(asked)
        if key not in self._compiled:
            self._compiled[key] = self._compile(asked)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key].deep_copy()

    def _compile(self, asked: dict[str, Any]) -> Any:
        start = time.perf_counter()
        try:
            grammar = structured.grammar_of(asked)
            from llguidance import LLMatcher

            matcher = LLMatcher(self._own_tokenizer(), grammar, log_level=0)
        except MissingExtra as error:
            said = f"{error.message} (on the worker); {error.hint}"
            raise GrammarFailed("structured_output_unavailable", said) from error
        except (ValueError, RecursionError) as error:
            raise GrammarFailed("invalid_sampling", f"structured: {error}") from error
        finally:
            self.compile_seconds += time.perf_counter() - start
        if matcher.is_error():
            raise GrammarFailed(
                "invalid_sampling", f"structured: {structured.in_short(matcher.get_error())}"
            )
        return matcher

    def _own_tokenizer(self) -> Any:
        if self._tokenizer is None:
            tokenizer, ends = self._loaded.tokenizer, sorted(self.ends)
            why = ""
            if not isinstance(tokenizer, PreTrainedTokenizerFast):
                why = f"its tokenizer is a {type(tokenizer).__name__}, not one of the fast kind"
            elif not ends:
                why = "the model has no token that ends a text"
            if why:
                raise GrammarFailed(
                    "structured_output_unavailable",
                    f"structured output is not possible with {self._loaded.name}: {why}",
                )
            from llguidance.hf import from_tokenizer

            words = max(self._loaded.vocab_size, len(tokenizer))
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=words, eos_token=ends)
        return self._tokenizer


class Grammar:
    """Where one row's text stands in its grammar. A logits processor.

    Args:
        matcher: llguidance's, at the beginning.
        prompt_length: tokens before the text.
        asked: in the form of `structured.normalised`.
    """

    def __init__(
        self, owner: Grammars, matcher: Any, prompt_length: int, asked: dict[str, Any]
    ) -> None:
        self._owner, self._matcher, self._prompt_length = owner, matcher, prompt_length
        self._asked = asked
        self._read: list[int] = []  # tokens that brought the matcher where it is

    def __call__(self, context: ListLike[int], logits: Tensor) -> Tensor:
        """Logits [V] with -inf where the grammar forbids the token after this context.

        Where a setting has forbidden all that the grammar allows, the grammar wins: all that it
        allows is equally likely then.

        Raises:
            ValueError: the grammar has no way to go on, or became too complex.
        """
        start = time.perf_counter()
        text = context[self._prompt_length :]
        if not self._owner.ends.isdisjoint(text):
            return logits  # behind a drafted end of the text: whatever comes here is cut away
        self._follow(text)
        forbidden = self._forbidden()[: logits.shape[0]].to(logits.device)
        masked = logits.masked_fill(forbidden, -torch.inf)
        if masked.max() == -torch.inf:
            masked = torch.zeros_like(logits).masked_fill_(forbidden, -torch.inf)
        self._owner.masks += 1
        self._owner.seconds += time.perf_counter() - start
        return masked

    def forced(self, context: ListLike[int], most: int) -> list[int]:
        """The next tokens, as far as the grammar leaves one way to go on; `most` of them."""
        start = time.perf_counter()
        self._follow(context[self._prompt_length :])
        tokens = self._matcher.compute_ff_tokens()[:most]
        self._owner.seconds += time.perf_counter() - start
        return list(tokens)

    def faults(self, completion: Completion) -> str:
        """What keeps a text that has ended from being of the asked form; "" if nothing does."""
        (kind, content), text = next(iter(self._asked.items())), completion.text
        ended = completion.token_ids[-1:]
        tokens = completion.token_ids
        if ended and ended[0] in self._owner.ends:
            tokens = tokens[:-1]
        try:
            self._follow(tokens)
            whole = self._matcher.is_accepting()
            if whole and kind == "json":
                json.loads(text)
            elif kind == "choice":
                whole = whole and text in content
        except ValueError as error:
            return f"the text is not of the asked form: {error}"
        if not whole:
            return "the text was ended before it had the asked form; do without 'stop' in such rows"
        return ""

    def _follow(self, text: ListLike[int]) -> None:
        """Bring the matcher to the end of this text."""
        text = list(text)
        read, same = self._read, len(self._read)
        if text[:same] != read:
            pairs = enumerate(zip(text, read, strict=False))
            same = next((at for at, (a, b) in pairs if a != b), min(len(text), len(read)))
        if same < len(read):
            self._matcher.rollback(len(read) - same)
        self._read = text
        if not self._matcher.consume_tokens(text[same:]):
            raise ValueError(_error_of(self._matcher))

    def _forbidden(self) -> Tensor:
        """[V] bool: which tokens must not come next."""
        bias = bytearray(self._matcher.compute_logit_bias())  # a byte a token, 0 for no
        if self._matcher.is_error():
            raise ValueError(_error_of(self._matcher))
        return torch.frombuffer(bias, dtype=torch.uint8) == 0


def grammar_of(request: Request) -> Grammar | None:
    """The grammar among a request's processors."""
    return next((one for one in request.logits_processors if isinstance(one, Grammar)), None)


def _error_of(matcher: Any) -> str:
    return structured.in_short(matcher.get_error())
