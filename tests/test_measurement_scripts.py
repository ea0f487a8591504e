"""The scripts with which docs/performance.md was measured: their arithmetic, and that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import divergence
import host
import idle
import pytest
import queue_ab
import queue_figures
import steps
import tiny
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from trbatch.config import EngineConfig
from trbatch.engine.bench_floor import Floor
from trbatch.engine.bench_prompts import BenchPrompt
from trbatch.engine.costs import CostTable
from trbatch.engine.engine import Engine
from trbatch.engine.step_plain import PlainOperations
from trbatch.models import load_model

SCRIPTS = Path(__file__).parent.parent / "docs" / "measurements" / "scripts"


@pytest.mark.parametrize("script", [steps, divergence, queue_ab, host])
def test_each_script_says_what_it_measures_and_how_it_is_run(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["-h"])
    assert caught.value.code == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert script.__doc__.partition("\n")[0] in help_text
    assert "--json" in help_text
    assert f"python docs/measurements/scripts/{Path(script.__file__).name} " in script.__doc__


def test_a_script_is_run_from_anywhere_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "steps.py", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: steps are captured on a GPU, and cpu is none (--device)"
    ]


# Steps


def test_steps_are_read_as_pairs_each_once() -> None:
    assert steps.cells("1x1,8x32,1x1") == [(1, 1), (8, 32)]
    assert len(steps.cells(steps.STEPS)) == steps.STEPS.count(",") + 1
    for wrong in ("", "8", "8x", "0x1", "1x2x3"):
        with pytest.raises(ValueError):  # noqa: PT011 - argparse makes a sentence of any
            steps.cells(wrong)


def test_a_step_stands_beside_the_plain_one_of_as_many_rows() -> None:
    known = {"8x1": {"ms": 2.0}, "8x4": {"ms": 3.0}, "18x4": {"ms": 9.0}}
    assert [one.get("over_plain") for one in steps.over_plain(known).values()] == [None, 1.5, None]


def test_the_steps_of_an_engine_are_timed_without_a_table_of_their_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(steps, "LEAST_LONGEST", 100)
    floor = Floor(weights=1_000_000, kv=1_000, bandwidth=1e8)
    monkeypatch.setattr(steps, "Floor", SimpleNamespace(of=lambda loaded: floor))
    wanted = [(1, 1), (2, 1), (2, 3)]
    engine = steps.step_engine(tiny.loaded(), wanted, 20, operations=PlainOperations())
    before = engine.stats()["kv_pages_used"]
    found = steps.step_figures(engine, wanted, 20)
    assert not (tmp_path / "costs").exists()
    assert list(found["steps"]) == ["1x1", "2x1", "2x3"]
    assert [one["floor_ms"] for one in found["steps"].values()] == [10.2, 10.4, 10.4]
    for one in found["steps"].values():
        assert one["ms"] > 0
        assert one["over_floor"] == pytest.approx(one["ms"] / one["floor_ms"], abs=1e-3)
    assert "over_plain" in found["steps"]["2x3"]
    assert engine.stats()["kv_pages_used"] == before, "all that was taken is given back"
    # And the engine is as good as new.
    ids = tiny.prompts(1)[0]
    done = tiny.decode(engine, [tiny.request(0, ids)])
    assert done[0].token_ids == tiny.generate(tiny.network("llama"), ids, 24)


def test_an_engine_that_is_told_what_steps_cost_times_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    config = tiny.engine(tiny.loaded(), tree_size=0, max_tree_size=3).config
    kept = list((tmp_path / "costs").iterdir())
    costs = CostTable({(1, 1): 7.0}, context=10, per_context=0.0)
    one = Engine(tiny.loaded(hidden_size=64), config, costs=costs)
    assert list((tmp_path / "costs").iterdir()) == kept != []
    assert one.budget.plain_seconds(1, 10) == 7.0


def test_kernels_are_summed_up_for_one_step() -> None:
    events = [
        SimpleNamespace(key="small", count=3, self_device_time_total=0.9),
        SimpleNamespace(key="none", count=3, self_device_time_total=0.0),
        SimpleNamespace(key="large" * 20, count=6, self_device_time_total=30.0),
    ]
    assert steps.kernel_rows(events) == [[10.0, 2, "large" * 14], [0.3, 1, "small"]]


def test_gaps_between_kernels_are_summed_up() -> None:
    # Two streams that overlap, one kernel inside another, a short gap and a long one.
    spans = [(100.0, 120.0), (0.0, 40.0), (30.0, 50.0), (35.0, 36.0), (55.0, 80.0)]
    assert idle.idle_figures(spans) == {
        "whole_ms": 0.12,
        "idle": round((5 + 20) / 120, 4),
        "idle_between_steps": round(20 / 120, 4),
        "gaps_between_steps": 1,
        "largest_gaps_us": [20.0],
    }
    assert idle.idle_figures([(3.0, 5.0), (5.0, 9.0)])["idle"] == 0.0


class Profiler:
    """In torch's place where there is no GPU: of two kernels and one of the host's, 6 µs in all."""

    def __init__(self, activities: list[Any]) -> None:
        assert activities == [ProfilerActivity.CUDA]

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None: ...

    def events(self) -> list[Any]:
        spans = [
            (2.0, 3.0, DeviceType.CUDA),
            (0.0, 9.0, DeviceType.CPU),
            (6.0, 8.0, DeviceType.CUDA),
        ]
        return [
            SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=a, end=b))
            for a, b, kind in spans
        ]

    def key_averages(self) -> list[Any]:
        return [SimpleNamespace(key="kernel", count=6, self_device_time_total=3.0)]


def test_idle_time_is_that_of_kernels_while_the_batch_is_full(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "profile", Profiler)
    for name, value in (("WARM_UP", 3), ("WATCHED", 9), ("MAX_TOKENS", 20)):
        monkeypatch.setattr(idle, name, value)
    loaded = load_model(str(tiny_folder), device="cpu", dtype="float32")
    found = idle.idle_by_rows(loaded, [2, 4])
    decoded = ("recycled", "plain")
    assert list(found) == [f"{rows} rows, {name}" for rows in (2, 4) for name in decoded]
    for one in found.values():
        assert (one["steps"], one["idle"], one["whole_ms"]) == (9, 0.5, 0.006)


def test_steps_are_not_watched_when_rows_run_out(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "profile", Profiler)
    monkeypatch.setattr(idle, "WARM_UP", 0)
    loaded = load_model(str(tiny_folder), device="cpu", dtype="float32")
    engine = Engine(loaded, EngineConfig(max_num_seqs=3, max_model_len=200, speculate=False))
    monkeypatch.setattr(idle, "MAX_TOKENS", 5)
    idle.fill(engine, [BenchPrompt("w7 w8")] * 3)
    assert idle.idle_of(engine, 3)["steps"] <= 5
    assert engine.unfinished < 3


def test_the_profiler_sees_each_step_thrice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "profile", Profiler)
    monkeypatch.setattr(steps, "LEAST_LONGEST", 100)
    runs = []
    operations = PlainOperations()
    step = operations.step
    monkeypatch.setattr(operations, "step", lambda *a, **k: (runs.append(a[2]), step(*a, **k))[1])
    engine = steps.step_engine(tiny.loaded(), [(1, 1), (1, 2)], 20, operations=operations)
    assert steps.kernels(engine, [(1, 2)], 20) == {"1x2": [[1.0, 2, "kernel"]]}
    assert runs == [2] * steps.PROFILED


# Divergence


def test_texts_part_where_they_first_differ() -> None:
    assert divergence.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert divergence.first_difference([1, 2, 3], [1, 9, 3]) == 1


def test_rates_count_the_tokens_up_to_where_texts_part() -> None:
    base = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    other = [[1, 2, 0, 0], [5, 6], [0, 8, 9]]
    found = divergence.figures(base, other, lambda row, place: 0.1 * row + place)
    assert (found["diverged"], found["of"], found["tokens_until_then"]) == (2, 3, 2 + 2 + 0)
    assert found["per_1000_tokens"] == 500.0
    assert found["logit_gaps"] == [0.2, 2.0]
    assert (found["median_gap"], found["largest_gap"]) == (1.1, 2.0)


def test_rates_stand_over_that_of_plain_decoding_alone() -> None:
    rates = {divergence.ALONE: 2.0, "recycled": 3.0}
    runs = {name: {"per_1000_tokens": rate} for name, rate in rates.items()}
    found = divergence.compared(runs)
    assert [one["rate_over_plain_batch_1"] for one in found.values()] == [1.0, 1.5]
    runs[divergence.ALONE]["per_1000_tokens"] = 0.0
    found = divergence.compared(runs)
    assert [one["rate_over_plain_batch_1"] for one in found.values()] == [None, None]


def test_a_gap_lies_between_the_logits_of_the_two_tokens() -> None:
    network, prompt, base, other = tiny.network("llama"), [5, 6, 7], [8, 9, 10], [8, 9, 20]
    with torch.inference_mode():
        logits = network(torch.tensor([[5, 6, 7, 8, 9]], device=tiny.DEVICE)).logits[0, -1]
    gaps = divergence.Gaps(network, [prompt], [base], [other])
    assert gaps(0, 2) == pytest.approx(abs(float(logits[10] - logits[20])), abs=1e-4)
    assert gaps(0, 2) > 0.01


def test_texts_in_float32_do_not_part_and_all_figures_are_written(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": " ".join(f"w{5 + (i * j) % 60}" for j in range(1, 12))} for i in range(5)]
    rows.append({"prompt": "w9 " * 600})  # longer than the model takes
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "found.json"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--prompts", prompts, "--model", tiny_folder, "--device", tiny.DEVICE]
    asked += ["--dtype", "float32", "--batch", 3, "--max-tokens", 12, "--tree-size", "4"]
    assert divergence.main([*map(str, asked), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["prompt_count"], found["against"]) == (5, "plain, batch 3")
    assert list(found["runs"]) == [
        divergence.ALONE, "recycled, batch 3", "recycled, batch 3, 4 tokens"
    ]  # fmt: skip
    for one in found["runs"].values():
        assert (one["diverged"], one["of"], one["per_1000_tokens"]) == (0, 5, 0.0)
        assert 5 <= one["tokens_until_then"] <= 60


# The host's own work


def test_the_hosts_work_is_told_by_row_step_and_token(small_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    asked = ["--rows", "9", "--batch", "4", "--size", "1,8", "--max-tokens", "16", "--repeat", "2"]
    assert host.main([*asked, "--model", str(small_model), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["rows"], found["batch"], list(found["sizes"])) == (9, 4, ["1", "8"])
    for one in found["sizes"].values():
        assert all(value > 0 for value in one.values())
    plain, recycled = found["sizes"].values()
    # Two tokens a step on average instead of one, of four rows at most.
    assert plain["ms_a_step"] / plain["us_a_token"] < 0.004 + 1e-6
    assert recycled["ms_a_step"] / recycled["us_a_token"] > plain["ms_a_step"] / plain["us_a_token"]


# A job through the queue


def row(name: str, tokens: int, decode_s: float, speedup: float, **more: Any) -> dict[str, Any]:
    return {
        "custom_id": name, "finish_reason": "length", "completion_tokens": tokens, "text": name,
        "decode_s": decode_s, "prefill_s": 1.0, "finished_at": 100.0, "speedup": speedup,
        "num_spec_steps": tokens - 1, **more,
    }  # fmt: skip


RECYCLED = [row("a", 21, 10.0, 2.0), row("b", 11, 10.0, 1.0, finished_at=108.0)]
PLAIN = [row("a", 21, 15.0, 1.0), row("b", 11, 12.0, 1.0, text="other", finished_at=111.0)]


def test_a_jobs_figures_follow_from_its_rows() -> None:
    failed = row("c", 0, 0.0, 0.0, finish_reason="error", finished_at=0.0)
    found = queue_figures.job_figures([*RECYCLED, failed], [])
    assert (found["rows"], found["errors"], found["tokens"]) == (3, 1, 32)
    assert found["first_to_last_s"] == 108.0 - (100.0 - 10.0 - 1.0)
    assert found["tokens_per_s"] == round(32 / 19, 2)
    assert found["decode_ms_a_token"] == round(20_000 / 30, 4)
    assert found["rows_speedup"] == 1.5, "of all decode seconds, not of rows"
    assert found["busy_share"] is None


def test_jobs_stand_side_by_side_as_a_whole_and_row_by_row() -> None:
    jobs = [queue_figures.job_figures(rows, []) for rows in (RECYCLED, PLAIN)]
    found = queue_figures.side_by_side(RECYCLED, PLAIN, *jobs)
    assert found["tokens_per_s_ratio"] == pytest.approx((32 / 19) / (32 / 27), abs=0.01)
    assert found["decode_ratio"] == round(27 / 20, 4)
    assert found["rows_speedup_over_decode_ratio"] == round(1.5 / (27 / 20), 4)
    of_rows = sorted([2.0 / 1.5, 1.0 / 1.2])
    assert queue_figures.row_ratios(RECYCLED, PLAIN) == pytest.approx(of_rows[::-1])
    by_row = found["speedup_over_decode_ratio_by_row"]
    assert by_row["rows"] == 2
    assert [by_row["5%"], by_row["95%"]] == pytest.approx(of_rows, abs=1e-4)
    assert found["same_texts"] == 1


def test_short_failed_and_missing_rows_have_no_ratio() -> None:
    short = row("a", queue_figures.SHORT, 1.0, 1.0)
    failed = row("b", 20, 1.0, 1.0, finish_reason="error")
    assert queue_figures.row_ratios([short, failed, row("d", 20, 1.0, 1.0)], PLAIN) == []


def test_quantiles_are_values_of_the_list() -> None:
    values = [float(value) for value in range(100, -1, -1)]
    assert [queue_figures.quantile(values, share) for share in (0.05, 0.5, 0.95)] == [5, 50, 95]
    assert queue_figures.quantile([], 0.5) is None


def test_busy_time_counts_from_the_first_change_inside_to_the_last() -> None:
    readings = [(0.0, 0.0), (1.0, 0.5), (1.1, 0.5), (2.0, 1.0), (3.0, 1.8), (3.5, 1.8), (9.0, 2.0)]
    assert queue_figures.busy_share(readings, 0.0, 5.0) == pytest.approx((1.8 - 0.5) / (3.0 - 1.0))
    assert queue_figures.busy_share(readings, 1.5, 9.0) == pytest.approx((2.0 - 1.0) / (9.0 - 2.0))
    assert queue_figures.busy_share(readings, 2.5, 5.0) is None


@pytest.mark.long
def test_three_jobs_go_through_the_queue_and_nothing_stays(
    tiny_folder: Path, tmp_path: Path
) -> None:
    file, home = tmp_path / "found.json", tmp_path / "temporary"
    home.mkdir()
    asked = ["--rows", 24, "--max-tokens", 24, "--device", "cpu", "--max-num-seqs", 4]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "queue_ab.py", *map(str, asked), "--rehearse", "2",
         "--model", tiny_folder.name, "--json", file],
        cwd=tiny_folder.parent, env={**os.environ, "TMPDIR": str(home)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert list(found["jobs"]) == ["recycled", "plain", "recycled, warm"]
    for one in found["jobs"].values():
        assert (one["rows"], one["errors"]) == (24, 0)
        assert one["tokens"] >= 24 and one["tokens_per_s"] > 0
    assert found["jobs"]["plain"]["mean_acceptance_length"] == 1.0
    assert found["jobs"]["recycled"]["mean_acceptance_length"] > 1.0
    for name in ("recycled over plain", "recycled, warm, over plain"):
        assert found[name]["same_texts"] == 24
        assert found[name]["speedup_over_decode_ratio_by_row"]["rows"] > 0
    assert not list(home.iterdir())
