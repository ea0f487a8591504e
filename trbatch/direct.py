"""Decoding in this process: prompts into an engine, completions out. No queue, no files."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from trbatch.chunks import RowHasher
from trbatch.config import SamplingParams
from trbatch.engine.sequence import Completion, Request, TaskKey
from trbatch.errors import InputError, RowError
from trbatch.rows import RowChecker

TASK = TaskKey("generate")


class Engine(Protocol):
    """What is used of `trbatch.engine.engine.Engine`."""

    @property
    def unfinished(self) -> int: ...

    def open_task(self, key: TaskKey, /) -> Any: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Completion]: ...


def checked(prompts: Iterable[Any]) -> list[str | Sequence[Mapping[str, Any]]]:
    """The prompts of a call as a list, each a text or a list of messages.

    Raises:
        InputError: they are one text or one message, whose letters or keys would become prompts, or
            one of them is neither of the two.
    """
    if isinstance(prompts, str | Mapping):
        cure = "[prompt]" if isinstance(prompts, str) else "[[message]]"
        raise InputError(
            f"prompts must be a list of prompts, not {prompts!r:.80}",
            hint=f"put it into a list: generate({cure})",
        )
    found = list(prompts)
    for number, prompt in enumerate(found, 1):
        if isinstance(prompt, str):
            continue
        if isinstance(prompt, Mapping):
            raise InputError(
                f"prompt {number} is a message; a prompt is a text or a list of messages",
                hint="put the messages of a chat into a list of their own: generate([messages])",
            )
        is_chat = isinstance(prompt, Sequence) and all(isinstance(one, Mapping) for one in prompt)
        if not is_chat:
            raise InputError(
                f"prompt {number} is neither a text nor a list of messages: {prompt!r:.80}",
                hint='a message is {"role": "user", "content": "Hi"}',
            )
    return found


def generate_with(
    engine: Engine,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    sampling: SamplingParams,
    *,
    seed: int | None = None,
) -> list[Completion]:
    """Decode prompts with an engine. See `api.generate`.

    A bad prompt, or one that the engine cannot take, comes back with `finish_reason` "error".
    """
    asked = list(_requests(prompts, sampling, secrets.randbits(63) if seed is None else seed))
    done: dict[Any, Completion] = {one.key: one for one in asked if isinstance(one, Completion)}
    engine.open_task(TASK)
    for request in asked:
        if isinstance(request, Request):
            engine.add(request)
    while engine.unfinished:
        done.update((completion.key, completion) for completion in engine.step())
    return [done[one.key] for one in asked]


def _requests(
    prompts: Sequence[str | Sequence[Mapping[str, Any]]], sampling: SamplingParams, seed: int
) -> Iterable[Request | Completion]:
    # As if the prompts were rows of a file without ids, so that a job gives the same tokens.
    checker = RowChecker(lambda number: f"prompt {number}")
    hasher = RowHasher("", "", sampling, seed)
    for index, prompt in enumerate(prompts):
        field = "prompt" if isinstance(prompt, str) else "messages"
        value = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        row = checker.row({field: value}, index, index + 1)
        error = row.error
        if error is None and not _can_be_written(value):
            text = f"prompt {index + 1}: it holds half of a character (a lone surrogate); remove it"
            error = RowError("invalid_characters", text)
        if error is not None:
            yield Completion(key=(index, 0), finish_reason="error").failed(
                error.code, error.message
            )
            continue
        row_seed, _, samples = hasher.identify(row)
        for sample in range(samples):
            yield Request(
                key=(index, sample),
                sampling=sampling,
                seed=row_seed,
                sample_index=sample,
                order=index,
                task=TASK,
                **row.request or {},
            )


def _can_be_written(prompt: Any) -> bool:
    """Whether UTF-8 has all its characters: Python's texts may hold what no file can."""
    try:
        json.dumps(prompt, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
