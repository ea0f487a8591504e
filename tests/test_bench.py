"""The benchmarks: their arithmetic, what they read, and the figures that we stand by."""

from __future__ import annotations

import bisect
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from trbatch.engine import bench_acceptance, bench_prompts, bench_runs, bench_speed
from trbatch.engine.bench_acceptance import acceptance
from trbatch.engine.engine import Engine
from trbatch.engine.sequence import Completion, Request
from trbatch.errors import InputError, UsageError

ROOT = Path(__file__).parent.parent
PROMPTS = ["Count to ten, then count to ten again.", "List the days of the week, twice."]


def trbatch_bench(*arguments: str) -> dict[str, Any]:
    """The JSON on the last line of stdout of `trbatch bench …`."""
    done = subprocess.run(
        [sys.executable, "-m", "trbatch", "bench", *arguments, "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def by_batch(result: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {entry["batch"]: entry for entry in result["by_batch"]}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"turns": [PROMPTS[0], "and then?"]}, {"prompt": PROMPTS[1]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    "ratios", [[1.1, 1.3], [1.1, 1.2, 1.3], [0.5, 2.0, 1.0, 1.0, 4.0], [1.3] * 6 + [1.25]]
)
def test_ratios_are_summed_up_by_their_median_and_students_bound(ratios: list[float]) -> None:
    figures = bench_speed.ratio_figures(ratios)
    logs = [math.log(ratio) for ratio in ratios]
    bound = stats.t.interval(0.95, len(logs) - 1, loc=sum(logs) / len(logs), scale=stats.sem(logs))
    assert figures["median"] == pytest.approx(statistics.median(ratios), abs=1e-4)
    assert figures["lower_95"] == pytest.approx(math.exp(bound[0]), rel=1e-3)


def test_known_ratios_have_known_figures() -> None:
    assert bench_speed.ratio_figures([2.0, 2.0, 2.0]) == {"median": 2.0, "lower_95": 2.0}
    assert bench_speed.ratio_figures([1.0, 2.0, 4.0])["median"] == 2.0
    assert bench_speed.ratio_figures([1.0, 3.0])["median"] == 2.0
    assert math.isnan(bench_speed.ratio_figures([1.5])["lower_95"]), "one run knows no spread"


@pytest.mark.parametrize("count", [8, 11, 12, 15, 30])
def test_the_bound_is_within_one_percent_of_students_for_any_number_of_runs(count: int) -> None:
    ratios = [1.2 * math.exp(0.05 * math.sin(7 * i)) for i in range(count)]
    logs = [math.log(ratio) for ratio in ratios]
    bound = stats.t.interval(0.95, count - 1, loc=sum(logs) / count, scale=stats.sem(logs))
    assert bench_speed.ratio_figures(ratios)["lower_95"] == pytest.approx(
        math.exp(bound[0]), rel=0.01
    )


@pytest.mark.parametrize("count", [1, 2, 4, 6, 41])
def test_a_run_of_four_prompts_sees_four_quarters_of_the_file(count: int) -> None:
    given = [bench_prompts.BenchPrompt(str(place)) for place in range(count)]
    mixed = bench_speed.mixed(given)
    assert sorted(mixed, key=lambda prompt: int(prompt.text)) == given
    assert mixed == bench_speed.mixed(given), "another order each time"
    borders = [quarter * count // 4 for quarter in range(1, 4)]
    for start in range(0, count // 4 * 4 - 3, 4):
        places = [int(prompt.text) for prompt in mixed[start : start + 4]]
        assert len({bisect.bisect(borders, place) for place in places}) == 4


def test_prompts_are_first_turns_prompts_or_last_messages(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "世界"}]
    rows = [{"turns": ["a", "b"], "prompt": "x"}, {"prompt": "c"}, {"messages": messages}]
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\nnot read any more\n")
    assert [prompt.text for prompt in bench_prompts.read_prompts(file, 3)] == ["a", "c", "世界"]
    assert [prompt.text for prompt in bench_prompts.read_prompts(file, 1)] == ["a"]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON", "5", '"turns"', "[]", "{}", '{"turns": []}', '{"turns": null}',
        '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"prompt": null}', '{"prompt": 5}',
    ],
)  # fmt: skip
def test_a_row_without_a_prompt_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(InputError) as caught:
        bench_prompts.read_prompts(file, 5)
    assert f"{file}, line 3" in str(caught.value)
    assert "'turns'" in str(caught.value.hint)


def test_a_file_without_prompts_or_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, content in {"empty": b"\n\n", "binary": b"\xff\xfe\x00"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("empty", "binary", "missing"):
        with pytest.raises(InputError) as caught:
            bench_prompts.read_prompts(tmp_path / name, 5)
        assert str(tmp_path / name) in str(caught.value)


def test_acceptance_counts_tokens_for_each_forward(prompts: Path, tiny_folder: Path) -> None:
    said: list[str] = []
    result = acceptance(
        prompts=prompts, model=str(tiny_folder), batch=2, limit=8, max_tokens=6,
        tree_sizes=[4, 1], device="cpu",
        progress=said.append,
    )  # fmt: skip
    assert [entry["tree_size"] for entry in result["by_tree_size"]] == [4, 1]
    assert len(said) == 4  # what begins and what came out, of each size
    for entry in result["by_tree_size"]:
        forwards, tokens = entry["decode_forwards"], entry["tokens"]
        assert entry["mean_acceptance_length"] == pytest.approx((tokens - 2) / forwards, abs=1e-4)
        assert sum(entry["acceptance_histogram"]) == forwards
        assert 2 <= tokens <= 12
    assert result["mean_acceptance_length"] == result["by_tree_size"][0]["mean_acceptance_length"]
    assert (result["prompt_count"], result["batch"], result["dtype"]) == (2, 2, "float32")
    assert {"python", "torch", "transformers"} <= set(result["versions"])
    json.dumps(result)


@pytest.mark.parametrize(("train_tokens", "taught"), [(0, 6), (2, 2), (9, 9)])
def test_prompts_to_learn_from_may_have_texts_of_another_length(
    prompts: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_tokens: int,
    taught: int,
) -> None:
    lengths: list[list[int]] = []

    def decode(engine: Engine, requests: list[Request]) -> tuple[list[Completion], float]:
        lengths.append([request.sampling.max_tokens for request in requests])
        return bench_runs.decode(engine, requests)

    monkeypatch.setattr(bench_acceptance, "decode", decode)
    result = acceptance(
        prompts=prompts, model=str(tiny_folder), batch=2, limit=8, max_tokens=6, tree_sizes=[4],
        device="cpu", train=prompts, train_tokens=train_tokens,
    )  # fmt: skip
    assert lengths == [[taught] * 2, [6] * 2]
    assert result["train_tokens"] == taught


def test_the_reference_drafts_every_row_from_its_matrix(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker drafts one row in 32 without it, to tell what it brings: that would dilute it."""
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say it {i} times."}) + "\n" for i in range(32)))
    reads: list[bool] = []
    begin = Engine._begin

    def noted(self: Engine, sequence: Any, task: Any) -> None:
        begin(self, sequence, task)
        reads.append(sequence.reads == sequence.task)

    monkeypatch.setattr(Engine, "_begin", noted)
    acceptance(
        prompts=file, model=str(tiny_folder), batch=8, limit=32, max_tokens=2, tree_sizes=[4],
        device="cpu", reference=True,
    )  # fmt: skip
    assert len(reads) == 64 and all(reads)


def test_prompts_to_learn_from_may_be_longer_and_are_counted(
    prompts: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    train, said = tmp_path / "train.jsonl", []
    long = [{"prompt": "again and again " * 20}, {"prompt": PROMPTS[1]}, {"prompt": "so " * 9000}]
    train.write_text("".join(json.dumps(row) + "\n" for row in long))
    settings = {"prompts": prompts, "model": str(tiny_folder), "max_tokens": 2, "tree_sizes": [4]}
    result = acceptance(**settings, device="cpu", train=train, progress=said.append)
    assert (result["train_prompts"], result["train_prompts_measured"]) == (2, 1)
    assert any("too long: 1 prompt of train.jsonl" in line for line in said)
    assert any("warning: 1 of train.jsonl are measured as well" in line for line in said)
    train.write_text(json.dumps(long[2]) + "\n")
    with pytest.raises(UsageError, match=r"no prompt of .*train.jsonl fits"):
        acceptance(**settings, device="cpu", train=train)


def test_acceptance_of_one_token_has_no_forward_and_says_so(
    prompts: Path, tiny_folder: Path
) -> None:
    result = acceptance(
        prompts=prompts, model=str(tiny_folder), batch=2, limit=1, max_tokens=1, tree_sizes=[1],
        device="cpu",
    )  # fmt: skip
    assert (result["tokens"], result["decode_forwards"]) == (1, 0)
    assert result["mean_acceptance_length"] is None


@pytest.mark.long
def test_acceptance_is_broken_down_and_compared(tmp_path: Path, own_costs: Path) -> None:
    file, train = tmp_path / "p.jsonl", tmp_path / "train.jsonl"
    rows = [{"prompt": text, "category": name} for text, name in zip(PROMPTS, "ab", strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.write_text(json.dumps(rows[0]) + "\n")
    settings = {"prompts": file, "batch": 2, "max_tokens": 24, "tree_sizes": [8], "device": "cpu"}
    cold = acceptance(**settings, reference=True, check=True)
    assert set(cold["by_category"]) == {"a", "b"}
    assert cold["different_from_plain"] == 0
    paper = cold["reference"]
    assert (paper["tree_size"], set(paper["by_category"])) == (80, {"a", "b"})
    warm = acceptance(**settings, train=train)
    forgot = acceptance(**settings, train=train, forget="rows")
    # What was decoded before is drafted at once.
    assert warm["by_category"]["a"] > cold["by_category"]["a"]
    assert warm["decode_forwards"] < forgot["decode_forwards"]
    assert acceptance(**settings, spine=False, orders=0)["spine"] is False


@pytest.mark.long
def test_speed_compares_three_ways_on_the_same_prompts(prompts: Path, own_costs: Path) -> None:
    result = trbatch_bench(
        "speed", "--prompts", str(prompts), "--batch", "1", "--max-tokens", "4", "--runs", "2",
        "--device", "cpu",
    )  # fmt: skip
    figures = by_batch(result)[1]
    assert set(figures["tokens_per_s"]) == {"generate", "plain", "recycling"}
    assert all(rate > 0 for rate in figures["tokens_per_s"].values())
    names = ("recycling_over_plain", "plain_over_generate", "recycling_over_generate")
    for name in names:
        # Of two runs the bound is far below: rounded, it may be 0.
        assert 0 <= figures[name]["lower_95"] <= figures[name]["median"]
    assert figures["mean_acceptance_length"] >= 1.0
    assert (result["runs"], result["max_tokens"]) == (2, 4)


@pytest.mark.long
def test_a_tree_of_80_nodes_accepts_2_2_tokens_a_forward_on_spec_bench(spec_bench: Path) -> None:
    result = trbatch_bench(
        "acceptance", "--prompts", str(spec_bench), "--batch", "8", "--limit", "16",
        "--max-tokens", "96", "--tree-size", "80",
    )  # fmt: skip
    assert (result["prompt_count"], result["tree_size"]) == (16, 80)
    assert result["mean_acceptance_length"] >= 2.2


@pytest.mark.long
@pytest.mark.alone
def test_recycling_is_quicker_than_plain_decoding_and_that_than_generate(
    spec_bench: Path, own_costs: Path
) -> None:
    speed = ("speed", "--prompts", str(spec_bench), "--batch", "1,8", "--device", "cpu")
    result = trbatch_bench(*speed, "--no-generate", "--max-tokens", "64", "--warm-up", "16")
    one, eight = by_batch(result)[1], by_batch(result)[8]
    assert result["runs"] == 7
    assert one["recycling_over_plain"]["median"] >= 1.15, one
    # A machine of few GFLOP/s has nothing to gain from drafts here: 1.0, give or take a bit.
    assert eight["recycling_over_plain"]["median"] >= 0.98, eight
    assert eight["recycling_over_plain"]["lower_95"] >= 0.95, eight
    result = trbatch_bench(*speed, "--runs", "2", "--max-tokens", "32", "--warm-up", "0")
    for figures in by_batch(result).values():
        # `generate` cannot take turns by the half second, so this ratio is as noisy as the machine.
        assert figures["plain_over_generate"]["median"] >= 0.95, figures
