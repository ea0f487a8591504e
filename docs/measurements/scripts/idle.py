"""What `steps.py --idle` measures: for which share of the time no kernel runs.

A batch decodes four prompts a row, and torch's profiler looks at 120 steps in the middle, in which
the batch stays full: no kernel for how long, in all and in gaps of over 15 µs. Between two kernels
of a graph pass a few microseconds; longer gaps lie between steps, where the host had none ready.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from measuring import make_prompts, release, say, wait
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from trbatch.config import EngineConfig, SamplingParams
from trbatch.engine.bench_prompts import BenchPrompt, read_prompts, requests_of
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel

BETWEEN_US = 15.0  # gaps longer than this lie between steps
WARM_UP, WATCHED = 60, 120  # steps
MAX_TOKENS, LONGEST = 192, 480  # of each text; and with its prompt


def idle_by_rows(loaded: LoadedModel, batches: Sequence[int]) -> dict[str, Any]:
    """The figures of each batch, recycled and plain."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        make_prompts(file, _prompts(max(batches)))
        prompts = read_prompts(file)
    for rows in batches:
        for name, speculate in (("recycled", True), ("plain", False)):
            config = EngineConfig(max_num_seqs=rows, max_model_len=LONGEST, speculate=speculate)
            engine = Engine(loaded, config)
            fill(engine, prompts[: _prompts(rows)])
            one = idle_of(engine, rows)
            found[f"{rows} rows, {name}"] = one
            say(f"{rows} rows, {name}: {one}")
            del engine
            release()
    return found


def _prompts(rows: int) -> int:
    return max(8, 4 * rows)


def fill(engine: Engine, prompts: list[BenchPrompt]) -> None:
    """Have an engine decode these prompts, up to where whatever is made once is there."""
    for request in requests_of(prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)):
        engine.add(request)
    for _ in range(WARM_UP):
        engine.step()


def idle_of(engine: Engine, rows: int) -> dict[str, Any]:
    """Figures of the next steps of a batch, as long as it is full."""
    made = 0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        while made < WATCHED and engine.unfinished >= rows:
            engine.step()
            made += 1
        wait(engine.loaded.device)
    events = (event for event in seen.events() or () if event.device_type == DeviceType.CUDA)
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    return {"steps": made, **idle_figures(spans)}


def idle_figures(spans: Iterable[tuple[float, float]]) -> dict[str, Any]:
    """What lies between kernels.

    Args:
        spans: (start, end) of each, microseconds, in any order; they may overlap.
    """
    ordered = sorted(spans)
    begin = end = ordered[0][0]
    gaps = []
    for start, stop in ordered:
        if start > end:
            gaps.append(start - end)
        end = max(end, stop)
    between = sorted(gap for gap in gaps if gap > BETWEEN_US)
    return {
        "whole_ms": round((end - begin) / 1e3, 3),
        "idle": round(sum(gaps) / (end - begin), 4),
        "idle_between_steps": round(sum(between) / (end - begin), 4),
        "gaps_between_steps": len(between),
        "largest_gaps_us": [round(gap, 1) for gap in between[-8:]],
    }
