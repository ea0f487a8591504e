"""The report: every figure on its page computed once more from the Parquet files."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from job_tools import decode, write_lines
from report_tools import BEGAN, HOSTILE, Page, make_job

from trbatch import api, cli
from trbatch.config import JobSpec
from trbatch.errors import UsageError
from trbatch.figures import Figures
from trbatch.job import JobFolder
from trbatch.matrices import Facts, SavedMatrix
from trbatch.report_figures import RowCount, bars_of
from trbatch.report_html import brief, tag, visible
from trbatch.report_page import page
from trbatch.report_time import Clock, Spread, width_for
from trbatch.reporting import Report, make_report

PRICE = 2.5
Row = dict[str, Any]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    return make_job(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def rows(job: JobFolder) -> list[Row]:
    """The dataset, as whoever reads the Parquet file has it."""
    return pq.read_table(api.Job(job).collect().output).to_pylist()


@pytest.fixture(scope="module")
def spans(job: JobFolder) -> dict[str, list[tuple[float, float]]]:
    """By worker, when each segment's rows were decoded, from the footers of the files."""
    found = defaultdict(list)
    for file in sorted((Path(job.path) / "segments").glob("*.parquet")):
        trace = orjson.loads(pq.read_metadata(file).metadata[b"trbatch.trace"])
        for worker, some in trace["spans"].items():
            found[worker] += [(start, end) for start, end in some]
    return found


@pytest.fixture(scope="module")
def report(job: JobFolder, rows: list[Row]) -> Report:
    return make_report(job, gpu_hour_price=PRICE)


@pytest.fixture(scope="module")
def shown(report: Report) -> Page:
    return Page(page(report))


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of a union of spans, by counting which points are in one."""
    points = sorted({point for span in spans for point in span})
    return sum(
        b - a for a, b in itertools.pairwise(points)
        if any(start <= a and b <= end for start, end in spans)
    )  # fmt: skip


def decoded(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["completion_tokens"]]


def length_of(rows: list[Row]) -> float:
    tokens = sum(row["completion_tokens"] - 1 for row in rows)
    return tokens / sum(row["num_spec_steps"] for row in rows)


def speedup_of(rows: list[Row]) -> float:
    plain = sum(row["speedup"] * row["decode_s"] for row in rows)
    return plain / sum(row["decode_s"] for row in rows)


def test_the_large_figures(
    shown: Page, rows: list[Row], spans: dict[str, list[tuple[float, float]]]
) -> None:
    done = decoded(rows)
    tokens = sum(row["completion_tokens"] for row in done)
    busy = covered([span for some in spans.values() for span in some])
    hours = sum(covered(some) for some in spans.values()) / 3600
    prompts = sum(row["prompt_tokens"] or 0 for row in rows)
    failed = len(rows) - len(done)
    loops = [row for row in done if row["repetitive"]]
    varied = [row for row in done if not row["repetitive"]]
    circles = f"{len(loops)} go round in circles"
    assert len(loops) > 10 and f"Rows{len(rows)}{len(done)} ok, {failed} failed, {circles}" in (
        shown.words
    )
    without = "without rows that go round in circles"
    assert f"over plain decoding, measured; {speedup_of(varied):.2f}× {without}" in shown.words
    assert f"plain decoding has 1; {length_of(varied):.2f} {without}" in shown.words
    assert length_of(varied) != pytest.approx(length_of(done), abs=0.01)
    assert f"Tokens generated{tokens:,}from {prompts:,} of prompts" in shown.words
    assert f"Tokens per second{tokens / busy:,.1f}over" in shown.words
    assert f"Speed-up{speedup_of(done):.2f}×" in shown.words
    assert f"Acceptance length{length_of(done):.2f}" in shown.words
    assert f"Cost of a million tokens{hours * PRICE / tokens * 1e6:.2f}" in shown.words
    assert f"{hours * PRICE:.2f} in all: {hours:.3f} GPU hours at {PRICE}" in shown.words


def test_the_time_of_decoding_is_that_of_the_rows(
    rows: list[Row], spans: dict[str, list[tuple[float, float]]]
) -> None:
    """What segments say of themselves, from the rows in them alone."""
    for worker, some in spans.items():
        of_rows = [
            (row["finished_at"] - row["decode_s"] - row["prefill_s"], row["finished_at"])
            for row in decoded(rows)
            if row["worker"] == worker
        ]
        assert all(any(a <= end <= b for a, b in some) for _, end in of_rows)
        assert covered(some) == pytest.approx(covered(of_rows), rel=0.02)


def test_throughput_over_time(
    report: Report, shown: Page, rows: list[Row], spans: dict[str, list[tuple[float, float]]]
) -> None:
    """Each part of the time by asking every row how much of it lies there."""
    everything = sorted(span for some in spans.values() for span in some)
    pause = resumed = 0.0
    reached = everything[0][1]
    for start, end in everything:
        if start - reached > pause:
            pause, resumed = start - reached, start
        reached = max(reached, end)
    begin = everything[0][0]
    assert 3 * 3600 - 20 < pause < 3 * 3600 + 20
    assert f"A pause is left out ({int(pause // 3600)}:" in shown.words

    def passed(moment: float) -> float:
        return moment - begin - (pause if moment >= resumed else 0.0)

    length = passed(everything[-1][1])
    found = report.rows.throughput
    assert found.length_s == pytest.approx(length)
    assert found.width_s == 2 and len(found.tokens_per_s) == math.ceil(length / 2)
    for index, (name, text) in enumerate(shown.tables["throughput"][1:]):
        low, high = 2.0 * index, min(2.0 * index + 2, length)
        tokens = 0.0
        for row in decoded(rows):
            end = passed(row["finished_at"])
            start = passed(max(row["finished_at"] - row["decode_s"], begin))
            if row["finished_at"] - row["decode_s"] < resumed <= row["finished_at"]:
                start = min(start, resumed - pause - begin)  # in the pause the clock stands
            inside = min(end, high) - max(start, low)
            tokens += row["completion_tokens"] * max(0.0, inside) / (end - start)
        assert float(text.replace(",", "")) == pytest.approx(tokens / (high - low), abs=0.051)
        assert name == (f"{int(low)} s" if low < 60 else f"1:{int(low) - 60:02} min")
    seconds = [min(2.0, length - 2 * i) for i in range(len(found.tokens_per_s))]
    total = sum(rate * took for rate, took in zip(found.tokens_per_s, seconds, strict=True))
    assert total == pytest.approx(sum(row["completion_tokens"] for row in rows if row["text"]))


def test_the_histogram_of_acceptance(shown: Page, rows: list[Row]) -> None:
    counts: Counter[int] = Counter()
    for row in rows:
        for index, count in enumerate(row["acceptance_histogram"] or []):
            counts[index + 1] += count
    expected = [
        [str(tokens), f"{counts[tokens]:,}", f"{100 * counts[tokens] / counts.total():.1f}%"]
        for tokens in range(1, max(counts) + 1)
    ]
    assert shown.tables["acceptance"][1:] == expected
    assert f"{length_of(decoded(rows)):.2f} on average" in shown.words
    assert len(shown.titles["acceptance"]) == len(expected)


def test_acceptance_while_the_matrix_warms(shown: Page, rows: list[Row]) -> None:
    ordered = sorted(decoded(rows), key=lambda row: row["finished_at"])
    seen = 0
    for name, forwards, length in shown.tables["growth"][1:]:
        first, last = map(int, name.split(" to "))
        some = ordered[first - 1 : last]
        assert first == seen + 1
        assert int(forwards.replace(",", "")) == sum(row["num_spec_steps"] for row in some)
        assert length == f"{length_of(some):.2f}"
        seen = last
    assert seen == len(ordered)
    assert 10 <= len(shown.tables["growth"]) - 1 <= 16
    begin, end = shown.tables["growth"][1][2], shown.tables["growth"][-1][2]
    assert float(end) > float(begin) + 0.5, "the made-up matrix warms"


def test_the_histogram_while_the_matrix_warms(shown: Page, rows: list[Row]) -> None:
    ordered = sorted(decoded(rows), key=lambda row: row["finished_at"])
    assert shown.tables["parts"][0] == ["rows", "1", "2", "3", "4", "5–7", "8+"]
    for name, *shares in shown.tables["parts"][1:]:
        first, last = map(int, name.split(" to "))
        counts: Counter[str] = Counter()
        for row in ordered[first - 1 : last]:
            for index, count in enumerate(row["acceptance_histogram"]):
                tokens = index + 1
                counts["8+" if tokens > 7 else "5–7" if tokens > 4 else str(tokens)] += count
        wanted = [f"{100 * counts[k] / counts.total():.1f}%" for k in shown.tables["parts"][0][1:]]
        assert shares == wanted


def test_tree_sizes_by_batch(shown: Page, job: JobFolder) -> None:
    steps: Counter[tuple[int, str]] = Counter()
    for file in (Path(job.path) / "segments").glob("*.parquet"):
        trace = orjson.loads(pq.read_metadata(file).metadata[b"trbatch.trace"])
        for batch, size, count in trace["steps"]:
            bounds = [(1, "1"), (2, "2"), (4, "3–4"), (8, "5–8"), (16, "9–16"), (32, "17–32")]
            steps[batch, next(name for most, name in bounds if size <= most)] += count
    head, *lines = shown.tables["trees"]
    names = {"2": 2, "5–8": 8, "9–16": 16}
    assert [next(n for n in names if line[0].startswith(n)) for line in lines] == list(names)
    for line, batch in zip(lines, names.values(), strict=True):
        total = sum(count for (one, _), count in steps.items() if one == batch)
        assert line[0].endswith(f"{total:,} steps")
        shares = [100 * steps[batch, size] / total for size in head[1:]]
        assert line[1:] == [f"{share:.0f}%" if share else "" for share in shares]


def test_speedups_by_row(shown: Page, rows: list[Row]) -> None:
    values = [row["speedup"] for row in decoded(rows)]
    bars = shown.tables["speedups"][1:]
    for name, count in bars:
        low, high = (float(part.removesuffix("×")) for part in name.split(" to "))
        assert int(count) == sum(low - 1e-9 <= value < high - 1e-9 for value in values), name
    assert sum(int(count) for _, count in bars) == len(values)


def test_categories(shown: Page, rows: list[Row]) -> None:
    groups = defaultdict(list)
    for row in rows:
        groups[row["category"] or "(none)"].append(row)
    expected = [
        [
            name, str(len(some)), f"{speedup_of(decoded(some)):.2f}×",
            f"{length_of(decoded(some)):.2f}",
            f"{sum(row['completion_tokens'] or 0 for row in some):,}",
            str(len(some) - len(decoded(some))),
        ]
        for name, some in sorted(groups.items(), key=lambda pair: -speedup_of(decoded(pair[1])))
    ]  # fmt: skip
    assert shown.tables["categories"][1:] == expected
    assert shown.tables["categories"][0][0] == "category"


def test_workers(shown: Page, rows: list[Row], spans: dict[str, list[tuple[float, float]]]) -> None:
    for name, time, count, speedup, length, tokens, failed in shown.tables["workers"][1:]:
        some = [row for row in rows if row["worker"] == name]
        minutes, seconds = divmod(round(covered(spans[name])), 60)
        assert time == f"{minutes}:{seconds:02} min"
        assert (int(count), int(failed)) == (len(some), len(some) - len(decoded(some)))
        assert speedup == f"{speedup_of(decoded(some)):.2f}×"
        assert length == f"{length_of(decoded(some)):.2f}"
        assert tokens == f"{sum(row['completion_tokens'] for row in decoded(some)):,}"
    assert [line[0] for line in shown.tables["workers"][1:]] == ["gpu-a", "gpu-b"]


def test_slowest_and_failed_rows(shown: Page, rows: list[Row]) -> None:
    slow = sorted(decoded(rows), key=lambda row: -(row["prefill_s"] + row["decode_s"]))[:10]
    assert {row["repetitive"] for row in slow} == {True, False}
    assert shown.tables["slowest"][1:] == [
        [
            row["custom_id"] + (" – goes round in circles" if row["repetitive"] else ""),
            row["category"] or "(none)",
            f"{row['prefill_s'] + row['decode_s']:.2f}", str(row["completion_tokens"]),
            f"{row['speedup']:.2f}×", f"{row['mean_acceptance_length']:.2f}",
            str(row["prompt_tokens"]),
        ]
        for row in slow
    ]  # fmt: skip
    failed = [row for row in rows if row["finish_reason"] == "error"]
    codes = Counter(row["error_code"] for row in failed)
    assert shown.tables["errors"][1:] == [[code, str(n)] for code, n in codes.most_common()]
    assert shown.tables["failures"][1:] == [
        [row["custom_id"], row["error_code"], row["error_message"]] for row in failed
    ]


def test_receipt_and_settings(shown: Page, job: JobFolder, rows: list[Row]) -> None:
    ok = len(decoded(rows))
    words = f"Complete: {len(rows)} rows in = {ok} ok + {len(rows) - ok} failed + 0 cancelled"
    assert words in shown.words
    assert f"Dataset: {job.path}/results.parquet" in shown.words
    for setting in ("modelorg/model-7b", "engine.dtypebfloat16", "chunk_size16",
                    "sampling.temperature0.0", f"job_seed{job.manifest.job_seed}"):  # fmt: skip
        assert setting in shown.words


def test_the_json_holds_the_same_and_says_where_the_page_lies(
    job: JobFolder, report: Report, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", job.path, "-o", str(out), "--gpu-hour-price", str(PRICE), "--json"]
    done = CliRunner().invoke(cli.commands, arguments)
    assert done.exit_code == 0, done.output
    values = orjson.loads(done.stdout)
    wanted = orjson.loads(orjson.dumps(report.to_dict()))
    assert wanted["speedup_varied"] == report.rows.varied.speedup
    assert wanted["mean_acceptance_length_varied"] == report.rows.varied.mean_acceptance_length
    assert values == wanted | {"output": str(out)}
    assert out.read_text().startswith("<!doctype html>")
    done = CliRunner().invoke(cli.commands, ["report", job.path])
    assert done.stdout == f"{job.path}/report.html\n"
    assert (Path(job.path) / "report.html").is_file()


def test_nothing_that_comes_from_rows_becomes_html(tmp_path: Path) -> None:
    hostile = make_job(tmp_path, rows=60, hostile=HOSTILE, name="hostile")
    shown = Page(page(make_report(hostile)))
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(shown.tags)
    assert not {name for name in shown.attributes if name.startswith("on") or name == "src"}
    assert not shown.attributes & {"href", "srcset", "action", "data"}
    assert '<script>document.title="taken"' in shown.words, "it is shown as what it is"
    assert "\u202e" not in shown.words
    assert any(HOSTILE[:20] in line[0] for line in shown.tables["slowest"])
    assert any(HOSTILE[:20] in line[0] for line in shown.tables["categories"])


def test_a_page_without_rows_in_circles_speaks_of_none(report: Report) -> None:
    total = dataclasses.replace(report.rows.total, rows_repetitive=0)
    slowest = [row | {"repetitive": False} for row in report.rows.slowest]
    rows = dataclasses.replace(report.rows, total=total, slowest=slowest)
    assert "circles" not in Page(page(dataclasses.replace(report, rows=rows))).words


def test_a_page_tells_times_that_stay_true(report: Report) -> None:
    taught = Facts(task="task", model="fp", rows=1000, pairs=10)
    saved = SavedMatrix(Path("task.trmatrix"), 1 << 20, BEGAN, taught)
    words = Page(page(dataclasses.replace(report, matrix=saved, made_at=BEGAN + 61))).words
    assert "The task's matrix, saved 2026-09-21 14:13 UTC, has 1,000 tokens" in words
    assert "2026-09-21 14:14 UTC." in words
    assert " ago" not in words


def test_a_job_that_still_runs_and_one_that_has_nothing(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    nothing = make_report(job)
    shown = Page(page(nothing))
    assert "Not complete: 10 rows missing" in shown.words
    assert nothing.tokens_per_s is None and not nothing.receipt.complete
    assert nothing.cost is None and "Cost" not in shown.words
    decode(job, 0)
    half = make_report(job, gpu_hour_price=1.0)
    shown = Page(page(half))
    assert "Not complete: 6 rows missing" in shown.words
    assert "4 rows do not tell when they were decoded" in shown.words
    assert half.category == "" and "By category" not in shown.words


def test_rows_are_grouped_by_the_column_that_is_named(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *(
        {"id": f"r{i}", "prompt": "x", "topic": {"a": i % 2}, "kind": i % 3} for i in range(6)
    ))  # fmt: skip
    job = JobFolder.submit(JobSpec(input=str(file), out=str(tmp_path / "store"), model="m"))
    decode(job, 0)
    by_number = make_report(job, category="kind")
    assert set(by_number.rows.categories) == {"0", "1", "2"}
    assert set(make_report(job, category="topic").rows.categories) == {"{'a': 0}", "{'a': 1}"}
    assert make_report(job, category="absent").rows.categories == {}


def test_a_column_that_is_not_there_is_told_with_those_that_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "in.jsonl", {"id": "a", "prompt": "p", "kind": "x", "level": 1})
    job = JobFolder.submit(JobSpec(input=str(path), out=str(tmp_path / "store"), model="m"))
    decode(job, 0)
    assert make_report(job).category == ""
    assert make_report(job, category="kind").category == "kind"
    assert not caplog.messages, "the usual column need not be there"
    assert make_report(job, category="nosuch").category == ""
    told = "the input has no column 'nosuch' to group rows by; it has kind, level"
    assert caplog.messages == [told]
    arguments = ["report", job.path, "--category", "nosuch", "-o", str(tmp_path / "r.html")]
    result = CliRunner().invoke(cli.commands, arguments)
    assert (result.exit_code, told in result.stderr) == (0, True), result.output


def test_wrong_wishes_are_refused(job: JobFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be positive"):
        api.report(api.Job(job), gpu_hour_price=-1.0)
    with pytest.raises(UsageError, match="a page of HTML"):
        api.report(api.Job(job), tmp_path / "page.pdf")


def test_a_clock_leaves_pauses_out() -> None:
    clock = Clock([(100.0, 110.0), (110.5, 120.0), (500.0, 530.0)])
    assert clock.length_s == 50
    assert [clock.at(t) for t in (0, 100, 115, 300, 500, 510, 999)] == [0, 0, 15, 20, 20, 30, 50]
    assert [(pause.at_s, pause.length_s) for pause in clock.pauses] == [(20.0, 380.0)]


def test_amounts_spread_over_long_and_short_spans() -> None:
    spread = Spread(10.0, 5)
    spread.add(10.0, 0.0, 10.0)
    spread.add(3.0, 3.5, 5.0)
    spread.add(1.0, 10.0, 10.0)
    assert spread.sums() == pytest.approx([2, 2 + 1, 2 + 2, 2, 2 + 1])


@pytest.mark.parametrize(
    ("length", "width"),
    [(1.0, 0.1), (70, 1), (73, 2), (3600, 60), (10 * 86400, 14400), (1e7, 172800)],
)
def test_widths_are_those_that_people_count_in(length: float, width: float) -> None:
    assert width_for(length, 72) == width


def test_many_categories_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trbatch.report_figures.CATEGORIES", 3)
    count = RowCount(Clock([(0.0, 1.0)]), categorised=True)
    nothing = dict.fromkeys(
        ("worker", "error_code", "completion_tokens", "error_message", "custom_id", "repetitive",
         "sample_index", "prompt_index")
    )  # fmt: skip
    for index in range(10):
        count.add(nothing | {"finish_reason": "error"}, f"c{index}")
    found = count.figures().categories
    assert {name: one.rows for name, one in found.items()} == {
        "c0": 1, "c1": 1, "c2": 1, "(others)": 7,
    }  # fmt: skip


def test_of_many_categories_the_largest_are_shown(report: Report) -> None:
    categories = {
        f"c{i}": Figures(rows_ok=i + 1, compared_decode_s=1.0, baseline_decode_s=40.0 - i)
        for i in range(30)
    }
    rows = dataclasses.replace(report.rows, categories=categories)
    lines = Page(page(dataclasses.replace(report, rows=rows))).tables["categories"][1:]
    assert [line[0] for line in lines] == [*(f"c{i}" for i in range(5, 30)), "5 more"]
    assert lines[-1][1:3] == [str(1 + 2 + 3 + 4 + 5), "38.00×"]


def test_a_few_odd_rows_do_not_flatten_the_speedups() -> None:
    bars = bars_of({50: 400, 55: 400, 60: 198, 1000: 1, 2: 1})
    assert sum(bar.rows for bar in bars) == 1000
    assert len(bars) <= 33
    assert (bars[0].start, bars[-1].end) == (pytest.approx(0.04), pytest.approx(20.02))
    assert bars_of({}) == []


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: tag("td", "<b>", class_="a\"b"), '<td class="a&quot;b">&lt;b&gt;</td>'),
        (lambda: tag("p", tag("b", 1), None, "&"), "<p><b>1</b>&amp;</p>"),
        (lambda: tag("rect", x=1.5), '<rect x="1.5"/>'),
        (lambda: visible("a\u202eb\x00c\ud800"), "a\ufffdb\ufffdc\ufffd"),
        (lambda: brief(12_000), "12k"),
        (lambda: brief(1_500), "1,500"),
    ],
)  # fmt: skip
def test_html_is_escaped(make: Callable[[], str], wanted: str) -> None:
    assert make() == wanted
