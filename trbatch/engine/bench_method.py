"""Which of the two ways to measure speed suits a machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trbatch.engine.bench_curve import GPU_BATCHES, curve
from trbatch.engine.bench_speed import speed
from trbatch.engine.model import pick_device
from trbatch.errors import UsageError

_CPU_BATCHES = (1, 8)


def measure_speed(
    method: str,
    *,
    device: str,
    batches: Sequence[int] | None,
    runs: int,
    as_shape: str | None,
    random_weights: bool,
    png: Path | None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure by `turns` (`bench_speed.speed`) or as a `curve` (`bench_curve.curve`).

    Args:
        method: one of these, or `auto`: a curve on a GPU, which is nobody else's while it decodes,
            or where a shape or a picture is asked for; else turns, since on a CPU only ratios
            measured side by side mean anything.
        batches: None: what suits the device.
        settings: what both know.

    Raises:
        UsageError: turns are asked for together with what only a curve has.
    """
    on_gpu = pick_device(device).type == "cuda"
    batches = batches or (GPU_BATCHES if on_gpu else _CPU_BATCHES)
    only_of_curves = "--as-shape" if as_shape else "--png" if png else ""
    if method == "auto":
        method = "curve" if on_gpu or only_of_curves else "turns"
    if method == "curve":
        return curve(
            device=device, batches=batches, as_shape=as_shape or "", random_weights=random_weights,
            png=png, **settings,
        )  # fmt: skip
    if only_of_curves:
        raise UsageError(f"{only_of_curves} and --method turns contradict each other")
    return speed(device=device, batches=batches, runs=runs, **settings)
