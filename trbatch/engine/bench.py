"""Benchmarks that anyone can repeat: how often drafts are right, and what that is worth.

`acceptance` counts tokens for each forward, which no noise of the machine can touch. `speed` lets
transformers' `generate`, our plain decoding and our Token Recycling take turns on the same prompts
in one process, because only ratios measured side by side mean anything on a shared machine.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trbatch.config import EngineConfig, SamplingParams
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Completion, Request
from trbatch.errors import InputError
from trbatch.models import load_model, load_unmodified

Progress = Callable[[str], None]
_LONGEST_PROMPT = 160  # tokens, of those that `speed` takes
_TURN_S = 0.5


def acceptance(
    *,
    prompts: Path,
    model: str = "",
    batch: int = 8,
    limit: int = 32,
    max_tokens: int = 128,
    tree_sizes: list[int],
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Mean accepted tokens for each forward, greedy, from empty rows, by tree size.

    Args:
        prompts: JSONL; of rows with `turns` the first is taken.
        tree_sizes: nodes behind the root.

    Returns:
        The settings and one entry per tree size; the first one's figures also at the top level.
    """
    loaded = load_model(model, device=device, dtype=dtype)
    requests = _requests(read_prompts(prompts, limit), max_tokens)
    results = []
    for size in tree_sizes:
        progress(f"tree of {size} nodes …")
        config = EngineConfig(
            device=device, dtype=dtype, max_num_seqs=batch, tree_size=size + 1,
            max_tree_size=size + 1,
        )  # fmt: skip
        done, seconds = _decode(Engine(loaded, config), requests)
        results.append(_acceptance_figures(size, done, seconds))
    return {
        "bench": "acceptance",
        **_conditions(loaded, prompts, len(requests), max_tokens),
        "batch": batch,
        **results[0],
        "by_tree_size": results,
    }


def _acceptance_figures(size: int, done: list[Completion], seconds: float) -> dict[str, Any]:
    forwards = sum(c.num_spec_steps for c in done)
    tokens = sum(c.completion_tokens for c in done)
    drafted = sum(c.num_draft_tokens for c in done)
    accepted = sum(c.num_accepted_draft_tokens for c in done)
    width = max(len(c.acceptance_histogram) for c in done)
    histogram = [
        sum(c.acceptance_histogram[i] for c in done if i < len(c.acceptance_histogram))
        for i in range(width)
    ]
    return {
        "tree_size": size,
        "mean_acceptance_length": round((tokens - len(done)) / forwards, 4) if forwards else None,
        "tokens": tokens,
        "decode_forwards": forwards,
        "draft_acceptance_rate": round(accepted / drafted, 4) if drafted else None,
        "acceptance_histogram": histogram,
        "seconds": round(seconds, 2),
    }


def speed(
    *,
    prompts: Path,
    model: str = "",
    batches: list[int],
    max_tokens: int = 96,
    runs: int = 7,
    limit: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    cold: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Tokens a second of three ways to decode the same prompts, and their ratios run by run.

    Each run takes other prompts of up to 160 tokens from all over the file (twice the
    batch) and decodes them in each of the three ways, greedy, always `max_tokens` long.
    As in a worker, what one run learned stays for the next. Seconds count from the first prompt's
    first prefill to the last token. Our two ways take turns by the half second, so that a machine
    that changes its pace changes it for both.

    Args:
        batches: sequences decoded together.
        runs: how often each of the three takes its turn.
        limit: how many of the file's first prompts may be used; 0: all.
        cold: begin each run with empty rows.
    """
    loaded = load_model(model, device=device, dtype=dtype)
    unmodified = load_unmodified(model, loaded)
    most = max(_prompts_a_run(batch) for batch in batches) * runs
    texts = read_prompts(prompts, limit)
    # The question is how fast tokens come out: a long prompt's prefill, the same for all three,
    # would hide the answer.
    texts = [text for text in texts if _length(loaded, text) <= _LONGEST_PROMPT]
    if not texts:
        raise InputError(f"{prompts} has no prompt of at most {_LONGEST_PROMPT} tokens")
    # Benchmark files are sorted by category: take prompts from all over the file.
    texts = texts[:: max(1, len(texts) // most)]
    results = []
    for batch in batches:
        engines = {
            "plain": _engine(loaded, batch, max_tokens, speculate=False),
            "recycling": _engine(loaded, batch, max_tokens, speculate=True),
        }
        rates: dict[str, list[float]] = {"generate": [], "plain": [], "recycling": []}
        done: list[Completion] = []
        for run in range(runs):
            count = _prompts_a_run(batch)
            chosen = [texts[(run * count + i) % len(texts)] for i in range(count)]
            rates["generate"].append(_generate_rate(unmodified, loaded, chosen, batch, max_tokens))
            requests = _requests(chosen, max_tokens, ignore_eos=True)
            for name, (finished, seconds) in _take_turns(engines, requests, cold=cold).items():
                rates[name].append(sum(c.completion_tokens for c in finished) / seconds)
                done += finished if name == "recycling" else []
            progress(f"batch {batch}, run {run + 1} of {runs}: " + _latest(rates))
        results.append(_speed_figures(batch, rates, done, engines["recycling"]))
    return {
        "bench": "speed",
        **_conditions(loaded, prompts, len(texts), max_tokens),
        "runs": runs,
        "cold": cold,
        "by_batch": results,
    }


def _prompts_a_run(batch: int) -> int:
    return 2 * batch


def _length(loaded: LoadedModel, text: str) -> int:
    ids = loaded.tokenizer(_templated(loaded.tokenizer, text), add_special_tokens=False)
    return len(ids["input_ids"])


def _latest(rates: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items()) + " tokens/s"


def _engine(loaded: LoadedModel, batch: int, max_tokens: int, *, speculate: bool) -> Engine:
    return Engine(loaded, EngineConfig(max_num_seqs=batch, speculate=speculate))


def _take_turns(
    engines: dict[str, Engine], requests: list[Request], *, cold: bool
) -> dict[str, tuple[list[Completion], float]]:
    """Each engine's completions of the same requests, and its own seconds."""
    done: dict[str, list[Completion]] = {name: [] for name in engines}
    seconds = dict.fromkeys(engines, 0.0)
    for engine in engines.values():
        _begin(engine, requests, cold=cold)
    while any(engine.unfinished for engine in engines.values()):
        for name, engine in engines.items():
            start = time.perf_counter()
            while engine.unfinished and time.perf_counter() - start < _TURN_S:
                done[name] += engine.step()
            seconds[name] += time.perf_counter() - start
    return {name: (_checked(done[name]), seconds[name]) for name in engines}


def _generate_rate(
    network: Any, loaded: LoadedModel, texts: list[str], batch: int, max_tokens: int
) -> float:
    """`generate` on groups of `batch` prompts, padded on the left."""
    tokenizer = loaded.tokenizer
    seconds, tokens = 0.0, 0
    for start in range(0, len(texts), batch):
        group = [_templated(tokenizer, text) for text in texts[start : start + batch]]
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


def _speed_figures(
    batch: int, rates: dict[str, list[float]], done: list[Completion], engine: Engine
) -> dict[str, Any]:
    def ratio(name: str, to: str) -> dict[str, float]:
        return ratio_figures([a / b for a, b in zip(rates[name], rates[to], strict=True)])

    forwards = sum(c.num_spec_steps for c in done)
    return {
        "batch": batch,
        "tokens_per_s": {
            name: round(statistics.median(values), 2) for name, values in rates.items()
        },
        "recycling_over_plain": ratio("recycling", "plain"),
        "plain_over_generate": ratio("plain", "generate"),
        "recycling_over_generate": ratio("recycling", "generate"),
        "mean_acceptance_length": round(sum(c.completion_tokens - 1 for c in done) / forwards, 4),
        "speedup_by_cost": round(
            sum(c.baseline_decode_s or 0.0 for c in done) / sum(c.decode_s for c in done), 4
        ),
        "tree_sizes": {str(size): n for size, n in engine.stats()["tree_sizes"].items()},
    }


def ratio_figures(ratios: list[float]) -> dict[str, float]:
    """Median of paired ratios, and the bound below which their mean lies with 2.5 % chance.

    The bound is Student's, on logarithms: ratios of a noisy machine are skewed.
    """
    logs = [math.log(ratio) for ratio in ratios]
    lower = math.nan
    if len(logs) > 1:
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        lower = math.exp(statistics.mean(logs) - _student(len(logs) - 1) * error)
    return {"median": round(statistics.median(ratios), 4), "lower_95": round(lower, 4)}


def _student(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t (table; Cornish-Fisher's expansion beyond 10)."""
    table = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
    if freedom <= len(table):
        return table[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom)


def read_prompts(path: Path, limit: int) -> list[str]:
    """The first `limit` prompts (0: all) of a JSONL file: `turns[0]`, `prompt` or last message.

    Raises:
        InputError: the file cannot be read or a row has none of these.
    """
    texts: list[str] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit and len(texts) == limit:
                    break
                if line.strip():
                    texts.append(_prompt_of(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not texts:
        raise InputError(f"{path} has no prompts")
    return texts


def _prompt_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
        if "turns" in row:
            text = row["turns"][0] if isinstance(row["turns"], list) else None
        else:
            text = row["prompt"] if "prompt" in row else row["messages"][-1]["content"]
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not a text")
        return text
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{place}: no prompt in this row ({error!r})",
            hint="each line is a JSON object with 'turns', 'prompt' or 'messages'",
        ) from error


def _requests(texts: list[str], max_tokens: int, *, ignore_eos: bool = False) -> list[Request]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    return [
        Request(
            key=index, order=index, sampling=params, messages=[{"role": "user", "content": text}]
        )
        for index, text in enumerate(texts)
    ]


def _templated(tokenizer: Any, text: str) -> str:
    templated: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return templated


def _decode(
    engine: Engine, requests: list[Request], *, cold: bool = False
) -> tuple[list[Completion], float]:
    """All completions, in the order of the requests, and the seconds they took together."""
    _begin(engine, requests, cold=cold)
    done: list[Completion] = []
    start = time.perf_counter()
    while engine.unfinished:
        done += engine.step()
    return _checked(done), time.perf_counter() - start


def _begin(engine: Engine, requests: list[Request], *, cold: bool) -> None:
    if cold:
        engine.forget()
    for request in requests:
        engine.add(request)


def _checked(done: list[Completion]) -> list[Completion]:
    for completion in done:
        if completion.finish_reason == "error":
            raise InputError(f"prompt {completion.key}: {completion.error_message}")
    return sorted(done, key=lambda completion: completion.key)  # type: ignore[arg-type,return-value]


def _conditions(loaded: LoadedModel, prompts: Path, count: int, max_tokens: int) -> dict[str, Any]:
    """What a figure means nothing without."""
    import platform

    import transformers

    from trbatch.engine.sizing import machine_name

    return {
        "model": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "machine": machine_name(loaded.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "prompts": prompts.name,
        "prompt_count": count,
        "max_tokens": max_tokens,
    }
