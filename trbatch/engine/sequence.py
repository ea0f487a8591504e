"""What goes into the engine and what comes out of it. Knows nothing of queues or files."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trbatch.config import SamplingParams
from trbatch.engine.spine import Spine
from trbatch.errors import RowError
from trbatch.matrices import Acceptance

# (committed tokens and the node's ancestors, raw logits [V]) -> processed logits [V]
LogitsProcessor = Callable[[ListLike[int], Any], Any]


@dataclass(frozen=True, slots=True)
class TaskKey:
    """Which matrix rows read and write: equal keys, one matrix."""

    name: str
    folder: Path | str | None = None  # where matrices are kept, a URL as text; None: in memory only
    apart: str = ""  # what else keeps it from others of this name, e.g. the job that began cold
    cold: bool = False  # begin with empty rows, whatever is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample of one row, as the engine takes it.

    Exactly one of `prompt`, `messages` and `prompt_token_ids` is set.
    """

    key: Hashable  # the caller's own handle, handed back in the completion
    sampling: SamplingParams
    seed: int = 0  # of the row; with `sample_index` and a position it decides the noise
    sample_index: int = 0
    order: int = 0  # the row's place in its input: decides who wins when two write one matrix row
    task: TaskKey = TaskKey("default")  # whose shared matrix to read and to write
    prompt: str | None = None
    messages: ListLike[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None  # beside messages
    prompt_token_ids: ListLike[int] | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()

    @property
    def length(self) -> int:
        """Of its prompt, in characters or tokens, nearly: how much there is to encode."""
        said = sum(len(str(message.get("content", ""))) for message in self.messages or ())
        return len(self.prompt or "") + len(self.prompt_token_ids or ()) + said


class Likelihood(NamedTuple):
    """What the model says of a token at its place, and which are the likeliest there."""

    token_id: int
    logprob: float
    rank: int  # among all tokens, from 1
    top: list[tuple[int, float]]  # tokens and their log probabilities, falling


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that the model thinks likely at a place."""

    token: str
    token_id: int
    logprob: float
    raw: bytes | None = None  # its bytes, where it is part of a character; None: as in the text


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, and how likely the model says it is and its alternatives are.

    By raw logits: before penalties, bias and temperature, whatever the row was sampled with.
    """

    token: str
    token_id: int
    logprob: float
    rank: int  # among all tokens, from 1
    top: list[Alternative]  # the likeliest, falling
    raw: bytes | None = None  # as of an alternative


@dataclass(slots=True, kw_only=True)
class Completion:
    """A finished request with its figures. Times are seconds, lengths are tokens."""

    key: Hashable
    finish_reason: str  # stop, length, error, cancelled
    text: str = ""
    reasoning: str | None = None  # what stood between a thinking model's markers
    token_ids: list[int] = field(default_factory=list)  # the stop token, if any, included
    error_code: str | None = None
    error_message: str | None = None
    prompt_tokens: int = 0
    seed: int = 0
    sample_index: int = 0
    queued_s: float = 0.0  # from `Engine.add` to the first prefill
    prefill_s: float = 0.0
    decode_s: float = 0.0  # the steps that this request took part in
    baseline_decode_s: float | None = None  # what plain decoding would have taken, by measured cost
    num_spec_steps: int = 0  # decode forwards, those of one token a sequence included
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)  # [i]: forwards giving i+1 tokens
    prompt_token_ids: list[int] | None = None  # if asked for, with `return_token_ids`
    logprobs: list[TokenLogprob] | None = None  # of each of `token_ids`, if asked for
    prompt_logprobs: list[TokenLogprob | None] | None = None  # the first is None

    def failed(self, code: str, message: str) -> Completion:
        """The same request as an error: without its text, and without the figures of one.

        What its forwards gave is in no sum of tokens, so they are in no sum of forwards either.
        The times stay: they have passed.
        """
        return Completion(
            key=self.key,
            finish_reason="error",
            error_code=code,
            error_message=message,
            prompt_tokens=self.prompt_tokens,
            seed=self.seed,
            sample_index=self.sample_index,
            queued_s=self.queued_s,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
        )

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the tokens' log probabilities, where they were asked for."""
        if self.logprobs is None:
            return None
        return math.fsum(token.logprob for token in self.logprobs)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, the stop token included."""
        return len(self.token_ids)


@dataclass(slots=True, kw_only=True)
class Figures:
    """What decoding one sequence cost and gave, as it adds up step by step. Seconds, tokens."""

    added: float = 0.0  # clock readings
    started: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    baseline_s: float = 0.0
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: list[int] = field(default_factory=list)

    def count_forward(
        self,
        tokens: int,
        accepted: int,
        drafted: int,
        seconds: float,
        plain_s: float,
        delay_s: float = 0.0,
    ) -> None:
        """Count one decode forward.

        Args:
            tokens: that it gave this sequence, the bonus token included, those cut off not.
            accepted: how many of these were drafted.
            drafted: nodes that it verified for this sequence.
            seconds: that it took, for the whole batch.
            plain_s: that a plain step of this batch takes.
            delay_s: by how much it took longer than such steps do, whatever is drafted.
        """
        self.forwards += 1
        self.drafted += drafted
        self.accepted += accepted
        self.decode_s += seconds
        self.baseline_s += max(0.0, tokens * plain_s + delay_s)
        if len(self.histogram) < tokens:
            self.histogram.extend([0] * (tokens - len(self.histogram)))
        self.histogram[tokens - 1] += 1

    def acceptance(self) -> Acceptance:
        """Tokens that its decode forwards gave, and how many these were."""
        tokens = sum(count * length for length, count in enumerate(self.histogram, 1))
        return Acceptance(float(tokens), float(self.forwards))


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Sequence:
    """A request inside the engine.

    Its last token is never in the cache yet: it is the root of the next tree.
    """

    request: Request
    tokens: list[int]  # prompt and output
    prompt_length: int
    max_tokens: int
    stop: Any  # text.StopChecker
    figures: Figures
    spine: Spine = field(default_factory=Spine)
    ranks: list[int] = field(default_factory=list)  # of its last tokens; see `paths.PathCounts`
    # If asked for: of what came out (behind it, of what is only proposed), of the prompt's tokens
    # from the second on.
    logprobs: list[Likelihood] = field(default_factory=list)
    prompt_logprobs: list[Likelihood] = field(default_factory=list)
    slot: int = -1
    task: int = -1  # index of the matrix that it teaches
    reads: int = -1  # of the one that drafts its tokens: the same, or an empty one to compare with
    room: Any = None  # kv_cache.Room
    # Tokens that are run before it decodes: its prompt; what it had said, too, if it has to begin
    # anew. Of these:
    goal: int = 0
    cached: int = 0  # that have their keys and values in the cache
    learned: int = 0  # that rows were written for
    recalled: int = 0  # whose candidates are kept for others with the same beginning
    page_keys: list[bytes] = field(default_factory=list)  # what its first pages say (`prefix`)
    prompt_key: bytes = b""  # and what its whole prompt says
    lagged: bool = False  # whether its steps are read one late
    in_flight: int = 0  # steps that were started with it and not read yet
    ahead: int = 0  # tokens that these may give, at most
    place: int = 0  # how many came before it
    finish_reason: str = ""
    error: RowError | None = None  # why it has no text; what it took since means nothing

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be decoded."""
        return bool(self.finish_reason) or self.error is not None

    @property
    def decodes(self) -> bool:
        """Whether it takes part in the next step."""
        return self.room is not None and self.prefilled and not self.ended

    @property
    def generated(self) -> int:
        """Tokens that came out so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def prefilled(self) -> bool:
        """Whether it can decode: all but its next root is in the cache."""
        return self.cached == self.goal

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether its prompt has to be run by itself, for what the model says of its tokens."""
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < self.prompt_length - 1

    def begin_anew(self) -> None:
        """Nothing of it is in the cache any more, or yet."""
        # What it said last is the root of the next tree.
        self.goal = len(self.tokens) - 1 if self.generated else self.prompt_length
        self.cached = self.learned = self.recalled = 0

    @property
    def turn(self) -> tuple[int, int]:
        """Who it is among others, whatever the slot: (row of the input, sample)."""
        return self.request.order, self.request.sample_index

    def take(self, proposed: list[int]) -> int:
        """Append proposed tokens up to the first that ends the text. Returns how many it took."""
        if self.generated + len(proposed) < self.max_tokens and self.stop.takes_all(proposed):
            self.tokens += proposed
            return len(proposed)
        for count, token in enumerate(proposed, 1):
            self.tokens.append(token)
            if self.stop.ends_with(token):
                self.finish_reason = "stop"
                return count
            if self.generated >= self.max_tokens:
                self.finish_reason = "length"
                return count
        return len(proposed)

    def completion(self) -> Completion:
        """The finished request as the caller gets it."""
        figures, error, params = self.figures, self.error, self.request.sampling
        prompt, output = self.tokens[: self.prompt_length], self.tokens[self.prompt_length :]
        reasoning, text = (None, "") if error else self.stop.parts(prompt)
        completion = Completion(
            key=self.request.key,
            finish_reason=self.finish_reason,
            text=text,
            reasoning=reasoning,
            token_ids=output,
            prompt_tokens=self.prompt_length,
            seed=self.request.seed,
            sample_index=self.request.sample_index,
            queued_s=figures.started - figures.added,
            prefill_s=figures.prefill_s,
            decode_s=figures.decode_s,
            baseline_decode_s=figures.baseline_s,
            num_spec_steps=figures.forwards,
            num_draft_tokens=figures.drafted,
            num_accepted_draft_tokens=figures.accepted,
            acceptance_histogram=figures.histogram,
            prompt_token_ids=prompt if params.return_token_ids else None,
            logprobs=(
                self.stop.spelled(self.logprobs[: self.generated])
                if params.logprobs is not None
                else None
            ),
            prompt_logprobs=(
                [None, *self.stop.spelled(self.prompt_logprobs)]
                if params.prompt_logprobs is not None
                else None
            ),
        )
        return completion.failed(error.code, error.message) if error else completion
