"""What all benchmarks share: decoding requests to their end, and what a figure is worth."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from trbatch.engine import sizing
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Completion, Request
from trbatch.errors import InputError

Progress = Callable[[str], None]


def decode(
    engine: Engine, requests: list[Request], *, cold: bool = False
) -> tuple[list[Completion], float]:
    """All completions, in the order of the requests, and the seconds they took together."""
    begin(engine, requests, cold=cold)
    done: list[Completion] = []
    start = time.perf_counter()
    while engine.unfinished:
        done += engine.step()
    return checked(done), time.perf_counter() - start


def begin(engine: Engine, requests: list[Request], *, cold: bool) -> None:
    """Queue requests; `cold`: forget first what the engine learned."""
    if cold:
        engine.forget()
    for request in requests:
        engine.add(request)


def checked(done: list[Completion]) -> list[Completion]:
    """The completions in the order of their requests.

    Raises:
        InputError: one of them failed.
    """
    for completion in done:
        if completion.finish_reason == "error":
            raise InputError(f"prompt {completion.key}: {completion.error_message}")
    return sorted(done, key=lambda completion: completion.key)  # type: ignore[arg-type,return-value]


def conditions(loaded: LoadedModel, prompts: Path, count: int, max_tokens: int) -> dict[str, Any]:
    """What a figure means nothing without."""
    return {
        "model": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "machine": sizing.machine_name(loaded.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "prompts": prompts.name,
        "prompt_count": count,
        "max_tokens": max_tokens,
    }
