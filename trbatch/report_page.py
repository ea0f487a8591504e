"""The page of a report: what happened in words and tables; the pictures are `report_pictures`'.

One file without scripts and without anything to fetch; its own policy forbids both, whatever a row
may hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from importlib.resources import files

import trbatch
from trbatch import report_pictures as pictures
from trbatch.figures import Figures
from trbatch.masking import mask_text
from trbatch.progress import duration
from trbatch.receipt import Receipt
from trbatch.report_html import Child, Markup, joined, number, table, tag
from trbatch.report_time import utc
from trbatch.reporting import Report, settings_of
from trbatch.wording import counted

SHOWN_CATEGORIES = 25  # those with the most rows
LONGEST_NAME = 80  # characters of a row's id, below of an error code
LONGEST_CODE = 40
CIRCLES = "go round in circles"  # what repetitive rows do,
LOOPS = "goes round in circles"  # and one of them
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(report: Report) -> str:
    """The whole page as HTML text."""
    title = f"{report.manifest.id} – trbatch report"
    style = files("trbatch").joinpath("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag("body", tag("main", _sections(report)))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _sections(report: Report) -> Iterable[Child]:
    yield _head(report)
    yield _tiles(report)
    if report.rows.total.completion_tokens:
        yield tag("h2", "Speed")
        yield tag("div", pictures.throughput(report), pictures.speedups(report), class_="grid")
        yield tag("h2", "Drafts")
        yield tag(
            "div",
            pictures.acceptance(report),
            pictures.growth(report),
            pictures.growth_parts(report),
            pictures.trees(report),
            class_="grid",
        )
    if report.category:
        yield _categories(report)
    if len(report.rows.workers) > 1:
        yield _workers(report)
    if report.rows.slowest:
        yield _slowest(report)
    if report.rows.errors:
        yield _failed(report)
    yield _receipt(report)
    yield _settings(report)
    yield _foot(report)


def _head(report: Report) -> Markup:
    manifest, receipt = report.manifest, report.receipt
    if not receipt.complete:
        kind, words = "bad", f"Not complete: {receipt.rows_missing:,} {_noun(receipt)} missing"
    elif receipt.rows_failed or receipt.rows_cancelled:
        counts = {"failed": receipt.rows_failed, "cancelled": receipt.rows_cancelled}
        told = ", ".join(f"{rows:,} {what}" for what, rows in counts.items() if rows)
        kind, words = "warn", f"Complete: {told} of {receipt.rows_in:,} {_noun(receipt)}"
    else:
        kind, words = "good", "Complete"
    return tag(
        "header",
        tag("p", "trbatch report", class_="kicker"),
        tag("h1", manifest.id),
        tag(
            "p",
            f"{mask_text(manifest.model)} · task {manifest.task} · "
            f"submitted {utc(datetime.fromisoformat(manifest.created).timestamp())}",
        ),
        tag("span", words, class_=f"pill {kind}"),
    )


def _noun(receipt: Receipt) -> str:
    """What is counted where it says how many there are."""
    return "samples" if receipt.sampled else "rows"


def _tiles(report: Report) -> Markup:
    receipt, total, cost = report.receipt, report.rows.total, report.cost
    varied = report.rows.varied
    parts = [f"{receipt.rows_ok:,} ok"]
    parts += [f"{receipt.rows_failed:,} failed"] if receipt.rows_failed else []
    parts += [f"{receipt.rows_cancelled:,} cancelled"] if receipt.rows_cancelled else []
    parts += [f"{total.rows_repetitive:,} {CIRCLES}"] if total.rows_repetitive else []
    parts += [f"of {counted(receipt.input_rows, 'row')}"] if receipt.sampled else []
    shown = [
        (_noun(receipt).capitalize(), number(receipt.rows_out), ", ".join(parts)),
        (
            "Tokens generated",
            number(total.completion_tokens),
            f"from {total.prompt_tokens:,} of prompts",
        ),
        (
            "Tokens per second",
            number(report.tokens_per_s, 1),
            f"over {duration(report.busy_s)} of decoding",
        ),
        (
            "Speed-up",
            number(total.speedup, 2, "×"),
            "over plain decoding, measured" + _without(report, number(varied.speedup, 2, "×")),
        ),
        (
            "Acceptance length",
            number(total.mean_acceptance_length, 2),
            "tokens a forward; plain decoding has 1"
            + _without(report, number(varied.mean_acceptance_length, 2)),
        ),
    ]
    if cost is not None:
        hours = f"{cost.gpu_hours:,.3f} GPU hours at {cost.gpu_hour_price:g}"
        note = f"{_money(cost.total)} in all: {hours}"
        shown.append(("Cost of a million tokens", _money(cost.per_million_tokens), note))
    return tag(
        "dl",
        [
            tag("div", tag("dt", name), tag("dd", value, class_="value"), tag("dd", note))
            for name, value, note in shown
        ],
        class_="tiles",
    )


def _without(report: Report, figure: str) -> str:
    """The figure of the rows that do not go round in circles, where some do: those flatter it."""
    if not report.rows.total.rows_repetitive:
        return ""
    return f"; {figure} without {_noun(report.receipt)} that {CIRCLES}"


def _money(value: float | None) -> str:
    return number(value, 2 if value is None or value >= 0.1 else 4)


def _categories(report: Report) -> Child:
    found = sorted(report.rows.categories.items(), key=lambda pair: -pair[1].rows)
    shown, left = found[:SHOWN_CATEGORIES], found[SHOWN_CATEGORIES:]
    shown.sort(key=lambda pair: -(pair[1].speedup or 0.0))
    rows = [(name, *_figure_cells(one, _most(report))) for name, one in shown]
    if left:
        rest = Figures()
        for _, figures in left:
            rest.add(figures)
        rows.append((f"{len(left)} more", *_figure_cells(rest, _most(report))))
    head = (report.category, *_FIGURE_HEAD)
    card = tag("div", table(head, rows), class_="card", id="categories")
    return joined(tag("h2", "By category"), card)


def _workers(report: Report) -> Child:
    seconds = report.trace.worker_s
    rows = [
        (name, duration(seconds.get(name, 0.0)), *_figure_cells(one, _most(report, workers=True)))
        for name, one in report.rows.workers.items()
    ]
    head = ("worker", "time", *_FIGURE_HEAD)
    return joined(
        tag("h2", "By worker"), tag("div", table(head, rows), class_="card", id="workers")
    )


_FIGURE_HEAD = ("rows", "speed-up", "acceptance", "tokens", "failed")


def _figure_cells(figures: Figures, most: float) -> tuple[Child, ...]:
    return (
        number(figures.rows),
        _meter(figures.speedup, most),
        number(figures.mean_acceptance_length, 2),
        number(figures.completion_tokens),
        number(figures.rows_failed),
    )


def _most(report: Report, *, workers: bool = False) -> float:
    parts = report.rows.workers if workers else report.rows.categories
    return max((one.speedup or 0.0 for one in parts.values()), default=1.0) or 1.0


def _meter(speedup: float | None, most: float) -> Child:
    if speedup is None:
        return "–"
    kind = "bar" if speedup >= 1 else "slow"
    bar = tag("i", class_=kind, style=f"width:{100 * min(1.0, speedup / most):.1f}%")
    return tag("div", tag("span", bar, aria_hidden="true"), f"{speedup:.2f}×", class_="meter")


def _slowest(report: Report) -> Child:
    head = ["row", "seconds", "tokens", "speed-up", "acceptance", "of prompt"]
    if report.category:
        head.insert(1, report.category)
    rows = []
    for row in report.rows.slowest:
        cells: list[Child] = [
            _row_name(row),
            number(row["seconds"], 2),
            number(row["completion_tokens"]),
            number(row["speedup"], 2, "×"),
            number(row["mean_acceptance_length"], 2),
            number(row["prompt_tokens"]),
        ]
        if report.category:
            cells.insert(1, row["category"])
        rows.append(cells)
    made = table(head, rows, text=2 if report.category else 1)
    return joined(tag("h2", "Slowest rows"), tag("div", made, class_="card", id="slowest"))


def _failed(report: Report) -> Child:
    counts = [(_code(code), number(rows)) for code, rows in report.rows.errors.items()]
    failed = report.receipt.rows_failed
    rows = [
        (_row_name(row), _code(row["error_code"]), row["error_message"])
        for row in report.rows.failures
    ]
    more = "" if failed <= len(rows) else f"The first {len(rows)} of {failed:,}"
    return joined(
        tag("h2", "Failed rows"),
        tag(
            "div",
            tag("div", table(("why", "rows"), counts), class_="card wide", id="errors"),
            tag(
                "div",
                tag("p", more, class_="more") if more else None,
                table(("row", "why", "message"), rows, text=3),
                class_="card wide",
                id="failures",
            ),
            class_="grid",
        ),
    )


def _code(code: str | None) -> Markup:
    return tag("span", _short(code or "unknown", LONGEST_CODE), class_="code")


def _row_name(row: dict[str, object]) -> Child:
    sample = row["sample_index"]
    name = _short(str(row["custom_id"]), LONGEST_NAME)
    mark = f" – {LOOPS}" if row.get("repetitive") else None
    return tag("span", name, f" #{sample}" if sample else None, mark, class_="mono")


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _receipt(report: Report) -> Child:
    receipt = report.receipt
    where = (
        f"Dataset: {mask_text(receipt.output)}"
        if receipt.output
        else "The dataset is not collected yet."
    )
    kind = "good" if receipt.complete else "bad"
    return joined(
        tag("h2", "Receipt"),
        tag(
            "div",
            tag("p", tag("b", str(receipt)[:1].upper() + str(receipt)[1:], class_=kind)),
            tag("p", where, class_="mono"),
            class_="card text",
            id="receipt",
        ),
    )


def _settings(report: Report) -> Child:
    pairs = [(tag("dt", name), tag("dd", value)) for name, value in settings_of(report).items()]
    made = tag("dl", pairs, class_="pairs")
    return joined(tag("h2", "Settings"), tag("div", made, class_="card", id="settings"))


def _foot(report: Report) -> Markup:
    return tag("footer", f"Made by trbatch {trbatch.__version__}, {utc(report.made_at)}.")
