"""A connection to a Redis URL: how it is made, what is said of it, its secrets masked.

Knows no key and no job; `trbatch.queue` owns those.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from trbatch.errors import Unreachable, UsageError
from trbatch.masking import mask_url

__all__ = ["Breaks", "Patience", "connect", "mask_url", "reaching", "undisturbed"]

logger = logging.getLogger("trbatch.queue")

DISTURBED_S = 1.0
QUIET_S = 2.0  # an outage that is shorter is not worth a word
REPEAT_S = 30.0  # nor is a longer one all the time

_AWAY = (redis.ConnectionError, redis.TimeoutError)
_FOR_A_WHILE = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ClusterDownError,
    redis.ReadOnlyError,
)
# What a server that lives but cannot serve says first: its disk is full, it loads its data, its
# replicas are away, a script runs. In a pipeline or a script more words stand before it.
_REFUSALS = re.compile(r"(?:^|[\s:@-])(MISCONF|LOADING|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|BUSY)\b")


class Breaks(ExponentialWithJitterBackoff):
    """Breaks between tries to reach a server, and what its client does and says meanwhile."""

    def __init__(self) -> None:
        super().__init__(base=0.1, cap=2.0)
        self._meanwhile: Callable[[], None] | None = None
        self._thread = 0
        self._said = -REPEAT_S  # monotonic time of the last word

    def failed(self, since: float, words: str) -> bool:
        """Say, now and then, that the server is away and why. Whether it was said.

        Args:
            since: monotonic time of the command's first failure.
        """
        now = time.monotonic()
        if now - since < QUIET_S or now - self._said < REPEAT_S:
            return False
        self._said = now
        logger.warning("the queue cannot be used, trying again: %s", words)
        return True

    def succeeded(self, since: float) -> None:
        """Say that the outage of which something was said is over."""
        logger.warning("the queue can be used again, after %.0f s", time.monotonic() - since)
        self._said = -REPEAT_S

    def use(self, meanwhile: Callable[[], None]) -> None:
        """Call this in every break, in the thread of this call alone. It may raise to end the wait.

        It must not talk to the server.
        """
        self._meanwhile, self._thread = meanwhile, threading.get_ident()

    def compute(self, failures: int) -> float:
        """Seconds of the next break."""
        if self._meanwhile is not None and threading.get_ident() == self._thread:
            self._meanwhile()
        return super().compute(failures)

    def __deepcopy__(self, memo: object) -> Self:
        """Every connection of a client has the same breaks."""
        return self


class CannotServe(redis.ConnectionError):
    """The server answers, and refuses for a reason that passes: as good as away."""


class Patience(Retry):
    """Tries a command again, with breaks, while the server is away or cannot serve.

    A refused command has changed nothing: the server says no before it writes.

    Args:
        url: whose password is kept out of what is said.
        breaks: shared by all connections of a client.
        tries: after the first.
    """

    def __init__(self, url: str, breaks: Breaks, tries: int) -> None:
        super().__init__(breaks, tries)
        self._url, self._breaks = url, breaks

    def call_with_retry(self, do: Callable[[], Any], *arguments: Any, **settings: Any) -> Any:
        """What `do` returns; see `redis.retry.Retry`.

        Raises:
            redis.RedisError: the last try's.
        """

        # Of this command alone: a server whose disk is full still answers questions.
        since, said = 0.0, False

        def failed(error: redis.RedisError) -> None:
            nonlocal since, said
            since = since or time.monotonic()
            said = self._breaks.failed(since, _words(error, self._url)) or said

        def served() -> Any:
            try:
                found = do()
            except _AWAY as error:
                failed(error)
                raise
            except redis.ResponseError as error:
                if not _refuses_for_a_while(error):
                    raise
                failed(error)
                raise CannotServe(str(error)) from error
            if said:
                self._breaks.succeeded(since)
            return found

        return super().call_with_retry(served, *arguments, **settings)


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


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn what redis-py says of a server that is away, or says no, into `Unreachable`."""
    try:
        yield
    except CannotServe as error:
        raise _unusable(url, error) from error
    except _AWAY as error:
        raise Unreachable(
            f"the queue at {mask_url(url)} cannot be reached: {_words(error, url)}",
            hint="start it, or name another with --redis-url or TRBATCH_REDIS_URL",
        ) from error
    except redis.ResponseError as error:
        if not _refuses(error):
            raise
        raise _unusable(url, error) from error


def _unusable(url: str, error: redis.RedisError) -> Unreachable:
    return Unreachable(
        f"the queue at {mask_url(url)} cannot be used: {_words(error, url)}",
        hint="its own log says more; after MISCONF look for a full disk",
    )


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Go on after an answer that only a key of another kind can give: somebody wrote over ours.

    It is logged, and a second goes by, so that a worker neither ends nor spins.
    """
    try:
        yield
    except redis.ResponseError as error:
        if _refuses(error):
            raise
        logger.error("the queue holds what is not ours, going on: %s", error)
        time.sleep(DISTURBED_S)


def _refuses(error: redis.ResponseError) -> bool:
    """Whether the server will not serve us at all, for a while or until its rules change."""
    never = redis.exceptions.NoPermissionError
    return isinstance(error, never) or _refuses_for_a_while(error)


def _refuses_for_a_while(error: redis.ResponseError) -> bool:
    return isinstance(error, _FOR_A_WHILE) or bool(_REFUSALS.search(str(error)))


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
