"""A connection to a Redis URL: how it is made, what is said of it, its secrets masked.

Knows no key and no job; `trbatch.queue` owns those.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis

from trbatch.errors import Unreachable, UsageError

_AWAY = (redis.ConnectionError, redis.TimeoutError)
_REFUSING = (
    redis.exceptions.NoPermissionError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ClusterDownError,
    redis.ReadOnlyError,
)
# What a server that lives but cannot serve says first: its disk is full, it loads its data, its
# replicas are away, a script runs. In a pipeline or a script more words stand before it.
_REFUSALS = re.compile(r"(?:^|[\s:@-])(MISCONF|LOADING|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|BUSY)\b")
_PARTS = re.compile(r"(?s)([A-Za-z][\w+.-]*://)?(?:(.*)(@))?(.*)")
_PASSWORD = re.compile(r"(?is)(password=).*?(?=&\w+=|$)")


def connect(url: str, **options: Any) -> redis.Redis:
    """A client of a URL; nothing is sent yet.

    Raises:
        UsageError: it is no Redis URL.
    """
    # What redis-py says of a bad URL is not passed on: it may quote a part of the password.
    try:
        if _is_cut_short(url):
            raise ValueError("the password is not percent-encoded")
        client = redis.Redis.from_url(url, **options)
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # else the first command checks the options
    except ValueError:
        raise UsageError(
            f"{mask_url(url)} is not a Redis URL",
            hint="redis://user:password@host:6379/0 or unix:///path; a password's special "
            "characters must be percent-encoded, e.g. %2F for /, %3F for ?, %23 for #",
        ) from None
    except TypeError:
        raise UsageError(
            f"{mask_url(url)} is not a Redis URL: it has an unknown option behind the '?'",
            hint="options are written in lower case, e.g. ?db=1&password=…",
        ) from None
    return client


def mask_url(url: str) -> str:
    """The URL with its password, if it has one, replaced by stars: fit for logs and messages.

    Works on the raw text, because what is no URL may hold a password all the same.
    """
    parts = _PARTS.fullmatch(_PASSWORD.sub(r"\1***", url))
    assert parts is not None, "the pattern fits every text"
    scheme, who, at, place = parts.groups(default="")
    user, colon, _ = who.partition(":")
    if not re.fullmatch(r"[\w.-]*", user):
        user, colon = "", ":"
    who = f"{user}:***" if colon else user
    return f"{scheme}{who}{at}{place}"


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn what redis-py says of a server that is away, or says no, into `Unreachable`."""
    try:
        yield
    except _AWAY as error:
        raise Unreachable(
            f"the queue at {mask_url(url)} cannot be reached: {_words(error, url)}",
            hint="start it, or name another with --redis-url or TRBATCH_REDIS_URL",
        ) from error
    except redis.ResponseError as error:
        if not isinstance(error, _REFUSING) and not _REFUSALS.search(str(error)):
            raise
        raise Unreachable(
            f"the queue at {mask_url(url)} cannot be used: {_words(error, url)}",
            hint="its own log says more; after MISCONF look for a full disk",
        ) from error


def _words(error: redis.RedisError, url: str) -> str:
    """What redis-py says, without the URL's password."""
    parts = urlsplit(url)
    secrets = [parts.password or "", *parse_qs(parts.query).get("password", [])]
    words = str(error)
    for secret in secrets:
        for form in {secret, unquote(secret)} - {""}:
            words = words.replace(form, "***")
    return words


def _is_cut_short(url: str) -> bool:
    """Whether a '/', '?' or '#' in a password ended the address: the '@' stands behind it then."""
    parts = urlsplit(url)
    unnamed = [option for option in parts.query.split("&") if "=" not in option]
    behind = "".join([parts.path, parts.fragment, *unnamed])
    return parts.scheme != "unix" and "@" not in parts.netloc and "@" in behind
