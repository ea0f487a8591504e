"""Result rows: their columns, how a completion becomes one, and the whole dataset of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trbatch.chunks import ChunkRow
from trbatch.dataset import collect
from trbatch.receipt import Receipt
from trbatch.schema import SCHEMA, schema_table

if TYPE_CHECKING:
    from trbatch.engine.sequence import Completion

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
        "reasoning": None,
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
        "cumulative_logprob": completion.cumulative_logprob,
        "request_fingerprint": row.fingerprint,
    }


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
