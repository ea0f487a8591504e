"""The prompts that benchmarks decode: any JSONL file, and how its rows become requests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trbatch.config import SamplingParams
from trbatch.engine.sequence import Request
from trbatch.errors import InputError


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """One prompt; `category` is "" where the row has none."""

    text: str
    category: str = ""


def read_prompts(path: Path, limit: int = 0) -> list[BenchPrompt]:
    """The first `limit` prompts (0: all) of a JSONL file: `turns[0]`, `prompt` or last message.

    Raises:
        InputError: the file cannot be read or a row has none of these.
    """
    prompts: list[BenchPrompt] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit and len(prompts) == limit:
                    break
                if line.strip():
                    prompts.append(_prompt_of(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not prompts:
        raise InputError(f"{path} has no prompts")
    return prompts


def _prompt_of(line: str, place: str) -> BenchPrompt:
    try:
        row = json.loads(line)
        if "turns" in row:
            text = row["turns"][0] if isinstance(row["turns"], list) else None
        else:
            text = row["prompt"] if "prompt" in row else row["messages"][-1]["content"]
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not a text")
        return BenchPrompt(text, str(row.get("category") or ""))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{place}: no prompt in this row ({error!r})",
            hint="each line is a JSON object with 'turns', 'prompt' or 'messages'",
        ) from error


def requests_of(prompts: list[BenchPrompt], sampling: SamplingParams) -> list[Request]:
    """One request for each prompt, keyed by its place."""
    return [
        Request(
            key=index,
            order=index,
            seed=index,
            sampling=sampling,
            messages=[{"role": "user", "content": prompt.text}],
        )
        for index, prompt in enumerate(prompts)
    ]


def templated(tokenizer: Any, text: str) -> str:
    """The text as the model's chat template wraps it."""
    wrapped: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return wrapped
