"""OpenAI's batch format, in: the request of an input line, with what vLLM's `run-batch` adds to it.

An input line is `{"custom_id", "method", "url", "body"}`. What a field of the body becomes stands
in the tables below. A field that would change the text and that trbatch does not know is an error,
not ignored; neither is one that nobody knows, which may be a misspelt one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from trbatch import structured
from trbatch.config import SAMPLING_FIELDS
from trbatch.errors import UsageError
from trbatch.merging import BadRow, is_absent
from trbatch.shaping import CHAT_ARGUMENTS, Asked, Shaping

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"

# Fields that say nothing about the text.
_IGNORED = frozenset(
    {
        "cache_salt",
        "include_reasoning",
        "kv_transfer_params",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "prediction",
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "return_tokens_as_token_ids",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "stream",
        "stream_options",
        "user",
    }
)
# Fields that would change the text or the answer, with the values that do not. Those of them that
# are sampling fields of ours are taken as such.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),  # see `_sampling`
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (),  # see `_says_nothing`
    "chat_template": (),
    "detokenize": (True,),
    "echo": (False,),
    "extra_body": ({},),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),  # see `_says_nothing`
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "logprobs": (False, 0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "prompt_logprobs": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": ({},),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),  # see `_says_nothing`
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),  # of what is not truncated
    "use_beam_search": (False,),
    "verbosity": (),
    "watermarking": (False,),
    "web_search_options": (),
}
_CALLED_BY = {"tools": "tool_choice", "functions": "function_call"}  # "none": not at all
_RENAMED = {"max_completion_tokens": "max_tokens"}  # the newer name wins
# Fields that are arguments of the model's chat template, as vLLM has it.
_OF_THE_CHAT_TEMPLATE = frozenset(
    {"add_generation_prompt", "continue_final_message", "documents", "reasoning_effort"}
)
_CURES = {
    "best_of": "samples are not ranked: leave it away, and ask for all of them with n",
    "chat_template": "the job's model has its own; prompts of another form go into 'prompt'",
    "extra_body": "put its fields into the body itself",
    "functions": "put them into chat_template_kwargs, as 'tools', to have them in the prompt",
    "tools": "calls are not parsed; put them into chat_template_kwargs to have them in the prompt",
}


def take_body(fields: dict[str, Any], shaping: Shaping) -> Asked:
    """Take method, URL and body out of a batch line; the body's `metadata` stays in the line.

    Raises:
        BadRow: the URL, the method, the model or a field of the body is not supported.
    """
    body: dict[str, Any] = fields.pop("body")
    url, method = fields.pop("url", None), fields.pop("method", None)
    if url not in (None, CHAT_URL, COMPLETIONS_URL):
        raise BadRow("unsupported_url", f"url {url!r}; use {CHAT_URL!r} or {COMPLETIONS_URL!r}")
    if method not in (None, "POST"):
        raise BadRow("unsupported_method", f"method {method!r}; use 'POST'")
    prompt, messages = body.pop("prompt", None), body.pop("messages", None)
    if url == CHAT_URL and messages is None:
        raise BadRow("missing_prompt", f"the body has no 'messages', which {url} takes")
    if url == COMPLETIONS_URL and prompt is None:
        raise BadRow("missing_prompt", f"the body has no 'prompt', which {url} takes")
    if prompt is None and messages is None:
        raise BadRow("missing_prompt", "the body has neither 'prompt' nor 'messages'; give one")
    named = body.pop("model", None)
    if named is not None:
        shaping.check_model(named)
    if body.get("metadata") is not None:
        fields.setdefault("metadata", body.pop("metadata"))
    present = {
        name: value
        for name, value in body.items()
        if not is_absent(value) and name not in _IGNORED and name not in shaping.ignored
    }
    arguments = _take_chat_arguments(present) if messages is not None else None
    sampling = _sampling(present, is_chat=messages is not None)
    return Asked(_only_prompt(prompt), messages, sampling, arguments, is_raw=messages is None)


def _only_prompt(prompt: Any) -> Any:
    if type(prompt) is not list:
        return prompt
    if len(prompt) == 1 and type(prompt[0]) is str:
        return prompt[0]
    if prompt and all(type(part) is str for part in prompt):
        raise BadRow("invalid_prompt", "body.prompt holds several texts; give each its own line")
    raise BadRow("invalid_prompt", "body.prompt must be a text; token ids cannot be read")


def _take_chat_arguments(body: dict[str, Any]) -> Any:
    own = body.pop(CHAT_ARGUMENTS, None)
    beside = {name: body.pop(name) for name in list(body) if name in _OF_THE_CHAT_TEMPLATE}
    if beside and (own is None or type(own) is dict):
        return {**beside, **(own or {})}
    return own


def _sampling(body: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    sampling = _take_logprobs(body, is_chat=is_chat)
    try:
        form = structured.take_from_body(body)
    except UsageError as error:
        raise BadRow("invalid_sampling", error.message) from error
    if form is not None:
        sampling["structured"] = form
    for name, value in body.items():
        ours = _RENAMED.get(name, name)
        if ours in SAMPLING_FIELDS:
            if ours != name or name not in sampling:
                sampling[ours] = value
        elif name == "add_special_tokens" and value is not is_chat:
            continue  # a chat's template writes them, a prompt gets the tokenizer's
        elif value not in _NEUTRAL.get(name, ()) and not _says_nothing(name, body):
            raise _unsupported(name)
    return _read_as_there(sampling)


def _says_nothing(name: str, body: Mapping[str, Any]) -> bool:
    """Whether a field changes nothing beside the body's others."""
    if name == "best_of":
        return bool(body[name] == body.get("n", 1))
    return name in _CALLED_BY and body.get(_CALLED_BY[name]) == "none"


def _read_as_there(sampling: dict[str, Any]) -> dict[str, Any]:
    """Values that have a meaning at OpenAI or in vLLM and none as settings of ours."""
    if _is_number(sampling.get("seed"), -1):
        del sampling["seed"]  # vLLM: any
    if _is_number(sampling.get("top_p"), 0):
        del sampling["top_p"]
        sampling["temperature"] = 0.0  # of no tokens the likeliest is left
    return sampling


def _is_number(value: Any, number: int) -> bool:
    return type(value) in (int, float) and value == number


def _take_logprobs(body: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    """A chat says whether and how many; a completion's `logprobs` is a number, as ours."""
    if not is_chat or "logprobs" not in SAMPLING_FIELDS:
        return {}
    wanted, most = body.pop("logprobs", False), body.pop("top_logprobs", 0)
    if type(wanted) is not bool or type(most) is not int or (most and not wanted):
        text = "body.top_logprobs is a number and needs body.logprobs, which is true or false"
        raise BadRow("invalid_sampling", text)
    return {"logprobs": most} if wanted else {}


def _unsupported(name: str) -> BadRow:
    if name in _NEUTRAL or name in _OF_THE_CHAT_TEMPLATE | {CHAT_ARGUMENTS}:
        text = f"body.{name} is not supported here; {_CURES.get(name, 'remove it')}"
    else:
        close = difflib.get_close_matches(name, _known_names(), n=1)
        guess = f"did you mean {close[0]!r}?" if close else "remove it"
        text = f"body.{name} is unknown; {guess}"
    return BadRow("unsupported_field", f"{text} (--ignore-body-field {name} passes over it)")


def _known_names() -> list[str]:
    tables: tuple[Mapping[str, Any] | frozenset[str], ...] = (
        SAMPLING_FIELDS,
        _IGNORED,
        _NEUTRAL,
        _RENAMED,
        _OF_THE_CHAT_TEMPLATE,
    )
    return sorted({"messages", "model", "prompt", CHAT_ARGUMENTS}.union(*tables))
