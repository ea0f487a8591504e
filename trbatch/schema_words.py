"""The keywords of JSON schemas: which may be there, and which change nothing.

llguidance passes over a keyword that it has never heard of, so that a misspelt bound would bound
nothing. Here an unknown one is an error. llguidance itself refuses those that it cannot keep to.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

# By what their values are: one schema, a list of schemas or one, schemas by name, anything else.
_OF_ONE = (
    "additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_OF_SEVERAL = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_BY_NAME = (
    "$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties",
)  # fmt: skip
_PLAIN = (
    "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef", "$ref", "const",
    "dependentRequired", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "maxContains",
    "maxItems", "maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength",
    "minProperties", "minimum", "multipleOf", "pattern", "required", "type", "uniqueItems",
)  # fmt: skip
# Those that say nothing about what is valid; the last ones are OpenAPI's.
_ANNOTATIONS = (
    "$anchor", "$comment", "$id", "$schema", "$vocabulary", "contentEncoding", "contentMediaType",
    "default", "deprecated", "description", "examples", "id", "readOnly", "title", "writeOnly",
    "discriminator", "example", "externalDocs", "xml",
)  # fmt: skip
KEYWORDS = frozenset((*_OF_ONE, *_OF_SEVERAL, *_BY_NAME, *_PLAIN, *_ANNOTATIONS))
_CURES = {
    "nullable": """name the type as well: {"type": ["string", "null"]}""",
    "schema": "give the schema itself, without what is around it",
}
_CHANGING_NOTHING: dict[str, Any] = {"uniqueItems": False}  # refused by llguidance all the same


def kept(schema: Any) -> Any:
    """The schema without keywords whose value changes nothing.

    Args:
        schema: parsed JSON; is left as it is.

    Raises:
        ValueError: it has a keyword that JSON schemas do not have; names it, its place, and the
            nearest one that they have.
        RecursionError: it is nested too deeply.
    """
    targets = _targets(schema)
    _refuse_unknown(schema, "", {pointer[0] for pointer in targets if len(pointer) > 1})
    for pointer in targets:
        _refuse_unknown(_at(schema, pointer), "/" + "/".join(pointer), set())
    return _without_idle(schema)


def _refuse_unknown(schema: Any, place: str, containers: set[str]) -> None:
    """Go through a schema and those inside it.

    Args:
        containers: names at its top that are there for `$ref` to point into.
    """
    if not isinstance(schema, Mapping):
        return
    for word in schema:
        if word not in KEYWORDS and not word.startswith("x-") and word not in containers:
            where = f" in #{place}" if place else ""
            raise ValueError(f"{word!r}{where} is no keyword of JSON schemas; {_cure(word)}")
    for way, inner in _inside(schema):
        _refuse_unknown(inner, f"{place}/{way}", set())


def _cure(word: str) -> str:
    if word in _CURES:
        return _CURES[word]
    near = difflib.get_close_matches(word, sorted(KEYWORDS), n=1)
    return f"did you mean {near[0]!r}?" if near else "leave it out"


def _inside(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside one, with the way to each."""
    for word, value in schema.items():
        if word in _BY_NAME and isinstance(value, Mapping):
            yield from ((f"{word}/{name}", inner) for name, inner in value.items())
        elif word in _OF_SEVERAL and isinstance(value, list):
            yield from ((f"{word}/{at}", inner) for at, inner in enumerate(value))
        elif word in _OF_ONE or word in _OF_SEVERAL:
            yield word, value


def _targets(schema: Any) -> list[list[str]]:
    """Where the `$ref`s of a schema point inside it, each place once."""
    found: dict[tuple[str, ...], None] = {}
    waiting = [schema] if isinstance(schema, Mapping | list) else []
    while waiting:
        value = waiting.pop()
        inner = value.values() if isinstance(value, Mapping) else value
        waiting += [one for one in inner if isinstance(one, Mapping | list)]
        to = value.get("$ref") if isinstance(value, Mapping) else None
        if isinstance(to, str) and to.startswith("#/"):
            parts = unquote(to[2:]).split("/")
            found[tuple(part.replace("~1", "/").replace("~0", "~") for part in parts)] = None
    return [list(pointer) for pointer in found]


def _at(schema: Any, pointer: list[str]) -> Any:
    """What lies at a place of a document; None where nothing does."""
    for part in pointer:
        if isinstance(schema, Mapping):
            schema = schema.get(part)
        elif isinstance(schema, list) and part.isdecimal() and int(part) < len(schema):
            schema = schema[int(part)]
        else:
            return None
    return schema


def _without_idle(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for word, value in schema.items():
        if word in _CHANGING_NOTHING and value is _CHANGING_NOTHING[word]:
            continue
        if word in _BY_NAME and isinstance(value, Mapping):
            value = {name: _without_idle(inner) for name, inner in value.items()}
        elif word in _OF_SEVERAL and isinstance(value, list):
            value = [_without_idle(inner) for inner in value]
        elif word in _OF_ONE or word in _OF_SEVERAL:
            value = _without_idle(value)
        kept[word] = value
    return kept
