"""The charts of a report, each with its figures in a table below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trbatch import report_charts as charts
from trbatch.progress import duration
from trbatch.report_charts import Axis, axis, exact_axis, figure, time_axis
from trbatch.report_figures import LONGEST_STEP, Group
from trbatch.report_html import Child, Markup, joined, number, table, tag
from trbatch.report_time import utc
from trbatch.reporting import Report

LONGEST_BAR = 16  # tokens of a forward that have a bar of their own
# Tokens of a forward that share a colour: from, to.
_PARTS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, LONGEST_STEP - 1), (LONGEST_STEP, 0))


def throughput(report: Report) -> Markup:
    """Tokens a second over the decoding time."""
    found = report.rows.throughput
    width, length = found.width_s, found.length_s
    rates = found.tokens_per_s
    ends = [min((i + 1) * width, length) for i in range(len(rates))]
    x, y = time_axis(length), axis(0.0, max(rates, default=1.0), "tokens/s")
    values = [
        (i * width, end, rate, f"{_clock(i * width)} to {_clock(end)}: {rate:,.1f} tokens/s")
        for i, (end, rate) in enumerate(zip(ends, rates, strict=True))
    ]
    shapes: list[Child] = [charts.steps(x, y, values)]
    shapes += [
        charts.upright(x, pause.at_s, "pause", f"a pause of {duration(pause.length_s)}")
        for pause in found.pauses
    ]
    note = f"In parts of {_clock(width)}; a row's tokens count evenly over its decoding."
    if found.pauses:
        total = duration(sum(pause.length_s for pause in found.pauses))
        what = "A pause is" if len(found.pauses) == 1 else f"{len(found.pauses)} pauses are"
        note += f" {what} left out ({total}, dotted)."
    if found.untimed_rows:
        note += f" {found.untimed_rows:,} rows do not tell when they were decoded."
    rows = [(_clock(start), number(rate, 1)) for start, _, rate, _ in values]
    data = table(("from", "tokens/s"), rows)
    return _wide(figure("Throughput", note, x, y, shapes, data=data), "throughput")


def speedups(report: Report) -> Markup:
    """How many rows have which speed-up."""
    bars = report.rows.speedups
    if not bars:
        return _nothing("Speed-up by row", "No row has a measured baseline.", "speedups")
    high = max(bar.rows for bar in bars)
    step = bars[1].end - bars[1].start if len(bars) > 2 else bars[0].end - bars[0].start
    # The outermost bars hold what lies further out, too; they are as wide as the others.
    first = bars[0].end - step if len(bars) > 1 else bars[0].start
    last = bars[-1].start + step if len(bars) > 1 else bars[-1].end
    x, y = exact_axis(first, last, "speed-up of a row", suffix="×"), axis(0.0, high, "rows")
    values = [
        (
            max(bar.start, first),
            min(bar.end, last),
            float(bar.rows),
            "slow" if bar.end <= 1.0 + 1e-9 else "bar",
            f"{bar.start:.2f}× to {bar.end:.2f}×: {bar.rows:,} rows",
        )
        for bar in bars
    ]
    shapes: list[Child] = [charts.bars(x, y, values)]
    note = "Plain decoding's seconds, by its cost measured on the same machine, over a row's own."
    if first <= 1.0 <= last:
        shapes.append(charts.upright(x, 1.0, "mark", "plain decoding"))
        note += " Dashed: as quick as plain decoding."
    rows = [(f"{bar.start:.2f}× to {bar.end:.2f}×", number(bar.rows)) for bar in bars]
    made = figure("Speed-up by row", note, x, y, shapes, data=table(("speed-up", "rows"), rows))
    return _wide(made, "speedups")


def acceptance(report: Report) -> Markup:
    """Which share of the forwards gave how many tokens."""
    counts = _folded(report.rows.acceptance, LONGEST_BAR)
    total = sum(counts)
    if not total:
        return _nothing(
            "Tokens a forward", "No row was decoded by more than its prefill.", "accept"
        )
    shares = [100 * count / total for count in counts]
    names = [_count_name(i + 1, len(report.rows.acceptance)) for i in range(len(counts))]
    ticks = [(i + 0.5, name) for i, name in enumerate(names)]
    x = Axis(0.0, float(len(counts)), "tokens of a forward", ticks)
    y = axis(0.0, max(shares), "% of forwards", suffix="%")
    values = [
        (float(i), i + 1.0, share, "bar", f"{names[i]}: {counts[i]:,} forwards, {share:.1f}%")
        for i, share in enumerate(shares)
    ]
    mean = report.rows.total.mean_acceptance_length
    note = f"{number(mean, 2)} on average; the accepted drafts and the model's own next token."
    rows = [(n, number(c), f"{s:.1f}%") for n, c, s in zip(names, counts, shares, strict=True)]
    data = table(("tokens", "forwards", "share"), rows)
    made = figure("Tokens a forward", note, x, y, charts.bars(x, y, values), data=data)
    return _named(made, "acceptance")


def growth(report: Report) -> Markup:
    """How the acceptance length grows while the matrix warms."""
    groups = [group for group in report.rows.groups if group.forwards]
    if not groups:
        return _nothing("While the matrix warms", "No row tells when it was decoded.", "growth")
    lengths = [group.mean_acceptance_length or 0.0 for group in groups]
    x = exact_axis(0.0, float(groups[-1].rows_so_far), "rows finished", most=5)
    y = axis(min(1.0, *lengths), max(*lengths, 1.2), "tokens a forward")
    points = [
        (g.rows_so_far - g.rows / 2, length, f"{_span(g)}: {length:.2f} tokens a forward")
        for g, length in zip(groups, lengths, strict=True)
    ]
    rows = [
        (_span(g), number(g.forwards), number(length, 2))
        for g, length in zip(groups, lengths, strict=True)
    ]
    data = table(("rows", "forwards", "tokens a forward"), rows)
    note = joined("Of rows in the order in which they ended.", _matrix_words(report))
    made = figure("While the matrix warms", note, x, y, charts.line(x, y, points), data=data)
    return _named(made, "growth")


def growth_parts(report: Report) -> Markup:
    """The histogram of the accepted tokens for each group of rows."""
    groups = [group for group in report.rows.groups if sum(group.histogram)]
    if not groups:
        return _nothing("The same by tokens a forward", "No row tells.", "parts")
    x = exact_axis(0.0, float(groups[-1].rows_so_far), "rows finished", most=5)
    y = axis(0.0, 100.0, "% of forwards", suffix="%")
    values, rows = [], []
    for group in groups:
        shares = _shares(group)
        words = ", ".join(f"{name} {s:.0f}%" for name, s in zip(_part_names(), shares, strict=True))
        begin = float(group.rows_so_far - group.rows)
        values.append((begin, float(group.rows_so_far), shares, f"{_span(group)}: {words}"))
        rows.append((_span(group), *(f"{share:.1f}%" for share in shares)))
    key = charts.legend([(f"s{i}", name) for i, name in enumerate(_part_names())])
    data = table(("rows", *_part_names()), rows)
    note = "How the forwards of the same rows divide by the tokens that they gave."
    shapes = charts.stacked(x, y, values)
    made = figure("Forwards by tokens given", note, x, y, shapes, data=data, legend=key)
    return _named(made, "parts")


def trees(report: Report) -> Markup:
    """Which tree sizes the engine chose for which batch."""
    steps = report.trace.steps
    if not steps:
        return _nothing("Tree size by batch", "The workers did not tell their steps.", "trees")
    by_batch: dict[int, Counter[int]] = {}
    for (batch, size), count in steps.items():
        by_batch.setdefault(batch, Counter())[_power(size)] += count
    powers = range(max(p for sizes in by_batch.values() for p in sizes).bit_length())
    sizes = [1 << power for power in powers]
    rows = []
    for batch, found in sorted(by_batch.items()):
        total = found.total()
        name = joined(_between(batch), tag("br"), tag("small", f"{total:,} steps"))
        rows.append((name, *(_cell(found[size], total) for size in sizes)))
    head = ("rows together", *map(_between, sizes))
    made = _heat(head, rows)
    note = (
        "Of the steps with so many rows, the share in which each row got so many tokens to verify. "
        "1 is plain decoding."
    )
    caption = tag("figcaption", tag("h3", "Tree size by batch"), tag("p", note))
    return _named(tag("figure", caption, made), "trees")


def _heat(head: Sequence[str], rows: Sequence[Sequence[Child]]) -> Markup:
    top = tag("tr", [tag("th", name, scope="col") for name in head])
    body = [tag("tr", tag("th", row[0], scope="row"), row[1:]) for row in rows]
    made = tag("table", tag("thead", top), tag("tbody", body), class_="heat")
    return tag("div", made, class_="scroll")


def _cell(count: int, total: int) -> Markup:
    share = count / total
    if not count:
        return tag("td", class_="cell", style="--share:0")
    text = f"{100 * share:.0f}%" if share >= 0.005 else "<1%"
    return tag("td", text, class_="cell", style=f"--share:{share:.3f}", title=f"{count:,} steps")


def _power(size: int) -> int:
    return 1 << (max(1, size) - 1).bit_length()


def _between(power: int) -> str:
    """What a class of sizes holds: `1`, `2`, `3–4`, `5–8`, …"""
    return str(power) if power <= 2 else f"{power // 2 + 1}–{power}"


def _matrix_words(report: Report) -> str:
    saved = report.matrix
    if saved is None:
        return ""
    facts = saved.facts
    words = f" The task's matrix, saved {utc(saved.saved_at)}, has {facts.rows:,} tokens"
    words += f" and {facts.pairs:,} pairs"
    with_it, without = facts.with_it.mean_length, facts.without_it.mean_length
    if with_it and without:
        words += f"; with it {with_it:.2f} tokens a forward, without it {without:.2f}"
    return f"{words}."


def _shares(group: Group) -> list[float]:
    total = sum(group.histogram)
    return [
        100 * sum(group.histogram[low - 1 : high or LONGEST_STEP]) / total for low, high in _PARTS
    ]


def _part_names() -> list[str]:
    return [
        f"{low}+" if not high else str(low) if low == high else f"{low}–{high}"
        for low, high in _PARTS
    ]


def _folded(counts: Sequence[int], most: int) -> list[int]:
    """The counts with all from `most` on as one."""
    if len(counts) <= most:
        return list(counts)
    return [*counts[: most - 1], sum(counts[most - 1 :])]


def _count_name(tokens: int, longest: int) -> str:
    return f"{tokens}+" if tokens == LONGEST_BAR and longest > LONGEST_BAR else str(tokens)


def _span(group: Group) -> str:
    return f"{group.rows_so_far - group.rows + 1:,} to {group.rows_so_far:,}"


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 and seconds % 1 else duration(seconds)


def _named(made: Markup, name: str) -> Markup:
    return Markup(made.replace("<figure", f'<figure id="{name}"', 1))


def _wide(made: Markup, name: str) -> Markup:
    return Markup(made.replace("<figure", f'<figure id="{name}" class="wide"', 1))


def _nothing(title: str, why: str, name: str) -> Markup:
    return _named(tag("figure", tag("figcaption", tag("h3", title), tag("p", why))), name)
