"""The arithmetic of queue_ab.py, on rows of datasets as dictionaries."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from trbatch.figures import Figures

Row = Mapping[str, Any]
Reading = tuple[float, float]  # Unix time, and for how many seconds the engine was busy until then
SHORT = 8  # decoded tokens: a ratio of rows with fewer is mostly noise


def job_figures(rows: Sequence[Row], readings: Sequence[Reading]) -> dict[str, Any]:
    """What a job's dataset and its worker's metrics say about it."""
    good = [row for row in rows if row["finish_reason"] != "error"]
    figures = Figures.of(good)
    first, last = span(good)
    return {
        "rows": len(rows),
        "errors": len(rows) - len(good),
        "tokens": figures.completion_tokens,
        "first_to_last_s": round(last - first, 3),
        "tokens_per_s": round(figures.completion_tokens / (last - first), 2),
        "busy_share": rounded(busy_share(readings, first, last)),
        "decode_ms_a_token": rounded(1e3 * figures.decode_s / max(1, figures.decode_tokens)),
        "prefill_s": round(sum(row["prefill_s"] for row in good), 3),
        "mean_acceptance_length": rounded(figures.mean_acceptance_length),
        "rows_speedup": rounded(figures.speedup),
    }


def span(rows: Sequence[Row]) -> tuple[float, float]:
    """When the first token came and when the last, nearly: no row says when its prefill began."""
    firsts = [row["finished_at"] - row["decode_s"] - row["prefill_s"] for row in rows]
    return min(firsts), max(row["finished_at"] for row in rows)


def busy_share(readings: Sequence[Reading], first: float, last: float) -> float | None:
    """The engine's share of the time between the first and the last change of its seconds.

    Readings between changes say nothing new: they would count time of which nothing is known yet.

    Args:
        first, last: only changes in this time count; with fewer than two there is no share.
    """
    news = [b for a, b in pairwise(readings) if b[1] != a[1] and first <= b[0] <= last]
    if len(news) < 2:
        return None
    (begin, before), (end, after) = news[0], news[-1]
    return (after - before) / (end - begin)


def side_by_side(
    recycled: Sequence[Row], plain: Sequence[Row], job: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    """A recycled job beside the plain one of the same rows.

    Args:
        job, other: the `job_figures` of both.
    """
    decode = other["decode_ms_a_token"] / job["decode_ms_a_token"]
    whole = job["tokens_per_s"] / other["tokens_per_s"]
    rows = row_ratios(recycled, plain)
    texts = {row["custom_id"]: row["text"] for row in plain}
    return {
        "tokens_per_s_ratio": round(whole, 4),
        "decode_ratio": round(decode, 4),
        "rows_speedup": job["rows_speedup"],
        "rows_speedup_over_tokens_per_s_ratio": rounded(_over(job["rows_speedup"], whole)),
        "rows_speedup_over_decode_ratio": rounded(_over(job["rows_speedup"], decode)),
        "speedup_over_decode_ratio_by_row": {
            "rows": len(rows),
            "median": rounded(statistics.median(rows) if rows else None),
            "5%": rounded(quantile(rows, 0.05)),
            "95%": rounded(quantile(rows, 0.95)),
        },
        "same_texts": sum(texts.get(row["custom_id"]) == row["text"] for row in recycled),
    }


def row_ratios(recycled: Sequence[Row], plain: Sequence[Row]) -> list[float]:
    """Each row's `speedup` over what it gained: decode seconds a token, plain over recycled."""
    others = {row["custom_id"]: seconds_a_token(row) for row in plain}
    ratios = []
    for row in recycled:
        own, other = seconds_a_token(row), others.get(row["custom_id"])
        if own and other and row["speedup"]:
            ratios.append(row["speedup"] / (other / own))
    return ratios


def seconds_a_token(row: Row) -> float | None:
    """Decode seconds of each token behind the first; None of a failed or a short row."""
    decoded = (row["completion_tokens"] or 0) - 1
    failed = row["finish_reason"] == "error"
    return None if failed or decoded < SHORT else float(row["decode_s"] / decoded)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value with this share of the others below it."""
    return sorted(values)[round(share * (len(values) - 1))] if values else None


def rounded(value: float | None) -> float | None:
    """To four places, if there is one."""
    return None if value is None else round(value, 4)


def _over(one: float | None, other: float) -> float | None:
    return None if one is None else one / other
