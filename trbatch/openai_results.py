"""OpenAI's batch format, out: the result lines and error lines of a job's rows.

A row that asked for a chat gets a `ChatCompletion`, one whose prompt was continued a `Completion`,
as the types of the package `openai` have them. Figures per sample and the passed-through columns
stand under the key `trbatch`, which readers of that format pass over.
"""

from __future__ import annotations

import codecs
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
# A byte as in Python's literals.
_SPELLING = [chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in range(0x100)]


def result_line(
    samples: Sequence[Mapping[str, Any]],
    passthrough: Mapping[str, Any],
    created: int,
    *,
    is_chat: bool,
) -> dict[str, Any] | None:
    """The line of one input row, with those of its samples that have a text.

    Args:
        samples: its result rows, in order of `sample_index`.
        passthrough: the row's own other columns.
        created: Unix time in seconds.
        is_chat: whether it asked for a chat.

    Returns:
        None where no sample has a text.
    """
    good = [row for row in samples if row["text"] is not None]
    if not good:
        return None
    identity = _identity(good[0])
    response = {
        "status_code": 200,
        "request_id": f"request_{identity}",
        "body": _response_body(good, identity, created, is_chat=is_chat),
    }
    return _line(f"batch_req_{identity}", good, passthrough, response=response)


def error_lines(
    samples: Sequence[Mapping[str, Any]], passthrough: Mapping[str, Any], *, line: int | None = None
) -> list[dict[str, Any]]:
    """The lines of those samples of one input row that have no text, a line each.

    Args:
        samples, passthrough: as of `result_line`.
        line: of the input file, named by the errors.
    """
    lines = []
    for row in samples:
        if row["text"] is not None:
            continue
        error = {
            "code": row["error_code"] or row["finish_reason"],
            "message": row["error_message"] or f"the row was {row['finish_reason']}",
            "param": None,
            "line": line,
            "sample_index": row["sample_index"],
        }
        of_several = f"_{row['sample_index']}" if len(samples) > 1 else ""
        name = f"batch_req_{_identity(row)}{of_several}"
        lines.append(_line(name, [row], passthrough, error=error))
    return lines


def _identity(row: Mapping[str, Any]) -> str:
    return str(row["request_fingerprint"] or row["custom_id"])


def _line(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    passthrough: Mapping[str, Any],
    *,
    response: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "id": name,
        "custom_id": rows[0]["custom_id"],
        "response": response,
        "error": error,
        "trbatch": {"input": dict(passthrough), "samples": [_figures(row) for row in rows]},
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
    """Four lists of one entry a token. `text_offset` counts the characters that the tokens before
    have ended; of alternatives that are spelled alike the likeliest counts.
    """
    reader = codecs.getincrementaldecoder("utf-8")("replace")
    offsets = itertools.accumulate((len(reader.decode(_raw(one))) for one in tokens), initial=0)
    return {
        "tokens": [_name(one) for one in tokens],
        "token_logprobs": [one["logprob"] for one in tokens],
        "top_logprobs": [_likeliest(one.get("top") or []) for one in tokens],
        "text_offset": list(offsets)[:-1],
    }


def _likeliest(tops: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for top in tops:  # falling
        found.setdefault(_name(top), top["logprob"])
    return found


def _name(token: Mapping[str, Any]) -> str:
    """A token's text; of a part of a character its bytes as OpenAI spells them, `bytes:\\xf0`."""
    raw = token.get("bytes")
    return token["token"] if raw is None else "bytes:" + "".join(map(_SPELLING.__getitem__, raw))


def _raw(token: Mapping[str, Any]) -> bytes:
    raw: bytes | None = token.get("bytes")
    return str(token["token"]).encode() if raw is None else raw


def _spelled(token: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": token["token"], "logprob": token["logprob"], "bytes": list(_raw(token))}


def _tops(token: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_spelled(top) for top in token.get("top") or []]


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _in_json(value) if name == "prompt_logprobs" else value
        for name, value in row.items()
        if value is not None and name not in _IN_THE_LINE
    }


def _in_json(value: Any) -> Any:
    """A figure with bytes as numbers, and without those that are not there."""
    if isinstance(value, Mapping):
        return {
            name: _in_json(inner)
            for name, inner in value.items()
            if name != "bytes" or inner is not None
        }
    if isinstance(value, bytes):
        return list(value)
    return [_in_json(inner) for inner in value] if isinstance(value, list) else value
