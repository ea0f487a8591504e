"""Decoding in this process: prompts into an engine, completions out. No queue, no files."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from trbatch.chunks import RowHasher
from trbatch.config import SamplingParams
from trbatch.engine.sequence import Completion, Request, TaskKey
from trbatch.errors import InputError
from trbatch.rows import RowChecker

TASK = TaskKey("generate")


class Engine(Protocol):
    """What is used of `trbatch.engine.engine.Engine`."""

    @property
    def unfinished(self) -> int: ...

    def open_task(self, key: TaskKey, /) -> Any: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Completion]: ...


def generate_with(
    engine: Engine,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    sampling: SamplingParams,
    *,
    seed: int | None = None,
) -> list[Completion]:
    """Decode prompts with an engine. See `api.generate`.

    A prompt that the engine cannot take comes back with `finish_reason` "error".
    """
    requests = list(_requests(prompts, sampling, secrets.randbits(63) if seed is None else seed))
    engine.open_task(TASK)
    for request in requests:
        engine.add(request)
    done: dict[Any, Completion] = {}
    while engine.unfinished:
        done.update((completion.key, completion) for completion in engine.step())
    return [done[request.key] for request in requests]


def _requests(
    prompts: Sequence[str | Sequence[Mapping[str, Any]]], sampling: SamplingParams, seed: int
) -> Iterable[Request]:
    # As if the prompts were rows of a file without ids, so that a job gives the same tokens.
    checker = RowChecker(lambda number: f"prompt {number}")
    hasher = RowHasher("", "", sampling, seed)
    for index, prompt in enumerate(prompts):
        field = "prompt" if isinstance(prompt, str) else "messages"
        value = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        row = checker.row({field: value}, index, index + 1)
        if row.error is not None:
            raise InputError(row.error.message)
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
