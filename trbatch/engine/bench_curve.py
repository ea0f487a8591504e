"""Speed by the size of the batch, as it is measured on a GPU.

A GPU is nobody else's while it decodes and its pace is steady, so that our plain decoding and our
recycling need not take turns, as they do in `bench_speed`: one engine after the other decodes the
same distinct prompts, at least four times as many as its batch, once. Its speed is that over the
window in which the batch is full (`bench_window`), prefill included, and a step is compared with
what the memory must move for it (`bench_floor`).
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trbatch.config import EngineConfig, SamplingParams
from trbatch.engine.bench_floor import Floor
from trbatch.engine.bench_plot import check_png, save_png
from trbatch.engine.bench_prompts import BenchPrompt, length, mixed, requests_of, short_prompts
from trbatch.engine.bench_runs import WARM_UP, Progress, conditions, decode, generate_rate
from trbatch.engine.bench_window import Measured, measure
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel, pick_device, pick_dtype
from trbatch.engine.shapes import Shape, shape_of
from trbatch.engine.widen import random_like_shape, ready, wide_network
from trbatch.errors import InputError
from trbatch.models import load_model, load_unmodified

GPU_BATCHES = (1, 8, 32, 64, 128, 256)
_PROMPTS_A_BATCH = 4
_FEWEST_PROMPTS = 8  # decoded, however small the batch
_GENERATED_PROMPTS, _GENERATED_TOKENS = 8, 64  # by transformers, whose steps all take as long
_SAME = 1.03  # of a step's time; where random weights take longer than this, their times count


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSettings:
    """What is measured.

    `as_shape`: give the model the cost of this shape (see `widen`); `random_weights`: and time
    random weights of that shape beside it; `generate`: and transformers' own.
    """

    batches: Sequence[int] = GPU_BATCHES  # sequences decoded together
    max_tokens: int = 96
    warm_up: int = WARM_UP
    as_shape: str = ""
    generate: bool = True
    random_weights: bool = True


def curve(
    *,
    prompts: Path,
    model: str = "",
    limit: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    png: Path | None = None,
    progress: Progress = lambda _: None,
    **settings: Any,
) -> dict[str, Any]:
    """Tokens a second and milliseconds a step, plain and recycled, by batch size.

    Args:
        prompts: JSONL; those of up to 160 tokens are used, in a fixed mixed order.
        limit: how many of the file's first prompts may be used; 0: all.
        png: file for a picture of the curve.
        settings: `CurveSettings`.

    Raises:
        InputError: the file has too few distinct prompts.
        UsageError: no such shape, or no picture can be made here.
    """
    wanted = CurveSettings(**settings)
    shape = shape_of(wanted.as_shape) if wanted.as_shape else None
    if png is not None:
        check_png(png)
    models = _Models(model, shape, device, dtype)
    texts, others = _prompts(prompts, models.small, limit, wanted)
    together = {_generated_together(batch) for batch in wanted.batches if wanted.generate}
    loaded, generated = models.open(texts, sorted(together), progress)
    bench = _Bench(loaded, wanted, texts, others, progress)
    rows = [bench.of_batch(batch) for batch in wanted.batches]
    for row in rows:
        count = _generated_together(row["batch"])
        row["generate_tokens_per_s"] = generated.get(count)
        row["generate_batch"] = count if count in generated else None
    result = {
        "bench": "speed",
        "method": "curve",
        **conditions(loaded, prompts, len(texts), wanted.max_tokens),
        "warm_up": wanted.warm_up,
        **({"as_shape": dataclasses.asdict(shape)} if shape else {}),
        "vocab": loaded.vocab_size,
        **bench.floor.to_dict(),
    }
    if shape and wanted.random_weights:
        del loaded
        bench.compare(models.random, rows)
    result |= {"by_batch": rows, "steps": bench.steps}
    if png is not None:
        save_png(result, png)
    return result


def _prompts(
    path: Path, loaded: LoadedModel, limit: int, wanted: CurveSettings
) -> tuple[list[BenchPrompt], list[BenchPrompt]]:
    """Distinct prompts to measure with, and others to warm up with."""
    by_text = {prompt.text: prompt for prompt in mixed(short_prompts(path, loaded, limit))}
    texts = list(by_text.values())
    measured = max(_count(batch) for batch in wanted.batches)
    others = max(wanted.warm_up, 1)
    if len(texts) < measured + others:
        raise InputError(
            f"{path} has {len(texts)} distinct short prompts; {measured + others} are needed: "
            f"{measured} for a batch of {max(wanted.batches)}, {others} to warm up",
            hint="a smaller --batch or --warm-up, or more prompts, of which jobs/make_prompts.py "
            "makes any number",
        )
    # A rehearsal fills the batch; with fewer prompts it decodes some twice.
    return texts[:measured], texts[measured:][: max(others, *wanted.batches)]


def _count(batch: int) -> int:
    """Prompts that a batch size is measured with."""
    return max(_FEWEST_PROMPTS, _PROMPTS_A_BATCH * batch)


def _generated_together(batch: int) -> int:
    """Sequences that `generate` decodes together to be compared with a batch of ours."""
    return min(batch, _GENERATED_PROMPTS)


class _Models:
    """The model to measure, in whatever shape. There is only one on the device at any time."""

    def __init__(self, model: str, shape: Shape | None, device: str, dtype: str) -> None:
        self._model, self._shape = model, shape
        self._place = pick_device(device)
        if shape is None:
            self.small = load_model(model, device=device, dtype=dtype)
        else:
            self.small = load_model(model, device="cpu", dtype="float32", fuse=False)
        self._dtype = pick_dtype(dtype, self._place, self.small.network.config)

    def open(
        self, texts: Sequence[BenchPrompt], together: Sequence[int], progress: Progress
    ) -> tuple[LoadedModel, dict[int, float]]:
        """The model ready to measure, and how fast transformers' `generate` decodes these texts.

        Args:
            together: sequences that `generate` decodes together, each in turn; none: not at all.

        Returns:
            The model; tokens a second of `generate` by sequences decoded together.
        """
        network: Any = None
        if self._shape is not None:
            progress(f"widening {self.small.name} to the shape {self._shape.name} …")
            network = wide_network(self.small, self._shape, dtype=self._dtype, device=self._place)
        elif together:
            network = load_unmodified(self._model, self.small)
        rates = {}
        for count in together:
            rates[count] = self._generate(network, texts, count)
            progress(f"generate, {count} together: {rates[count]} tokens/s")
        if self._shape is None:
            return self.small, rates
        return ready(network, self.small, self._shape), rates

    def random(self) -> LoadedModel:
        """Random weights of the same shape."""
        assert self._shape is not None, "random weights stand beside a shape"
        return random_like_shape(self.small, self._shape, dtype=self._dtype, device=self._place)

    def _generate(self, network: Any, texts: Sequence[BenchPrompt], together: int) -> float:
        chosen = list(texts[:_GENERATED_PROMPTS])
        generate_rate(network, self.small, chosen[:together], together, 2)  # what is made once
        rate = generate_rate(network, self.small, chosen, together, _GENERATED_TOKENS)
        return round(rate, 2)


class _Bench:
    """One model at all batch sizes."""

    def __init__(
        self,
        loaded: LoadedModel,
        wanted: CurveSettings,
        texts: list[BenchPrompt],
        others: list[BenchPrompt],
        progress: Progress,
    ) -> None:
        self._loaded: LoadedModel | None = loaded
        self._wanted, self._texts, self._others = wanted, texts, others
        self._progress = progress
        self._lengths = [length(loaded, prompt.text) for prompt in texts]
        longest = max(*self._lengths, *(length(loaded, prompt.text) for prompt in others))
        # No more keys and values than these prompts need, so that large batches fit.
        self._longest = min(loaded.max_positions, longest + wanted.max_tokens)
        self._measured: dict[int, tuple[Measured, Measured]] = {}
        self.floor = Floor.of(loaded)
        self.steps: list[dict[str, Any]] = []

    def of_batch(self, batch: int) -> dict[str, Any]:
        """The figures of one batch size; those of its steps go to `steps`."""
        count = _count(batch)
        plain = self._decode(batch, count, speculate=False)
        recycled = self._decode(batch, count, speculate=True)
        self._measured[batch] = plain, recycled
        row = {
            "batch": batch,
            "prompts": count,
            "plain_tokens_per_s": _rounded(plain.full.rate, 2),
            "recycled_tokens_per_s": _rounded(recycled.full.rate, 2),
            "recycled_over_plain": _ratio(recycled.full.rate, plain.full.rate),
            "acceptance": _rounded(recycled.acceptance, 4),
            "usual_size": recycled.usual_size,
        }
        self._progress(", ".join(f"{name} {value}" for name, value in row.items()))
        for decoding, measured in (("plain", plain), ("recycled", recycled)):
            self.steps.append({"batch": batch, "decoding": decoding, **self._steps_of(measured)})
        return row

    def _steps_of(self, measured: Measured) -> dict[str, Any]:
        """What the steps of one engine took, and its tail."""
        floor = self.floor.seconds(measured.slots, measured.context)
        medians = {size: measured.step_s_of(size) for size in sorted(measured.seconds)}
        return {
            "slots": measured.slots,
            "context": round(measured.context, 1),
            "step_ms": _milliseconds(measured.step_s),
            "floor_ms": _milliseconds(floor),
            "over_floor": _ratio(measured.step_s, floor),
            "timed_steps": measured.timed,
            "full_s": round(measured.full.seconds, 3),
            "tail_s": round(measured.tail.seconds, 3),
            "tail_tokens_per_s": _rounded(measured.tail.rate, 2),
            "steps_by_size": {str(size): measured.steps[size] for size in sorted(measured.steps)},
            "step_ms_by_size": {str(t): _milliseconds(s) for t, s in medians.items() if s},
        }

    def compare(self, random: Any, rows: list[dict[str, Any]]) -> None:
        """Write into the rows how much longer the same steps take with random weights.

        Zeros may run faster. Where that is more than noise, the `counted` ratio is as if our steps
        had taken as long as those of random weights.

        Args:
            random: makes the model of random weights; the other one is let go first.
        """
        self._loaded = None
        _release()
        self._loaded = random()
        for row in rows:
            batch, size = row["batch"], row["usual_size"]
            wide_plain, wide_recycled = self._measured[batch]
            plain = self._decode(batch, batch, speculate=False)
            of_plain = _ratio(plain.step_s, wide_plain.step_s)
            of_recycled = of_plain
            if size > 1:
                recycled = self._decode(batch, batch, speculate=True, tree_size=size)
                of_recycled = _ratio(recycled.step_s_of(size), wide_recycled.step_s_of(size))
            row["plain_random_over_wide"] = of_plain
            row["recycled_random_over_wide"] = of_recycled
            row["counted_over_plain"] = _rounded(
                row["recycled_over_plain"] * _counted(of_plain) / _counted(of_recycled), 4
            )
            self._progress(
                f"batch {batch}: random weights take {of_plain} of a plain step's time, "
                f"{of_recycled} of one of {size} tokens"
            )

    def _decode(self, batch: int, count: int, *, speculate: bool, tree_size: int = 0) -> Measured:
        """Measure an engine on the first `count` prompts."""
        assert self._loaded is not None
        config = EngineConfig(
            max_num_seqs=batch, max_model_len=self._longest, speculate=speculate,
            tree_size=tree_size,
        )  # fmt: skip
        engine = Engine(self._loaded, config)
        sampling = SamplingParams(max_tokens=self._wanted.max_tokens, ignore_eos=True)
        # Whatever is made once, such as captured steps, is made before the clock starts.
        many = -(-batch // len(self._others))
        decode(engine, requests_of((self._others * many)[:batch], sampling))
        engine.forget()
        if speculate and self._wanted.warm_up:
            decode(engine, requests_of(self._others[: self._wanted.warm_up], sampling))
        requests = requests_of(self._texts[:count], sampling)
        measured = measure(engine, requests, self._lengths)
        del engine
        _release()
        return measured


def _release() -> None:
    """Give memory of engines and networks that are gone back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _counted(ratio: float | None) -> float:
    """By how much a step's time is to be lengthened for its zeros."""
    return ratio if ratio is not None and ratio > _SAME else 1.0


def _milliseconds(seconds: float | None) -> float | None:
    return _rounded(None if seconds is None else seconds * 1e3, 4)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else round(a / b, 4)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
