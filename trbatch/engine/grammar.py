"""Masks of grammars: which tokens may come next in a text that has to be of some form.

A row's grammar is a logits processor like any other, so speculation needs no rules of its own: at
each node that verification comes by, the grammar is where the committed text and the node's
ancestors have led it, and a drafted token that it forbids is never the model's. The walk only comes
by nodes whose tokens are then committed, so there is one mask for each token of the text, and a
step back only where a text begins anew.

A grammar often leaves one way to go on, e.g. the name of the next key. These forced tokens are
drafted first (`forced`), whatever the rows say.

The form is that of the answer: a model that thinks does so freely, and the grammar begins behind
its reasoning. What a text is in the end is proved by itself (`Grammars.checked`), whatever cut it.
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
from trbatch.config import SamplingParams
from trbatch.engine.model import LoadedModel
from trbatch.engine.reasoning import Thought, overrunning
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
        self._hidden = frozenset(getattr(loaded.tokenizer, "all_special_ids", ()))
        self._tokenizer: Any = None  # llguidance's, made when the first row needs it: half a second
        self._bytes: Any = None  # the one that has bytes for tokens, to prove texts with
        # Matchers at their beginning, of the model's tokens and of bytes.
        self._compiled: OrderedDict[tuple[str, bool], Any] = OrderedDict()
        self._overrunning: dict[bytes, list[list[int]]] = {}  # by what ends the reasoning
        self.masks, self.seconds, self.compile_seconds = 0, 0.0, 0.0

    def constrained(self, request: Request, prompt: ListLike[int]) -> Request:
        """The request with its grammar as the last of its processors, if it asks for one.

        Args:
            prompt: its tokens.

        Raises:
            GrammarFailed: there is no library, or none for this tokenizer, or the grammar is bad.
        """
        asked = request.sampling.structured
        if asked is None:
            return request
        matcher = self._matcher(dict(asked))  # first: it knows which tokenizers it can use
        thought = Thought(self._loaded.tokenizer, request.sampling, prompt, self._piece)
        grammar = Grammar(self, matcher, len(prompt), request.sampling, thought)
        return replace(request, logits_processors=(*request.logits_processors, grammar))

    def checked(self, completion: Completion, request: Request) -> Completion:
        """The completion; an error if it ended by itself and its text is not of the asked form."""
        grammar = grammar_of(request)
        if grammar is None or completion.finish_reason != "stop":
            return completion
        if not (why := grammar.faults(completion)):
            return completion
        return completion.failed("structured_output_failed", why)

    def proves(self, asked: dict[str, Any], text: str) -> bool:
        """Whether a whole text is of the asked form."""
        ((kind, content),) = asked.items()
        if kind == "choice":
            return text in content
        matcher = self._matcher(asked, of_bytes=True)
        whole: bool = matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()
        if whole and kind == "json":
            json.loads(text)
        return whole

    def overrunning(self, end: bytes) -> list[list[int]]:
        """The tokens that end the reasoning and say more; see `reasoning.overrunning`."""
        if end not in self._overrunning:
            pieces = map(self._piece, range(self._loaded.vocab_size))
            self._overrunning[end] = overrunning(end, pieces)
        return self._overrunning[end]

    def _piece(self, token: int) -> bytes:
        """A token's bytes in a text; b"" of one that texts do not show."""
        if token in self._hidden:
            return b""
        return bytes(self._own_tokenizer().decode_bytes([token]))

    def _matcher(self, asked: dict[str, Any], *, of_bytes: bool = False) -> Any:
        key = json.dumps(asked), of_bytes
        if key not in self._compiled:
            self._compiled[key] = self._compile(asked, of_bytes=of_bytes)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key].deep_copy()

    def _compile(self, asked: dict[str, Any], *, of_bytes: bool) -> Any:
        start = time.perf_counter()
        try:
            grammar = structured.grammar_of(asked)
            from llguidance import LLMatcher, LLTokenizer

            if of_bytes:
                tokenizer = self._bytes = self._bytes or LLTokenizer("byte")
            else:
                tokenizer = self._own_tokenizer()
            matcher = LLMatcher(tokenizer, grammar, log_level=0)
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
        params: the row's; `structured` is there.
        thought: where its answer begins.
    """

    def __init__(
        self,
        owner: Grammars,
        matcher: Any,
        prompt_length: int,
        params: SamplingParams,
        thought: Thought,
    ) -> None:
        self._owner, self._matcher, self._prompt_length = owner, matcher, prompt_length
        self._params, self._thought = params, thought
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
        begin = self._thought.answer(text)
        if begin is None:
            return self._in_reasoning(logits)
        self._follow(text[begin:])
        forbidden = self._forbidden()
        if not text and self._thought.opening is not None:
            forbidden[self._thought.opening] = False
        forbidden = forbidden[: logits.shape[0]].to(logits.device)
        masked = logits.masked_fill(forbidden, -torch.inf)
        if masked.max() == -torch.inf:
            masked = torch.zeros_like(logits).masked_fill_(forbidden, -torch.inf)
        self._owner.masks += 1
        self._owner.seconds += time.perf_counter() - start
        return masked

    def forced(self, context: ListLike[int], most: int) -> list[int]:
        """The next tokens, as far as the grammar leaves one way to go on; `most` of them."""
        start = time.perf_counter()
        text = context[self._prompt_length :]
        begin = self._thought.answer(text)
        if begin is None:
            return []
        self._follow(text[begin:])
        tokens = self._matcher.compute_ff_tokens()[:most]
        self._owner.seconds += time.perf_counter() - start
        return list(tokens)

    def faults(self, completion: Completion) -> str:
        """What keeps a text that has ended from being of the asked form; "" if nothing does."""
        asked, cure = dict(self._params.structured or {}), ""
        if self._params.stop or self._params.stop_token_ids:
            cure = "; do without 'stop' in such rows"
        if self._thought.answer(completion.token_ids) is None:
            return f"the text was ended in its reasoning, before there was an answer{cure}"
        try:
            if self._owner.proves(asked, completion.text):
                return ""
        except ValueError as error:
            return f"the text is not of the asked form: {error}"
        if cure:
            return f"the text was ended before it had the asked form{cure}"
        return "the text is not of the asked form in the way in which the tokenizer writes it"

    def _in_reasoning(self, logits: Tensor) -> Tensor:
        """Logits [V] without the tokens that would end the reasoning and say more at once."""
        if not (end := self._thought.spelled):
            return logits
        too_long = self._owner.overrunning(end)
        tokens = [token for count in self._thought.begun() for token in too_long[count]]
        if not tokens:
            return logits
        return logits.index_fill(0, torch.tensor(tokens).to(logits.device), -torch.inf)

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
