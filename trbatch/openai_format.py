"""OpenAI's batch format: the request in an input line and the result line of an output row.

An input line is `{"custom_id", "method", "url", "body"}`. The job's model decodes every row,
whatever `body.model` says. A field of the body that would change the text and that trbatch does not
know is an error, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trbatch import structured
from trbatch.config import SAMPLING_FIELDS
from trbatch.errors import UsageError
from trbatch.merging import BadRow, is_absent

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"

# Fields that say nothing about the text.
_IGNORED = frozenset(
    {
        "model",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "user",
    }
)
# Fields that would change the text, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}


def take_body(fields: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Take method, URL and body out of a batch line.

    Returns:
        prompt, messages (unchecked; the one that is absent is None) and the sampling fields.

    Raises:
        BadRow: the URL, the method or a field of the body is not supported.
    """
    body: dict[str, Any] = fields.pop("body")
    url, method = fields.pop("url", None), fields.pop("method", None)
    if url not in (None, CHAT_URL, COMPLETIONS_URL):
        raise BadRow("unsupported_url", f"url {url!r}; use {CHAT_URL!r} or {COMPLETIONS_URL!r}")
    if method not in (None, "POST"):
        raise BadRow("unsupported_method", f"method {method!r}; use 'POST'")
    prompt, messages = body.pop("prompt", None), body.pop("messages", None)
    if type(prompt) is list and len(prompt) == 1:
        prompt = prompt[0]
    if url == CHAT_URL and messages is None:
        raise BadRow("missing_prompt", f"the body has no 'messages', which {url} takes")
    if url == COMPLETIONS_URL and prompt is None:
        raise BadRow("missing_prompt", f"the body has no 'prompt', which {url} takes")
    if prompt is None and messages is None:
        raise BadRow("missing_prompt", "the body has neither 'prompt' nor 'messages'; give one")
    if body.get("metadata") is not None:
        fields.setdefault("metadata", body.pop("metadata"))
    return prompt, messages, _sampling(body)


def _sampling(body: dict[str, Any]) -> dict[str, Any]:
    sampling: dict[str, Any] = {}
    try:
        form = structured.take_from_body(body)
    except UsageError as error:
        raise BadRow("invalid_sampling", error.message) from error
    if form is not None:
        sampling["structured"] = form
    for name, value in body.items():
        if is_absent(value) or name in _IGNORED:
            continue
        if name in SAMPLING_FIELDS:
            sampling.setdefault(name, value)
        elif name == "max_completion_tokens":
            sampling["max_tokens"] = value  # the newer name wins
        elif value not in _NEUTRAL.get(name, ()):
            raise BadRow("unsupported_field", f"body.{name} is not supported; remove it")
    return sampling


def result_line(
    samples: Sequence[Mapping[str, Any]], passthrough: Mapping[str, Any], created: int
) -> dict[str, Any]:
    """The batch result line of one input row.

    Args:
        samples: its result rows, in order of `sample_index`, at least one.
        passthrough: the row's own other columns.
        created: Unix time in seconds.

    Figures per sample and the passed-through columns stand under the key `trbatch`.
    """
    first = samples[0]
    good = [row for row in samples if row["text"] is not None]
    bad = next((row for row in samples if row["text"] is None), None)
    identity = first["request_fingerprint"] or first["custom_id"]
    error = bad and {
        "code": bad["error_code"] or bad["finish_reason"],
        "message": bad["error_message"] or f"the row was {bad['finish_reason']}",
    }
    response = {
        "status_code": 200,
        "request_id": f"request_{identity}",
        "body": _response_body(good, f"chatcmpl-{identity}", created),
    }
    return {
        "id": f"batch_req_{identity}",
        "custom_id": first["custom_id"],
        "response": response if good else None,
        "error": error,
        "trbatch": {"input": dict(passthrough), "samples": [_figures(row) for row in samples]},
    }


_IN_THE_BODY = frozenset({"custom_id", "text", "model", "prompt_tokens", "completion_tokens"})


def _response_body(
    rows: Sequence[Mapping[str, Any]], identity: str, created: int
) -> dict[str, Any]:
    prompt_tokens = max((row["prompt_tokens"] or 0 for row in rows), default=0)
    completion_tokens = sum(row["completion_tokens"] or 0 for row in rows)
    return {
        "id": identity,
        "object": "chat.completion",
        "created": created,
        "model": rows[0]["model"] if rows else None,
        "choices": [
            {
                "index": row["sample_index"],
                "message": {"role": "assistant", "content": row["text"]},
                "finish_reason": row["finish_reason"],
                "logprobs": None,
            }
            for row in rows
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in row.items() if value is not None and name not in _IN_THE_BODY
    }
