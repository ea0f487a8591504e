"""Result rows: their columns, how a completion becomes one, and the whole dataset of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trbatch.chunks import ChunkRow
from trbatch.dataset import collect
from trbatch.receipt import Receipt
from trbatch.repetition import is_repetitive
from trbatch.schema import SCHEMA, schema_table

if TYPE_CHECKING:
    from trbatch.engine.sequence import Alternative, Completion, TokenLogprob

__all__ = ["SCHEMA", "Receipt", "collect", "result_row", "schema_table"]


def result_row(
    completion: Completion,
    row: ChunkRow,
    *,
    model: str,
    task: str,
    worker: str,
    attempts: int,
    finished_at: float | None = None,
) -> dict[str, Any]:
    """The result row of a completion, one value a column of `SCHEMA`; None where undefined.

    Rates count decoding alone: prefill gives the first token.
    """
    failed = completion.finish_reason == "error"
    tokens = completion.completion_tokens
    decoded = max(tokens - 1, 0)
    baseline_s = completion.baseline_decode_s
    return {
        "custom_id": row.custom_id,
        "sample_index": completion.sample_index,
        "prompt_index": row.prompt_index,
        "text": None if failed else completion.text,
        "reasoning": completion.reasoning,
        "finish_reason": completion.finish_reason,
        "error_code": completion.error_code,
        "error_message": completion.error_message,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": tokens,
        "attempts": attempts,
        "seed": row.seed,
        "model": model,
        "task": task,
        "worker": worker,
        "finished_at": finished_at,
        "queued_s": completion.queued_s,
        "prefill_s": completion.prefill_s,
        "decode_s": completion.decode_s,
        "tokens_per_s": _ratio(decoded, completion.decode_s),
        "baseline_tokens_per_s": _ratio(decoded, baseline_s),
        "speedup": _ratio(baseline_s, completion.decode_s),
        "num_spec_steps": completion.num_spec_steps,
        "num_draft_tokens": completion.num_draft_tokens,
        "num_accepted_draft_tokens": completion.num_accepted_draft_tokens,
        "mean_acceptance_length": _ratio(decoded, completion.num_spec_steps),
        "draft_acceptance_rate": _ratio(
            completion.num_accepted_draft_tokens, completion.num_draft_tokens
        ),
        "acceptance_histogram": list(completion.acceptance_histogram),
        "repetitive": None if failed else is_repetitive(completion.token_ids),
        "prompt_token_ids": completion.prompt_token_ids,
        "token_ids": None if completion.prompt_token_ids is None else completion.token_ids,
        "cumulative_logprob": completion.cumulative_logprob,
        "logprobs": completion.logprobs and [_logprob(one) for one in completion.logprobs],
        "prompt_logprobs": (
            completion.prompt_logprobs and [_logprob(one) for one in completion.prompt_logprobs]
        ),
        "request_fingerprint": row.fingerprint,
    }


def _logprob(one: TokenLogprob | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return _alternative(one) | {"rank": one.rank, "top": [_alternative(other) for other in one.top]}


def _alternative(one: TokenLogprob | Alternative) -> dict[str, Any]:
    said = {"token": one.token, "token_id": one.token_id, "logprob": one.logprob}
    return said | {"bytes": one.raw}


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
