"""What Redis says, taken for what it is: bytes that anybody may have written."""

from __future__ import annotations

from typing import Any

import redis
from redis.client import Pipeline
from rq.exceptions import DeserializationError, NoSuchJobError
from rq.serializers import JSONSerializer

from trbatch.chunk_job import ChunkJob
from trbatch.masking import printable

MOST = 10**9  # times and rows that are believed: sums of a few fit 32 bits
_DIGITS = len(str(MOST))


def text_of(value: bytes | str) -> str:
    """A value as text that a terminal shows and does not obey."""
    return printable(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)


def number_of(value: bytes | str | None, otherwise: int = 0) -> int:
    """A count below `MOST`; `otherwise` for what is none. Numbers of Redis are read here alone."""
    if not value or len(value) >= _DIGITS:
        return otherwise
    text = text_of(value)
    return int(text) if text.isascii() and text.isdecimal() else otherwise


def answers_of(pipeline: Pipeline) -> list[Any]:
    """What a pipeline's commands gave; None for a key that is of another kind than ours.

    Raises:
        redis.RedisError: anything else is wrong.
    """
    answers: list[Any] = pipeline.execute(raise_on_error=False)
    for place, answer in enumerate(answers):
        if isinstance(answer, redis.ResponseError) and "WRONGTYPE" in str(answer):
            answers[place] = None
        elif isinstance(answer, Exception):
            raise answer
    return answers


def entry_of(rq_id: str, connection: redis.Redis) -> ChunkJob | None:
    """An entry that can be read and asks for what chunks ask for; None if there is none."""
    try:
        job = ChunkJob.fetch(rq_id, connection, JSONSerializer)
        arguments = job.args
    except (NoSuchJobError, DeserializationError):
        return None
    assert isinstance(job, ChunkJob)
    match arguments:
        case [str(), int(), int()]:
            return job
    return None


def failure_of(rq_id: str, connection: redis.Redis) -> tuple[int, str] | None:
    """Number of a failed chunk and the last line of why; None if the entry is none of ours."""
    job = entry_of(rq_id, connection)
    if job is None:
        return None
    words = job.failure_text().strip() or "no reason given"
    return int(job.args[1]), printable(words.splitlines()[-1])
