"""Structured output: what a text has to be. A JSON schema, a regular expression, one of some texts.

Everybody's spelling of it ends in one form, a dictionary with one key: `{"json": TEXT}` (a schema
as JSON text, because the order of its properties is the order in which they are written),
`{"regex": TEXT}` or `{"choice": [TEXT, …]}`. What a grammar can be is llguidance's to say, which
needs no torch: a client refuses what no worker could decode. `engine.grammar` makes masks of it.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from trbatch import schema_words
from trbatch.errors import MissingExtra, UsageError

KINDS = ("json", "regex", "choice")
MOST_CHOICES = 10_000
MOST_CHARACTERS = 1 << 18  # of a schema or a regular expression
# As Python's json.dumps writes. Were any space allowed, a small model would write them for ever.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT = {"type": "object"}
# Of vLLM's `structured_outputs` and of its older fields, those that say what the text has to be.
_VLLM = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}
_VLLM_MANNERS = frozenset({"disable_any_whitespace", "disable_additional_properties"})
_VLLM_IGNORED = ("guided_decoding_backend", "guided_whitespace_pattern")


def normalised(value: Any) -> dict[str, Any] | None:
    """The one form of what a user has written; None where any text is right.

    Args:
        value: a mapping with one of the keys json, regex, choice, or the same as JSON text; keys
            without a value do not count. A JSON schema may be an object, true, or JSON text.

    Raises:
        UsageError: it is none of these. Whether a grammar can be made of it, `check` says.
    """
    if isinstance(value, str):
        value = _parsed(value, "structured")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UsageError(f"structured must be an object, not {value!r:.80}", hint=_example())
    given = {kind: content for kind, content in value.items() if content is not None}
    if not given:
        return None
    (kind, content), *others = given.items()
    if kind not in KINDS or others:
        said = ", ".join(map(repr, given))
        raise UsageError(f"structured takes one of {', '.join(KINDS)}, not {said}", hint=_example())
    return {kind: {"json": _schema, "regex": _regex, "choice": _choice}[kind](content)}


def check(structured: Mapping[str, Any]) -> None:
    """Find out whether a grammar can be made of it.

    Args:
        structured: in the form of `normalised`.

    Raises:
        UsageError: it cannot; names what it is that is not possible.
        MissingExtra: llguidance is not installed.
    """
    ((kind, content),) = structured.items()
    _check(kind, content if isinstance(content, str) else tuple(content))


def grammar_of(structured: Mapping[str, Any]) -> str:
    """The same as llguidance's own grammar.

    Raises:
        MissingExtra: llguidance is not installed.
        ValueError: the schema has a keyword that nobody knows.
        RecursionError: the schema is nested too deeply.
    """
    needed()
    from llguidance import LLMatcher

    ((kind, content),) = structured.items()
    if kind == "json":
        schema = orjson.loads(content)
        if (kept := schema_words.kept(schema)) != schema:
            content = orjson.dumps(kept).decode()
        return LLMatcher.grammar_from_json_schema(content, _JSON_FORM)  # type: ignore[arg-type]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(content)
    # JSON's escapes are those of a grammar's texts.
    texts = [orjson.dumps(text).decode() for text in content]
    return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")


def needed() -> None:
    """Make sure that llguidance is there.

    Raises:
        MissingExtra: it is not.
    """
    if importlib.util.find_spec("llguidance") is None:
        raise MissingExtra(
            "structured output needs llguidance, which is not installed here",
            hint="pip install 'trbatch[structured]'",
        )


def from_options(
    json_schema: str | None, regex: str | None, choices: Sequence[str]
) -> dict[str, Any] | None:
    """What the options --json-schema FILE, --regex and --choice say, checked.

    Args:
        json_schema, regex: None if they are not given, which "" is not.

    Raises:
        UsageError: more than one of them is given, one is empty, the file cannot be read, or no
            grammar can be made of it; names the option.
        MissingExtra: llguidance is not installed.
    """
    given = [("--json-schema", json_schema), ("--regex", regex), ("--choice", choices or None)]
    used = [name for name, value in given if value is not None]
    if not used:
        return None
    if len(used) > 1:
        raise UsageError(f"{' and '.join(used)} contradict each other", hint="give one of them")
    if "" in (json_schema, regex):
        hint = "give it a value, or leave it out to have any text"
        raise UsageError(f"{used[0]} is empty", hint=hint)
    what = f"--json-schema {json_schema}" if json_schema else used[0]
    asked: dict[str, Any] = {"regex": regex} if regex else {"choice": list(choices)}
    if json_schema:
        try:
            asked = {"json": Path(json_schema).expanduser().read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{what} cannot be read: {error}") from error
    try:
        form = normalised(asked)
        if form is not None:
            check(form)
    except MissingExtra:
        raise
    except UsageError as error:
        said = re.sub(r"^structured\.\w+:? ", "", error.message)
        raise UsageError(f"{what}: {said}", hint=error.hint) from error
    return form


def take_from_body(body: dict[str, Any]) -> dict[str, Any] | None:
    """Take structured output out of the body of a request, as OpenAI and vLLM spell it.

    Args:
        body: loses `response_format`, `structured_outputs` and `guided_…`.

    Returns:
        What the text has to be; {} where the body says that it may be any; None where it says
        nothing. `structured` itself stays in the body.

    Raises:
        UsageError: what is said is unknown, or said twice.
    """
    for name in _VLLM_IGNORED:
        body.pop(name, None)
    said: dict[str, dict[str, Any]] = {}
    if (response := body.pop("response_format", None)) is not None:
        said["response_format"] = _of_response_format(response)
    if (outputs := body.pop("structured_outputs", None)) is not None:
        said["structured_outputs"] = _of_vllm(outputs)
    for name, kind in _VLLM.items():
        if (value := body.pop(name, None)) is not None:
            said[name] = {kind: value}
    real = {name: form for name, form in said.items() if form}
    if len(real) > 1:
        raise UsageError(f"body.{' and body.'.join(real)} contradict each other; keep one")
    return next(iter(real.values()), {} if said else None)


def _of_response_format(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json": _ANY_OBJECT}
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, Mapping) or inner.get("schema") is None:
            raise UsageError("body.response_format.json_schema has no 'schema'; give it one")
        return {"json": inner["schema"]}
    raise UsageError("body.response_format.type must be text, json_object or json_schema")


def _of_vllm(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError("body.structured_outputs must be an object")
    given = {
        name: content
        for name, content in value.items()
        if content is not None and name not in _VLLM_MANNERS
    }
    if given.pop("json_object", False):
        given["json"] = _ANY_OBJECT
    for name in given:
        if name not in KINDS:
            known = ", ".join((*KINDS, "json_object"))
            raise UsageError(f"body.structured_outputs.{name} is not supported; use one of {known}")
    return given


def _schema(content: Any) -> str:
    if isinstance(content, str | bytes):
        content = _parsed(content, "structured.json")
    if content is True:
        content = {}
    if not isinstance(content, Mapping):
        raise UsageError(f"structured.json must be a JSON schema, not {content!r:.80}")
    try:
        text = orjson.dumps(dict(content)).decode()
    except TypeError as error:
        raise UsageError(f"structured.json is no JSON: {error}") from error
    return _short_enough("json", text)


def _regex(content: Any) -> str:
    if not isinstance(content, str) or not content:
        raise UsageError(f"structured.regex must be a text, not {content!r:.80}")
    return _short_enough("regex", content)


def _choice(content: Any) -> list[str]:
    texts = [content] if isinstance(content, str) else content
    good = isinstance(texts, list | tuple) and all(isinstance(t, str) and t for t in texts)
    if not good or not texts:
        raise UsageError("structured.choice must be a list of texts, none of them empty")
    if len(texts) > MOST_CHOICES:
        raise UsageError(f"structured.choice has {len(texts)} texts; at most {MOST_CHOICES}")
    return list(dict.fromkeys(texts))


def _short_enough(kind: str, text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise UsageError(
            f"structured.{kind} has {len(text)} characters; it may have {MOST_CHARACTERS} at most"
        )
    return text


def _parsed(text: str | bytes, name: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{name}: it is no JSON: {error}") from error


@functools.lru_cache(maxsize=1024)
def _check(kind: str, content: str | tuple[str, ...]) -> None:
    try:
        grammar = grammar_of({kind: content})
        from llguidance import LLMatcher

        said = LLMatcher.validate_grammar(grammar)
    except (ValueError, RecursionError) as error:
        said = str(error)
    if said and not said.startswith("WARNING"):
        raise UsageError(f"structured.{kind}: {in_short(said)}", hint=_cure(said))


def in_short(said: str) -> str:
    """What llguidance says, without the place in a grammar that the user has not written."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no reason was given"]
    why = next((line for line in lines if line.startswith("error: ")), lines[0])
    why = why.removeprefix("error: ").partition(" Enable 'coerce_one_of'")[0]
    if why.startswith("at ") and ": " in why:
        why = why.partition(": ")[2]
    return why[:300]


def _cure(said: str) -> str | None:
    if "oneOf" in said:
        return "use anyOf, or make the alternatives exclude each other, e.g. by a const"
    if "Unimplemented keys" in said or "no keyword" in said:
        return "docs/structured.md says which keywords can be kept to; leave out the others"
    return None


def _example() -> str:
    return 'e.g. {"json": {"type": "object"}}, {"regex": "[0-9]+"} or {"choice": ["yes", "no"]}'
