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
from trbatch.engine.bench_prompts import BenchPrompt, templated
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Completion, Request
from trbatch.errors import InputError

Progress = Callable[[str], None]
WARM_UP = 64  # prompts that a matrix learns from before it is measured


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


def generate_rate(
    network: Any, loaded: LoadedModel, prompts: list[BenchPrompt], batch: int, max_tokens: int
) -> float:
    """`generate` on groups of `batch` prompts, padded on the left."""
    tokenizer = loaded.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # what pads is masked
    seconds, tokens = 0.0, 0
    for start in range(0, len(prompts), batch):
        group = [templated(tokenizer, p.text) for p in prompts[start : start + batch]]
        begun = time.perf_counter()
        inputs = tokenizer(
            group, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left"
        ).to(network.device)
        with torch.inference_mode():
            out = network.generate(
                **inputs, do_sample=False, max_new_tokens=max_tokens, min_new_tokens=max_tokens
            )
        tokens += (out.shape[1] - inputs["input_ids"].shape[1]) * out.shape[0]
        seconds += time.perf_counter() - begun
    return tokens / seconds
