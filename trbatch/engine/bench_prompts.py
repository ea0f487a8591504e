"""The prompts that benchmarks decode: any JSONL file, and how its rows become requests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trbatch.config import SamplingParams
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Request
from trbatch.errors import InputError

_LONGEST = 160  # tokens, of prompts that are timed


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
            f"{place}: no prompt in this row: {_in_words(error)}",
            hint="each line is a JSON object with 'turns', 'prompt' or 'messages'",
        ) from error


def _in_words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is not valid JSON at character {error.pos + 1}"
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


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


def short_prompts(path: Path, loaded: LoadedModel, limit: int = 0) -> list[BenchPrompt]:
    """The prompts of a file that have at most 160 tokens in the model's chat template.

    The question is how fast tokens come out: a long prompt's prefill, the same for all ways to
    decode, would hide the answer.

    Raises:
        InputError: there are none; see `read_prompts` for the others.
    """
    texts = read_prompts(path, limit)
    texts = [prompt for prompt in texts if length(loaded, prompt.text) <= _LONGEST]
    if not texts:
        raise InputError(f"{path} has no prompt of at most {_LONGEST} tokens")
    return texts


def length(loaded: LoadedModel, text: str) -> int:
    """Tokens of a text in the model's chat template."""
    ids = loaded.tokenizer(templated(loaded.tokenizer, text), add_special_tokens=False)
    return len(ids["input_ids"])


def mixed(texts: Sequence[BenchPrompt]) -> list[BenchPrompt]:
    """The prompts in an order in which each four come from different quarters of the file.

    Benchmark files are sorted by category: so runs of a few prompts each are alike.
    """
    quarters = [list(texts[i * len(texts) // 4 : (i + 1) * len(texts) // 4]) for i in range(4)]
    for quarter in quarters:
        random.Random(0).shuffle(quarter)
    rounds = zip_longest(*quarters)
    return [prompt for prompts in rounds for prompt in prompts if prompt is not None]
