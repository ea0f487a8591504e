"""Twenty JSON schemas of the kinds that people generate datasets with, and what to ask for each.

Texts are bounded where a small model would go on for ever, so that most rows can end by themselves.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_SHORT: Schema = {"type": "string", "minLength": 1, "maxLength": 40}
_WORD: Schema = {"type": "string", "pattern": "^[a-z]{2,12}$"}
_YES_NO: Schema = {"type": "boolean"}


def _object(**properties: Schema) -> Schema:
    """An object of just these fields, all of them required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _list(items: Schema, low: int, high: int) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


SCHEMAS: dict[str, Schema] = {
    "a person": _object(name=_SHORT, age=_whole(0, 120), married=_YES_NO),
    "a book": _object(title=_SHORT, author=_SHORT, year=_whole(1500, 2030)),
    "the sentiment of a review": _object(
        label={"enum": ["positive", "neutral", "negative"]},
        confidence={"type": "number", "minimum": 0, "maximum": 1},
    ),
    "a recipe": _object(dish=_SHORT, minutes=_whole(1, 300), ingredients=_list(_SHORT, 2, 4)),
    "a city": _object(city=_SHORT, country=_SHORT, coast={"type": ["boolean", "null"]}),
    "a point on a map": _object(
        latitude={"type": "number", "minimum": -90, "maximum": 90},
        longitude={"type": "number", "minimum": -180, "maximum": 180},
    ),
    "a question with four answers": _object(
        question=_SHORT, answers=_list(_SHORT, 4, 4), right={"enum": ["A", "B", "C", "D"]}
    ),
    "three tags": _list(_WORD, 3, 3),
    "a grade": {"enum": ["excellent", "good", "fair", "poor"]},
    "an appointment": _object(
        day={"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9])$"},
        hour=_whole(0, 23),
        topic=_SHORT,
    ),
    "a colour": _object(name=_WORD, hex={"type": "string", "pattern": "^#[0-9a-f]{6}$"}),
    "a product": _object(
        name=_SHORT,
        price={"type": "number", "minimum": 0},
        sizes=_list({"enum": ["S", "M", "L", "XL"]}, 1, 3),
    ),
    "a function call": _object(
        function={"const": "search"}, arguments=_object(query=_SHORT, limit=_whole(1, 50))
    ),
    "a family": _object(
        parents=_list(_object(name=_WORD, age=_whole(20, 90)), 1, 2),
        children=_list(_object(name=_WORD, age=_whole(0, 30)), 0, 3),
    ),
    "an animal": {
        "anyOf": [
            _object(kind={"const": "bird"}, wings=_whole(2, 2)),
            _object(kind={"const": "fish"}, fins=_whole(1, 9)),
        ]
    },
    "a shape": {
        "$defs": {"point": _object(x=_whole(-9, 9), y=_whole(-9, 9))},
        "type": "object",
        "properties": {"corners": _list({"$ref": "#/$defs/point"}, 3, 4)},
        "required": ["corners"],
        "additionalProperties": False,
    },
    "a letter's language": _object(language={"enum": ["English", "French", "German"]}),
    "a score": _whole(1, 10),
    "two facts and their truth": _list(_object(fact=_SHORT, true=_YES_NO), 2, 2),
    "a company": {
        "type": "object",
        "properties": {"name": _SHORT, "founded": _whole(1800, 2030), "public": _YES_NO},
        "required": ["name"],
        "additionalProperties": False,
    },
}


def prompt(subject: str, number: int = 0) -> str:
    """What is asked of the model for a schema; another number, another text."""
    return f"Invent {subject} and write it as JSON. Variation {number}."
