"""What recycling is worth: tokens a second of three ways to decode the same prompts.

transformers' `generate`, our plain decoding and our Token Recycling take turns in one process,
because only ratios measured side by side mean anything on a shared machine. How a GPU is measured:
`bench_curve`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from trbatch.config import EngineConfig, SamplingParams
from trbatch.engine.bench_prompts import BenchPrompt, mixed, requests_of, short_prompts
from trbatch.engine.bench_runs import (
    WARM_UP,
    Progress,
    checked,
    conditions,
    decode,
    generate_rate,
)
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Completion
from trbatch.models import load_model, load_unmodified

_TURN_S = 0.5
_PROMPTS_A_RUN = 4  # at least; else two batches


def speed(
    *,
    prompts: Path,
    model: str = "",
    batches: Sequence[int],
    max_tokens: int = 96,
    runs: int = 7,
    limit: int = 0,
    warm_up: int = WARM_UP,
    generate: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Tokens a second of three ways to decode the same prompts, and their ratios run by run.

    A job has many prompts, so both of our engines always have more waiting than they decode: no
    figure is spoiled by the last few sequences of a run, and what one run learned stays for the
    next, as in a worker. So that the figures are those of a night and not of its first minute, the
    matrix first learns from `warm_up` prompts that are not measured. A run lasts until each has
    given the tokens of two batches of prompts, four prompts at least, prefill included; they take
    turns by the half second, so that a machine that changes its pace changes it for both.
    `generate` decodes as many of the prompts, padded.
    Prompts have up to 160 tokens, come from all over the file in a fixed order, and are decoded
    greedily, always `max_tokens` long.

    Args:
        batches: sequences decoded together.
        runs: how often each of the three takes its turn.
        limit: how many of the file's first prompts may be used; 0: all.
        warm_up: prompts that recycling decodes before the first run; 0 starts cold.
        generate: whether transformers takes its turns, too.
    """
    loaded = load_model(model, device=device, dtype=dtype)
    unmodified = load_unmodified(model, loaded) if generate else None
    texts = mixed(short_prompts(prompts, loaded, limit))
    warm_up = min(warm_up, len(texts) // 2)
    texts, others = texts[: len(texts) - warm_up], texts[len(texts) - warm_up :]
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    results = []
    for batch in batches:
        streams = {
            name: _Stream(_engine(loaded, batch, speculate=name == "recycling"), texts, sampling)
            for name in ("plain", "recycling")
        }
        names = (["generate"] if generate else []) + list(streams)
        rates: dict[str, list[float]] = {name: [] for name in names}
        count = max(_PROMPTS_A_RUN, 2 * batch)
        progress(f"batch {batch}: warming up on {len(others)} other prompts")
        decode(streams["recycling"].engine, requests_of(others, sampling))
        for run in range(runs):
            if generate:
                chosen = [texts[(count * run + i) % len(texts)] for i in range(count)]
                rate = generate_rate(unmodified, loaded, chosen, batch, max_tokens)
                rates["generate"].append(rate)
            for name, rate in _take_turns(streams, count * max_tokens).items():
                rates[name].append(rate)
            progress(f"batch {batch}, run {run + 1} of {runs}: " + _latest(rates))
        results.append(_speed_figures(batch, rates, streams["recycling"]))
    return {
        "bench": "speed",
        **conditions(loaded, prompts, len(texts), max_tokens),
        "runs": runs,
        "warm_up": warm_up,
        "by_batch": results,
    }


def _latest(rates: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items()) + " tokens/s"


def _engine(loaded: LoadedModel, batch: int, *, speculate: bool) -> Engine:
    return Engine(loaded, EngineConfig(max_num_seqs=batch, speculate=speculate))


class _Stream:
    """An engine that never runs out of prompts."""

    def __init__(
        self, engine: Engine, prompts: list[BenchPrompt], sampling: SamplingParams
    ) -> None:
        self.engine = engine
        self.done: list[Completion] = []
        self._requests = cycle(requests_of(prompts, sampling))
        self._added = 0

    @property
    def tokens(self) -> int:
        """Given so far."""
        return int(self.engine.stats()["tokens"])

    def run_for(self, seconds: float) -> float:
        """Decode for so long, at least one step. Returns the seconds it took."""
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            while self.engine.unfinished < 2 * self.engine.capacity:
                self.engine.add(replace(next(self._requests), key=self._added, order=self._added))
                self._added += 1
            self.done += checked(self.engine.step())
        return passed


def _take_turns(streams: dict[str, _Stream], tokens: int) -> dict[str, float]:
    """Let each stream give so many tokens. Returns the tokens a second of each."""
    before = {name: stream.tokens for name, stream in streams.items()}
    given = dict.fromkeys(streams, 0)
    seconds = dict.fromkeys(streams, 0.0)
    while any(count < tokens for count in given.values()):
        for name, stream in streams.items():
            if given[name] < tokens:
                seconds[name] += stream.run_for(_TURN_S)
                given[name] = stream.tokens - before[name]
    return {name: given[name] / seconds[name] for name in streams}


def _speed_figures(batch: int, rates: dict[str, list[float]], recycling: _Stream) -> dict[str, Any]:
    def ratio(name: str, to: str) -> dict[str, float]:
        return ratio_figures([a / b for a, b in zip(rates[name], rates[to], strict=True)])

    done = recycling.done
    forwards = sum(c.num_spec_steps for c in done)
    return {
        "batch": batch,
        "tokens_per_s": {
            name: round(statistics.median(values), 2) for name, values in rates.items()
        },
        "recycling_over_plain": ratio("recycling", "plain"),
        **(
            {f"{name}_over_generate": ratio(name, "generate") for name in ("plain", "recycling")}
            if "generate" in rates
            else {}
        ),
        "mean_acceptance_length": round(sum(c.completion_tokens - 1 for c in done) / forwards, 4),
        "speedup_by_cost": round(
            sum(c.baseline_decode_s or 0.0 for c in done) / sum(c.decode_s for c in done), 4
        ),
        "tree_sizes": {str(size): n for size, n in recycling.engine.stats()["tree_sizes"].items()},
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
