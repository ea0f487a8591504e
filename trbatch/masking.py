"""What messages and logs must not hold: passwords of URLs, and what a terminal would obey."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_PARTS = re.compile(r"(?s)([A-Za-z][\w+.-]*://)?(?:(.*)(@))?(.*)")
# A branch or tag of a repository, which is no user's password: hf://datasets/me/answers@v2.
_REVISION = re.compile(r"hf://(datasets|buckets|spaces)/[\w.-]+/[\w.-]+@[^@?]*")
_PASSWORD = re.compile(r"(?is)(password=).*?(?=&\w+=|$)")
# In running text: up to the last '@' before a space, since a password may hold one, too.
_URL_IN_TEXT = re.compile(r"\b[A-Za-z][\w+.-]*://[^\s'\"]*@[^\s'\"]*")
_OPTION_IN_TEXT = re.compile(r"(?i)([?&]\w*(?:password|secret|token)\w*=)[^&\s'\"]+")


def mask_url(url: str) -> str:
    """The URL with its password, if it has one, replaced by stars: fit for logs and messages.

    Works on the raw text, because what is no URL may hold a password all the same.
    """
    if _REVISION.fullmatch(url):
        return url
    parts = _PARTS.fullmatch(_PASSWORD.sub(r"\1***", url))
    assert parts is not None, "the pattern fits every text"
    scheme, who, at, place = parts.groups(default="")
    user, colon, _ = who.partition(":")
    if not re.fullmatch(r"[\w.-]*", user):
        user, colon = "", ":"
    who = f"{user}:***" if colon else user
    return f"{scheme}{who}{at}{place}"


def mask_text(text: str) -> str:
    """The text with the password of every URL in it replaced by stars."""
    text = _URL_IN_TEXT.sub(lambda found: mask_url(found.group()), text)
    return _OPTION_IN_TEXT.sub(r"\1***", text)


def masked(value: Any) -> Any:
    """What is to become JSON, with every text in it masked; keys are texts then."""
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, Mapping):
        return {str(name): masked(inner) for name, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return masked({one.name: getattr(value, one.name) for one in dataclasses.fields(value)})
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return value


def printable(text: str) -> str:
    """The text with control characters written out, so that it stays one line of letters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
