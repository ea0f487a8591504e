"""From requests to sequences that can run, or to why they cannot."""

from __future__ import annotations

import time
from collections.abc import Sequence as ListLike

from trbatch.engine.grammar import GrammarFailed, Grammars
from trbatch.engine.model import LoadedModel
from trbatch.engine.processors import with_processors
from trbatch.engine.sequence import Completion, Figures, Request, Sequence
from trbatch.engine.text import EncodingFailed, StopChecker, encode_all
from trbatch.errors import RowError


class Intake:
    """Encodes prompts, and makes what requests ask of every token.

    Args:
        longest: tokens of prompt and output together, at most.
    """

    def __init__(self, loaded: LoadedModel, grammars: Grammars, *, longest: int) -> None:
        self._loaded, self._grammars, self._longest = loaded, grammars, longest

    def prepare(self, requests: ListLike[Request]) -> list[Sequence | Completion]:
        """Each request's sequence; of one that cannot run, its error."""
        found = encode_all(self._loaded.tokenizer, requests, self._loaded.vocab_size)
        return [self._prepared(*one) for one in zip(requests, found, strict=True)]

    def _prepared(self, request: Request, ids: list[int] | EncodingFailed) -> Sequence | Completion:
        loaded = self._loaded
        stop = StopChecker(loaded.tokenizer, request.sampling, loaded.eos_token_ids)
        if isinstance(ids, EncodingFailed):
            return _refused(request, ids.error)
        try:
            request = with_processors(request, ids, stop.stop_ids, loaded.vocab_size)
            request = self._grammars.constrained(request, ids)
        except (EncodingFailed, GrammarFailed) as failed:
            return _refused(request, failed.error)
        if len(ids) >= self._longest:
            return _refused(request, RowError(
                "prompt_too_long",
                f"the prompt has {len(ids)} tokens; prompt and output together may have "
                f"{self._longest} (--max-model-len)",
            ), len(ids))  # fmt: skip
        return Sequence(
            request=request,
            tokens=ids,
            prompt_length=len(ids),
            max_tokens=min(request.sampling.max_tokens, self._longest - len(ids)),
            stop=stop,
            figures=Figures(added=time.perf_counter()),
        )


def _refused(request: Request, error: RowError, prompt_tokens: int = 0) -> Completion:
    return Completion(
        key=request.key,
        finish_reason="error",
        error_code=error.code,
        error_message=error.message,
        prompt_tokens=prompt_tokens,
        seed=request.seed,
        sample_index=request.sample_index,
    )
