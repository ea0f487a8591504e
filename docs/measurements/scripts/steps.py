"""How long one step takes on a GPU, by rows and tokens a row, and for how long no kernel runs.

    python docs/measurements/scripts/steps.py --shape llama-8b --profile --idle 32 --json steps.json

A step is one of an engine's on random weights of the shape: draft, forward, accept, count, learn,
captured as a CUDA graph. Ten are started one after another on texts of `--context` tokens, and two
events of the device's clock stand around them; the least of three such means counts. The floor is
what a plain step has to read, over the rate at which this device copies memory, measured now.

--profile adds each step's kernels, microseconds and launches a step, from torch's profiler. --idle
adds for which share of the time no kernel runs while a full batch decodes, recycled and plain: the
small model's own text, at the shape's cost (see idle.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from measuring import deliver, numbers, parser_of, release, say, wait
from torch.profiler import ProfilerActivity, profile

from trbatch.config import DEFAULT_TREE_SIZE, EngineConfig
from trbatch.engine.bench_floor import Floor
from trbatch.engine.costs import CostTable
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel, pick_device, pick_dtype
from trbatch.engine.shapes import SHAPES
from trbatch.engine.sizing import machine_name
from trbatch.engine.step_timer import DeviceTimer
from trbatch.engine.transfer import Clock
from trbatch.engine.widen import random_like_shape, widen
from trbatch.errors import UsageError
from trbatch.models import load_model

Cells = Sequence[tuple[int, int]]  # rows, tokens a row
STEPS = (
    "1x1,8x1,32x1,64x1,128x1,256x1,1x16,1x81,8x16,8x24,8x32,32x4,32x8,32x12,64x2,64x4,128x2,256x2"
)
ROUNDS, TIMES, PROFILED = 3, 10, 3  # means; steps of each; steps that the profiler sees
LEAST_LONGEST = 1100  # tokens a sequence: how attention is launched depends on the most there are


def cells(text: str) -> Cells:
    """`1x1,8x32` as pairs of rows and tokens a row, each once."""
    pairs = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if not all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
        raise ValueError(text)
    return list(dict.fromkeys((rows, tokens) for rows, tokens in pairs))


def step_engine(loaded: LoadedModel, wanted: Cells, context: int, **more: Any) -> Engine:
    """An engine for these steps. It is told what they cost, so that it does not time them first."""
    largest = max(tokens for _, tokens in wanted)
    config = EngineConfig(
        max_num_seqs=max(rows for rows, _ in wanted),
        max_model_len=max(LEAST_LONGEST, context + 1 + TIMES * largest),
        max_tree_size=max(DEFAULT_TREE_SIZE, largest), prefix_sharing=False,
    )  # fmt: skip
    costs = CostTable({(1, 1): 1.0}, context=context, per_context=0.0)
    return Engine(loaded, config, costs=costs, **more)


def step_figures(engine: Engine, wanted: Cells, context: int) -> dict[str, Any]:
    """Milliseconds of each step, over the floor, and over the plain step of as many rows."""
    timer, floor = _timer(engine), Floor.of(engine.loaded)
    steps: dict[str, dict[str, Any]] = {}
    for rows, tokens in wanted:
        begun = time.perf_counter()
        with timer.step(rows, tokens, context):
            ready_s = time.perf_counter() - begun
        ms = min(_mean_ms(timer, engine, rows, tokens, context) for _ in range(ROUNDS))
        floor_ms = floor.seconds(rows, context) * 1e3
        one = {
            "ms": round(ms, 4), "floor_ms": round(floor_ms, 4),
            "over_floor": round(ms / floor_ms, 3), "capture_s": round(ready_s, 2),
        }  # fmt: skip
        steps[f"{rows}x{tokens}"] = one
        say(f"{rows}x{tokens}: {one}")
    return {**floor.to_dict(), "steps": over_plain(steps)}


def over_plain(steps: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, and each over the step of one token a row, where that was timed."""
    for name, one in steps.items():
        plain = steps.get(f"{name.partition('x')[0]}x1")
        if plain and plain is not one:
            one["over_plain"] = round(one["ms"] / plain["ms"], 3)
    return steps


def _timer(engine: Engine) -> DeviceTimer:
    timer = engine.timer()
    assert isinstance(timer, DeviceTimer), "these steps are the device's"
    return timer


def _mean_ms(timer: DeviceTimer, engine: Engine, rows: int, tokens: int, context: int) -> float:
    device = engine.loaded.device
    with timer.step(rows, tokens, context, times=TIMES) as step:
        wait(device)
        clock = Clock(device)
        for _ in range(TIMES):
            step.replay.run()
        clock.stop()
        wait(device)
    return clock.seconds / TIMES * 1e3


def kernels(engine: Engine, wanted: Cells, context: int) -> dict[str, list[list[Any]]]:
    """Of each step [microseconds, launches, name] of its kernels, the dearest first."""
    timer, found = _timer(engine), {}
    for rows, tokens in wanted:
        with timer.step(rows, tokens, context, times=PROFILED) as step:
            wait(engine.loaded.device)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(PROFILED):
                    step.replay.run()
                wait(engine.loaded.device)
        found[f"{rows}x{tokens}"] = kernel_rows(seen.key_averages())
    return found


def kernel_rows(events: Any) -> list[list[Any]]:
    """What the profiler summed up over the steps that it saw, for one step."""
    rows = [(e.self_device_time_total / PROFILED, e.count // PROFILED, e.key[:70]) for e in events]
    return [[round(us, 1), count, key] for us, count, key in sorted(rows, reverse=True) if us > 0]


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for.

    Raises:
        UsageError: it is no GPU.
    """
    device = pick_device(options.device)
    if device.type != "cuda":
        raise UsageError(f"steps are captured on a GPU, and {device} is none (--device)")
    torch.cuda.set_device(device)
    small = load_model(options.model, device="cpu", dtype="float32", fuse=False)
    dtype = pick_dtype(options.dtype, device, small.network.config)
    loaded = random_like_shape(small, options.shape, dtype=dtype, device=device)
    engine = step_engine(loaded, options.steps, options.context)
    result: dict[str, Any] = {
        "machine": machine_name(device), "torch": torch.__version__, "shape": options.shape,
        "dtype": str(dtype).removeprefix("torch."), "context": options.context,
        "max_model_len": engine.max_model_len,
    }  # fmt: skip
    result |= step_figures(engine, options.steps, options.context)
    if options.profile:
        result["kernels_us_a_step"] = kernels(engine, options.steps, options.context)
    del engine, loaded  # there is room for one such model
    release()
    if options.idle:
        from idle import idle_by_rows

        wide = widen(small, options.shape, dtype=dtype, device=device)
        result["idle"] = idle_by_rows(wide, options.idle)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 2 where there is no GPU."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-8b", help="whose sizes the weights have")
    add("--model", default="", help="a small Llama, whose text --idle decodes; default: SmolLM2")
    add("--device", default="auto", help="a GPU: cuda:0, …; auto: the first")
    add("--dtype", default="bfloat16", help="of the weights; default: bfloat16")
    add("--context", type=int, default=512, help="committed tokens a row; default: 512")
    add("--steps", type=cells, default=STEPS, help=f"rows x tokens a row; default: {STEPS}")
    add("--profile", action="store_true", help="and the kernels of each step")
    add("--idle", type=numbers, help="rows that decode while idle time is watched, such as 32,128")
    return deliver(measured, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
