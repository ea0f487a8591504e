"""OpenAI's batch format, out: the result lines and error lines of a job's rows.

A row that asked for a chat gets a `ChatCompletion`, one whose prompt was continued a `Completion`,
as the types of the package `openai` have them. Figures per sample and the passed-through columns
stand under the key `trbatch`, which readers of that format pass over.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

# What stands in the body or in the line itself; all other result columns are figures.
_IN_THE_LINE = frozenset(
    {
        "custom_id",
        "text",
        "reasoning",
        "model",
        "prompt_tokens",
        "completion_tokens",
        "error_code",
        "error_message",
        "logprobs",
    }
)


def result_line(
    samples: Sequence[Mapping[str, Any]],
    passthrough: Mapping[str, Any],
    created: int,
    *,
    is_chat: bool,
    line: int | None = None,
) -> dict[str, Any]:
    """The line of one input row.

    Args:
        samples: its result rows, in order of `sample_index`, at least one.
        passthrough: the row's own other columns.
        created: Unix time in seconds.
        is_chat: whether it asked for a chat.
        line: of the input file, named by an error.

    Returns:
        `response` with the samples that have a text, `error` of the first that has none; either is
        null where there are none.
    """
    first = samples[0]
    good = [row for row in samples if row["text"] is not None]
    bad = next((row for row in samples if row["text"] is None), None)
    identity = first["request_fingerprint"] or first["custom_id"]
    error = bad and {
        "code": bad["error_code"] or bad["finish_reason"],
        "message": bad["error_message"] or f"the row was {bad['finish_reason']}",
        "param": None,
        "line": line,
    }
    response = {
        "status_code": 200,
        "request_id": f"request_{identity}",
        "body": _response_body(good, identity, created, is_chat=is_chat),
    }
    return {
        "id": f"batch_req_{identity}",
        "custom_id": first["custom_id"],
        "response": response if good else None,
        "error": error,
        "trbatch": {"input": dict(passthrough), "samples": [_figures(row) for row in samples]},
    }


def _response_body(
    rows: Sequence[Mapping[str, Any]], identity: str, created: int, *, is_chat: bool
) -> dict[str, Any]:
    prompt_tokens = max((row["prompt_tokens"] or 0 for row in rows), default=0)
    completion_tokens = sum(row["completion_tokens"] or 0 for row in rows)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{identity}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": rows[0]["model"] if rows else None,
        "choices": [_choice(row, is_chat=is_chat) for row in rows],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _choice(row: Mapping[str, Any], *, is_chat: bool) -> dict[str, Any]:
    tokens = row.get("logprobs")
    choice: dict[str, Any] = {
        "index": row["sample_index"],
        "finish_reason": row["finish_reason"],
        "logprobs": None,
    }
    if not is_chat:
        logprobs = None if tokens is None else _completion_logprobs(tokens)
        return choice | {"text": row["text"], "logprobs": logprobs}
    message = {"role": "assistant", "content": row["text"], "refusal": None}
    if row.get("reasoning") is not None:
        message["reasoning"] = row["reasoning"]  # as vLLM calls it
    if tokens is not None:
        content = [_spelled(one) | {"top_logprobs": _tops(one)} for one in tokens]
        choice["logprobs"] = {"content": content, "refusal": None}
    return choice | {"message": message}


def _completion_logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Four lists of one entry a token; `text_offset` counts characters of the tokens before."""
    texts = [one["token"] for one in tokens]
    offsets = itertools.accumulate((len(text) for text in texts), initial=0)
    return {
        "tokens": texts,
        "token_logprobs": [one["logprob"] for one in tokens],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in one.get("top") or []} for one in tokens
        ],
        "text_offset": list(offsets)[:-1],
    }


def _tops(token: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_spelled(top) for top in token.get("top") or []]


def _spelled(token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["token"]
    return {"token": text, "logprob": token["logprob"], "bytes": list(text.encode())}


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in row.items() if value is not None and name not in _IN_THE_LINE
    }
