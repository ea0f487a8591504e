"""Speed by batch size: what is counted when, the least a step can take, and the picture."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_widen import GROUPED
from tiny_files import WORDS

from trbatch.config import EngineConfig
from trbatch.engine import bench_curve, bench_method, bench_speed
from trbatch.engine.bench_curve import curve
from trbatch.engine.bench_floor import Floor, copy_bandwidth, kv_bytes, weight_bytes
from trbatch.engine.bench_method import measure_speed
from trbatch.engine.bench_plot import check_png, save_png
from trbatch.engine.bench_window import Measured, measure
from trbatch.engine.shapes import SHAPES
from trbatch.engine.step_plain import PlainOperations
from trbatch.errors import InputError, UsageError


@pytest.fixture
def model(tiny_folder: Path) -> str:
    return str(tiny_folder)


def prompts_file(tmp_path: Path, count: int) -> Path:
    draw = random.Random(0)
    file = tmp_path / f"{count}.jsonl"
    rows = [{"prompt": " ".join(draw.choices(WORDS, k=draw.randint(4, 9)))} for _ in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(model: str, prompts: Path, **changes: Any) -> dict[str, Any]:
    return {
        "prompts": prompts, "model": model, "device": "cpu", "batches": [1, 3], "max_tokens": 12,
        "warm_up": 3, **changes,
    }  # fmt: skip


def test_the_curve_has_speeds_steps_floor_and_tail_of_each_batch(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_trees(*, speculate: bool, **others: Any) -> EngineConfig:
        """Trees of five nodes, which the budget might not choose for so small a model."""
        size = {"tree_size": 5} if speculate else {}
        return EngineConfig(**{**others, "speculate": speculate, **size})

    monkeypatch.setattr(bench_curve, "EngineConfig", with_trees)
    said: list[str] = []
    result = curve(**settings(model, prompts_file(tmp_path, 20)), progress=said.append)
    json.dumps(result)
    assert (result["method"], result["prompt_count"], result["warm_up"]) == ("curve", 12, 3)
    assert [row["batch"] for row in result["by_batch"]] == [1, 3]
    for row in result["by_batch"]:
        plain, recycled = row["plain_tokens_per_s"], row["recycled_tokens_per_s"]
        assert row["recycled_over_plain"] == pytest.approx(recycled / plain, rel=1e-3)
        assert row["generate_tokens_per_s"] > 0
        assert row["generate_batch"] == row["batch"]
        assert row["acceptance"] >= 1.0
        assert row["prompts"] == {1: 8, 3: 12}[row["batch"]]
    steps = {(step["batch"], step["decoding"]): step for step in result["steps"]}
    for (batch, decoding), step in steps.items():
        assert step["slots"] == batch
        assert step["over_floor"] == pytest.approx(step["step_ms"] / step["floor_ms"], rel=0.05)
        assert set(step["steps_by_size"]) == ({"1"} if decoding == "plain" else {"5"})
    assert steps[3, "plain"]["timed_steps"] >= 4
    # Of eight prompts one after the other, each gives its first token in its prefill.
    alone = steps[1, "plain"]
    assert (alone["steps_by_size"], alone["tail_s"]) == ({"1": 8 * 11}, 0.0)
    assert 0 < alone["timed_steps"] <= 8 * 11
    assert 6 < alone["context"] < 11 + 12
    assert sum("batch" in line for line in said) == 2


def test_a_widened_model_is_called_so_and_timed_beside_random_weights(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "grouped", GROUPED)
    png = tmp_path / "curve.png"
    wanted = settings(model, prompts_file(tmp_path, 12), batches=[2], as_shape="grouped")
    result = curve(**wanted, png=png, generate=False)
    assert result["model"] == f"{model} as grouped shape"
    assert (result["as_shape"]["hidden"], result["vocab"]) == (96, 150)
    layer = 96 * (2 * (12 + 4) * 16 + 3 * 80) + 2 * 96
    weights = 4 * (3 * layer + 150 * 96 + 96)  # float32, without the input embedding
    assert result["weights_read_gb"] == round(weights / 1e9, 3)
    row = result["by_batch"][0]
    assert row["plain_random_over_wide"] > 0
    assert row["counted_over_plain"] > 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert row["generate_tokens_per_s"] is None


@pytest.mark.parametrize(
    ("plain", "recycled", "counted"),
    [(1.0, 1.02, 2.0), (1.10, 1.0, 2.2), (1.0, 1.25, 1.6), (1.1, 1.1, 2.0), (None, 1.25, 1.6)],
)
def test_random_weights_count_where_they_are_more_than_three_percent_slower(
    plain: float | None, recycled: float, counted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter([plain, recycled])
    wide = SimpleNamespace(step_s=1.0, step_s_of=lambda size: 1.0)
    bench = object.__new__(bench_curve._Bench)
    bench._measured, bench._progress = {8: (wide, wide)}, lambda _: None  # type: ignore[dict-item]

    def timed(*_: Any, **__: Any) -> Any:
        seconds = next(steps)
        return SimpleNamespace(step_s=seconds, step_s_of=lambda size: seconds)

    monkeypatch.setattr(bench, "_decode", timed, raising=False)
    rows: list[dict[str, Any]] = [{"batch": 8, "usual_size": 4, "recycled_over_plain": 2.0}]
    bench.compare(lambda: None, rows)
    assert rows[0]["counted_over_plain"] == pytest.approx(counted)


def test_too_few_distinct_prompts_are_told_before_anything_is_decoded(
    model: str, tmp_path: Path
) -> None:
    file = prompts_file(tmp_path, 10)
    file.write_text(file.read_text() * 3)  # the same ones again do not count
    with pytest.raises(InputError, match="10 distinct short prompts; 15 are needed") as caught:
        curve(**settings(model, file))
    assert "make_prompts.py" in str(caught.value.hint)


class ScriptedEngine:
    """Takes two requests at once; each needs a call for its prefill, then three more."""

    capacity = 2
    config = SimpleNamespace(prefill_chunk=4)

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.running: dict[int, int] = {}
        self.tokens = self.steps = 0

    def add(self, request: Any) -> None:
        self.waiting.append(request)

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def stats(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "tree_sizes": {1: self.steps} if self.steps else {}}

    def step(self) -> list[Any]:
        if self.waiting and len(self.running) < self.capacity:
            fresh = self.capacity - len(self.running)
            for request in self.waiting[:fresh]:
                self.running[request] = 3
                self.tokens += 1
            del self.waiting[:fresh]
            return []
        self.steps += 1
        self.tokens += len(self.running)
        self.running = {key: left - 1 for key, left in self.running.items()}
        done = [key for key, left in self.running.items() if left == 0]
        for key in done:
            del self.running[key]
        return [
            SimpleNamespace(
                key=key, finish_reason="length", completion_tokens=4, prompt_tokens=4,
                num_spec_steps=3,
            )
            for key in done
        ]  # fmt: skip


def test_only_calls_without_prefill_are_timed_and_the_tail_is_told_apart() -> None:
    engine: Any = ScriptedEngine()
    measured = measure(engine, list(range(5)), [4] * 5)  # type: ignore[arg-type]
    # Two and two and the last alone, of three steps each.
    assert (measured.full.tokens, measured.tail.tokens) == (16, 4)
    assert measured.steps == {1: 6}
    # Eight tokens of prompts and four more for what may be read late: three calls, one a step.
    assert measured.timed == len(measured.seconds.get(1, [])) == 2
    assert measured.step_s is None, "of two calls no mean is taken"
    assert (measured.acceptance, measured.usual_size) == (1.0, 1)
    assert measured.contexts == [7.0, 7.0], "a prompt of four and three tokens before the last"
    assert [one.key for one in measured.done] == list(range(5))


def test_a_step_takes_the_mean_of_the_medians_of_its_sizes() -> None:
    measured = Measured(slots=1)
    measured.seconds = {1: [1.0] * 5 + [90.0], 4: [2.0] * 18, 8: [70.0]}
    assert measured.step_s_of(1) == 1.0, "one of them was captured"
    assert measured.step_s_of(8) is None, "one is too few"
    assert measured.step_s == pytest.approx((6 * 1.0 + 18 * 2.0) / 24)
    assert measured.timed == 25


@pytest.mark.parametrize("late", [False, True])
def test_all_tokens_of_a_real_engine_are_counted_once(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    ids = tiny.prompts(9, seed=2)
    requests = [tiny.request(i, prompt, max_tokens=20) for i, prompt in enumerate(ids)]
    how = {"operations": PlainOperations(), "enforce_eager": True} if late else {}
    for size in (4, 1):
        engine = tiny.engine(tiny.loaded("llama"), max_num_seqs=2, tree_size=size, **how)
        measured = measure(engine, requests, [len(prompt) for prompt in ids])
        assert measured.full.tokens + measured.tail.tokens == 9 * 20
        assert measured.tail.tokens > 0
        assert 0 < measured.timed <= measured.steps.total() <= engine.stats()["forwards"]
        assert measured.usual_size == size
        assert len(measured.contexts) == measured.timed
        assert 0 < measured.context < 40 + 20
        assert measured.acceptance == pytest.approx(
            sum(c.completion_tokens - 1 for c in measured.done)
            / sum(c.num_spec_steps for c in measured.done)
        )


@pytest.mark.parametrize("tied", [True, False])
def test_the_floor_is_weights_without_the_input_embedding_and_the_cache(tied: bool) -> None:
    loaded = tiny.loaded("llama", tie_word_embeddings=tied)
    network = tiny.network("llama", tie_word_embeddings=tied)
    count = sum(weight.numel() for weight in network.parameters())
    if not tied:
        count -= tiny.VOCAB * 32
    assert weight_bytes(loaded) == 4 * count
    assert kv_bytes(loaded) == 2 * 2 * (2 * 8) * 4  # K and V, layers, heads of 8, float32
    floor = Floor(weights=1000, kv=10, bandwidth=2000.0)
    assert floor.seconds(batch=5, context=20.0) == 1.0


def test_copying_memory_is_timed_on_this_machine() -> None:
    rate = copy_bandwidth(torch.device(tiny.DEVICE))
    assert 1e8 < rate < 1e13


@pytest.mark.parametrize(
    ("method", "asked", "chosen"),
    [
        ("auto", {}, "turns"),
        ("turns", {}, "turns"),
        ("curve", {}, "curve"),
        ("auto", {"as_shape": "llama-8b"}, "curve"),
        ("auto", {"png": Path("a.png")}, "curve"),
    ],
)
def test_a_cpu_takes_turns_unless_a_curve_is_asked_for(
    method: str, asked: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    for name, kind in (("speed", "turns"), ("curve", "curve")):
        monkeypatch.setattr(
            bench_method, name, lambda kind=kind, **settings: calls.append((kind, settings)) or {}
        )
    common: dict[str, Any] = {"as_shape": None, "png": None, **asked}
    measure_speed(
        method, device="cpu", batches=None, runs=7, random_weights=True, max_tokens=9, **common
    )
    assert [kind for kind, _ in calls] == [chosen]
    assert tuple(calls[0][1]["batches"]) == (1, 8)
    assert calls[0][1]["max_tokens"] == 9


@pytest.mark.parametrize("asked", [{"as_shape": "llama-8b"}, {"png": Path("a.png")}])
def test_turns_have_neither_shape_nor_picture(asked: dict[str, Any]) -> None:
    common: dict[str, Any] = {"as_shape": None, "png": None, **asked}
    with pytest.raises(UsageError, match="--method turns"):
        measure_speed(
            "turns", device="cpu", batches=None, runs=7, random_weights=True, **common
        )  # fmt: skip


def test_turns_can_leave_generate_out(model: str, tmp_path: Path) -> None:
    result = bench_speed.speed(
        **settings(model, prompts_file(tmp_path, 20), batches=[2], runs=2, generate=False)
    )
    row = result["by_batch"][0]
    assert set(row["tokens_per_s"]) == {"plain", "recycling"}
    assert "recycling_over_plain" in row
    assert not any("generate" in name for name in row)


def test_the_picture_has_every_line_and_says_what_was_measured(tmp_path: Path) -> None:
    rows = [
        {
            "batch": batch, "plain_tokens_per_s": 100.0 * batch, "generate_tokens_per_s": None,
            "recycled_tokens_per_s": 200.0 * batch, "recycled_over_plain": 2.0, **more,
        }
        for batch in (1, 8)
        for more in ({"counted_over_plain": 1.9},)
    ]  # fmt: skip
    result = {"model": "m", "dtype": "bfloat16", "machine": "GPU", "by_batch": rows}
    save_png(result, tmp_path / "a.png")
    for row in rows:
        del row["counted_over_plain"]
    save_png(result, tmp_path / "b.png")
    one, other = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert one.startswith(b"\x89PNG")
    assert one != other


def test_what_keeps_a_picture_from_being_made_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"must end in \.png"):
        check_png(tmp_path / "curve.jpg")
    with pytest.raises(UsageError, match="there is no folder"):
        check_png(tmp_path / "nowhere" / "curve.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="matplotlib") as caught:
        curve(prompts=tmp_path / "none.jsonl", png=tmp_path / "curve.png")
    assert caught.value.hint == "pip install 'trbatch[bench]'"
