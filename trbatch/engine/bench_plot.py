"""A picture of a curve that `bench speed` measured. matplotlib is asked for only here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from trbatch.errors import UsageError

_LINES = {
    "recycled_tokens_per_s": ("Token Recycling", "o-"),
    "plain_tokens_per_s": ("plain", "s-"),
    "generate_tokens_per_s": ("transformers' generate", "^:"),
}


def check_png(file: Path) -> None:
    """Find out before anything is measured whether the picture can be made.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be a picture there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--png needs matplotlib, which is not installed", hint="pip install 'trbatch[bench]'"
        )
    if file.suffix != ".png":
        raise UsageError(f"--png {file} must end in .png")
    if not file.parent.is_dir():
        raise UsageError(f"--png {file}: there is no folder {file.parent}")


def save_png(result: dict[str, Any], file: Path) -> None:
    """Draw tokens a second, and recycling over plain, by batch.

    Args:
        result: of `bench_curve.curve`.
    """
    # Without pyplot, which would look for a screen and keep what it drew.
    from matplotlib.figure import Figure

    rows = result["by_batch"]
    batches = [row["batch"] for row in rows]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    speed, gain = figure.subplots(1, 2)
    for name, (label, style) in _LINES.items():
        points = [(row["batch"], row[name]) for row in rows if row[name]]
        if points:
            speed.plot(*zip(*points, strict=True), style, label=label)
    speed.set(yscale="log", ylabel="tokens a second", title="batch full, prefill included")
    speed.legend()
    gain.plot(batches, [row["recycled_over_plain"] for row in rows], "o-", label="as measured")
    if "counted_over_plain" in rows[0]:
        counted = [row["counted_over_plain"] for row in rows]
        gain.plot(batches, counted, "x--", label="at the cost of random weights")
        gain.legend()
    gain.axhline(1.0, color="grey", linewidth=0.8)
    gain.set(ylim=(0, None), ylabel="recycling over plain", title="gain")
    for axes in (speed, gain):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xlabel("sequences decoded together")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{result['model']}, {result['dtype']}, {result['machine']}")
    figure.savefig(file, dpi=120)
