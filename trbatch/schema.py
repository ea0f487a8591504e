"""The columns of every result: one constant for segments, for the dataset and for the docs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

# What a value that does not fit its column raises.
UNWRITABLE = (pa.ArrowException, ValueError, TypeError, OverflowError)

FINISH_REASONS = ("stop", "length", "error", "cancelled")

# A token with its log probability, and the likeliest tokens at its place with theirs. Its bytes are
# null unless it is part of a character, which its text cannot show.
_ALTERNATIVE = pa.struct(
    [
        ("token", pa.string()),
        ("token_id", pa.int32()),
        ("logprob", pa.float32()),
        ("bytes", pa.binary()),
    ]
)
LOGPROBS = pa.list_(
    pa.struct([*_ALTERNATIVE, ("rank", pa.int32()), ("top", pa.list_(_ALTERNATIVE))])
)

# name, type, meaning; the passed-through columns of the input come behind `prompt_index`
_COLUMNS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("custom_id", pa.string(), "the row's id: its `custom_id`, else its `id`, else its number"),
    ("sample_index", pa.int32(), "which of the row's `n` samples, from 0"),
    ("prompt_index", pa.int64(), "the row's place in the input, from 0"),
    ("text", pa.string(), "the generated text; null for an error row"),
    ("reasoning", pa.string(), "what a thinking model wrote between its markers; not in `text`"),
    ("finish_reason", pa.string(), "`stop`, `length`, `error` or `cancelled`"),
    ("error_code", pa.string(), "why there is no text, for programs"),
    ("error_message", pa.string(), "why there is no text, for people"),
    ("prompt_tokens", pa.int32(), "tokens of the prompt"),
    ("completion_tokens", pa.int32(), "tokens generated, the stop token included"),
    ("attempts", pa.int32(), "how often the row was started"),
    ("seed", pa.int64(), "the row's seed; the same seed gives the same tokens"),
    ("model", pa.string(), "the model that wrote the text"),
    ("task", pa.string(), "whose shared matrix the drafts came from"),
    ("worker", pa.string(), "the worker that decoded the row"),
    ("finished_at", pa.float64(), "when the row was done, Unix time in seconds"),
    ("queued_s", pa.float64(), "seconds in the engine before the first prefill step"),
    (
        "prefill_s",
        pa.float64(),
        "seconds of prefill, and of what the worker did then for rows that came and went",
    ),
    ("decode_s", pa.float64(), "seconds of the decode steps that the row took part in"),
    ("tokens_per_s", pa.float64(), "(completion_tokens - 1) / decode_s"),
    ("baseline_tokens_per_s", pa.float64(), "the same for plain decoding, by its measured cost"),
    ("speedup", pa.float64(), "plain decoding's seconds over decode_s"),
    ("num_spec_steps", pa.int32(), "decode forwards"),
    ("num_draft_tokens", pa.int32(), "draft tokens verified"),
    ("num_accepted_draft_tokens", pa.int32(), "draft tokens that came true"),
    ("mean_acceptance_length", pa.float64(), "(completion_tokens - 1) / num_spec_steps"),
    ("draft_acceptance_rate", pa.float64(), "num_accepted_draft_tokens / num_draft_tokens"),
    ("acceptance_histogram", pa.list_(pa.int32()), "[i]: forwards that gave i + 1 tokens"),
    ("repetitive", pa.bool_(), "whether over 30 % of its 8-token passages stood in it before"),
    ("prompt_token_ids", pa.list_(pa.int32()), "the prompt's token ids, with --return-token-ids"),
    ("token_ids", pa.list_(pa.int32()), "the generated token ids, with --return-token-ids"),
    ("cumulative_logprob", pa.float64(), "sum of the tokens' log probabilities, with --logprobs"),
    ("logprobs", LOGPROBS, "the generated tokens' log probabilities, with --logprobs"),
    ("prompt_logprobs", LOGPROBS, "the prompt's, with --prompt-logprobs; the first is null"),
    ("request_fingerprint", pa.string(), "hash of text or messages, model, sampling and seed"),
)

SCHEMA = pa.schema(
    [pa.field(name, kind, metadata={"description": text}) for name, kind, text in _COLUMNS]
)

# The passed-through columns stand behind the first so many columns.
LEADING_COLUMNS = 3

# What makes two result rows the same row: (custom_id, request_fingerprint, sample_index).
Key = tuple[str, str, int]
KEY_COLUMNS = ("custom_id", "request_fingerprint", "sample_index")


def in_schema(table: pa.Table) -> pa.Table:
    """Result rows with the columns of `SCHEMA`: what an earlier version did not write is null."""
    present = set(table.column_names)
    columns = [
        table.column(field.name) if field.name in present else pa.nulls(table.num_rows, field.type)
        for field in SCHEMA
    ]
    return pa.table(columns, names=SCHEMA.names).cast(SCHEMA)


def fitted(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A result row that can be written, and the columns whose values had to go for that.

    Such a value becomes null. Without its text the row is an error row.
    """
    found, lost = dict(row), []
    for field in SCHEMA:
        try:
            pa.array([row.get(field.name)], field.type)
        except UNWRITABLE:
            found[field.name] = None
            lost.append(field.name)
    if "text" in lost:
        found |= _error("unwritable", f"the result could not be written: {', '.join(lost)}")
    return found, lost


def _error(code: str, message: str) -> dict[str, str]:
    return {"finish_reason": "error", "error_code": code, "error_message": message}


def schema_table() -> str:
    """The result columns as a Markdown table: name, type, meaning."""
    lines = ["| column | type | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | `{_spelled(kind)}` | {text} |" for name, kind, text in _COLUMNS]
    position = 2 + LEADING_COLUMNS
    lines.insert(position, "| … | as in the input | the input's other columns |")
    return "\n".join(lines) + "\n"


def _spelled(kind: pa.DataType) -> str:
    return "list of structs" if kind == LOGPROBS else str(kind)
