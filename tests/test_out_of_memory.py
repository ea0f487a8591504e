"""When the device's memory does not suffice: fewer sequences, the same texts, seldom an error."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import tiny
import torch

from trbatch.config import EngineConfig
from trbatch.engine import engine as engine_module
from trbatch.engine import sizing
from trbatch.engine.costs import CostTable
from trbatch.engine.engine import Engine
from trbatch.engine.loading import loading
from trbatch.engine.model import CausalModel
from trbatch.engine.sequence import Completion
from trbatch.engine.step_plain import PlainOperations
from trbatch.errors import WorkerError

PROMPTS = tiny.repetitive(4, length=19, seed=4) + tiny.prompts(3, seed=5)
LENGTH = 24
on_both_paths = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


def engine(*, on_device: bool, **settings: Any) -> Engine:
    values = {"max_num_seqs": 6, "tree_size": 5, **settings}
    if on_device:
        values |= {"operations": PlainOperations(), "enforce_eager": True}
    return tiny.engine(tiny.loaded("llama"), **values)


def requests() -> list[Any]:
    return [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(PROMPTS)]


def assert_texts(done: dict[Any, Completion]) -> None:
    network = tiny.network("llama")
    assert [done[i].token_ids for i in range(len(PROMPTS))] == [
        tiny.generate(network, ids, LENGTH) for ids in PROMPTS
    ]
    for one in done.values():
        decoded, counts = one.completion_tokens - 1, one.acceptance_histogram
        assert sum((i + 1) * count for i, count in enumerate(counts)) <= decoded


def no_more() -> None:
    raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 TiB")


def limit_sequences(one: Engine, most: int, *, after: bool) -> None:
    """Let each decode step of more than `most` sequences fail, before it did anything or after."""
    if one._stepper is None:
        inner = one._eager._drafter

        def checked(*args: Any) -> Any:
            if len(args[0].sizes) > most and not after:
                no_more()
            out = accept(*args)
            if len(args[0].sizes) > most:
                no_more()
            return out

        name = "learn" if after else "accept"
        accept = getattr(inner, name)
        setattr(inner, name, checked)
        return
    step = one._stepper.operations.step

    def stepped(state: Any, batch: Any, size: int, **how: Any) -> Any:
        many = int((batch.rows >= 0).sum()) > most
        if many and not after:
            no_more()
        out = step(state, batch, size, **how)
        if many:
            no_more()
        return out

    one._stepper.operations.step = stepped  # type: ignore[method-assign]


@on_both_paths
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_fewer_sequences_run_together_and_say_the_same(
    on_device: bool, after: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one = engine(on_device=on_device)
    free = one._cache.pool.free
    limit_sequences(one, 2, after=after)
    with caplog.at_level("WARNING", logger="trbatch"):
        done = tiny.decode(one, requests())
    assert_texts(done)
    said = [record.getMessage() for record in caplog.records]
    # How many were running the first time depends on how their prompts came together.
    halves = [re.search(r"with (\d+) sequences, going on with at most (\d+)", one) for one in said]
    counts = [tuple(map(int, found.groups())) for found in halves if found]
    assert counts and len(counts) == len(said), said
    assert all(fewer == many // 2 for many, fewer in counts)
    assert counts[0][0] > 2 and counts[-1][1] <= 2 and "1 TiB" in said[-1]
    assert one._cache.pool.free == free


@on_both_paths
def test_a_row_that_does_not_fit_even_alone_is_an_error_and_the_others_run_on(
    on_device: bool,
) -> None:
    one = engine(on_device=on_device)
    prompt = list(range(3, 80))
    project = one._model.project

    def limited(tokens: Any, where: Any, keep: Any = None) -> Any:
        if any(span.committed + span.length > 70 for span in where):
            no_more()
        return project(tokens, where, keep)

    one._model.project = limited  # type: ignore[method-assign]
    rows = [*requests(), tiny.request(99, prompt, max_tokens=4)]
    done = tiny.decode(one, rows)
    failed = done.pop(99)
    assert (failed.finish_reason, failed.error_code) == ("error", "out_of_memory")
    assert "1 TiB" in failed.error_message and failed.token_ids == []
    assert_texts(done)


@on_both_paths
def test_pieces_of_prompts_shrink_too(on_device: bool) -> None:
    one = engine(on_device=on_device, recycle_prompts=False)
    project, sizes = one._model.project, []

    def limited(tokens: Any, where: Any, keep: Any = None) -> Any:
        if len(tokens) > 64:
            no_more()
        sizes.append(len(tokens))
        return project(tokens, where, keep)

    one._model.project = limited  # type: ignore[method-assign]
    row = tiny.request(0, tiny.repetitive(1, length=150, seed=2)[0], max_tokens=LENGTH)
    rows = [row, *[tiny.request(i, row.prompt_token_ids[i:], max_tokens=4) for i in (3, 5, 7)]]
    done = tiny.decode(one, rows)
    assert all(completion.error_code is None for completion in done.values())
    assert done[0].token_ids == tiny.generate(
        tiny.network("llama"), list(row.prompt_token_ids), LENGTH
    )


class Knot:
    """Tensors that hold each other: only the collector of cycles finds them."""

    alive: ClassVar[WeakSet[Knot]] = WeakSet()

    def __init__(self) -> None:
        self.itself = self
        self.alive.add(self)


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each time that the device's memory is given back, whether knots are gone before."""
    found: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(not Knot.alive))
    gc.disable()
    yield found
    gc.enable()


def test_what_a_failed_step_has_left_is_given_back(freed: list[bool]) -> None:
    one = engine(on_device=False)
    one.loaded = replace(one.loaded, device=torch.device("cuda"))
    learn = one._eager._drafter.learn

    def limited(*args: Any) -> Any:
        if len(args[0].sizes) > 2:
            Knot()
            no_more()
        return learn(*args)

    one._eager._drafter.learn = limited  # type: ignore[method-assign]
    assert_texts(tiny.decode(one, requests()))
    assert freed and all(freed)


def test_what_a_step_that_was_timed_has_left_is_given_back(freed: list[bool]) -> None:
    class Timer:
        longest = 8

        def fits(self, *_: int) -> bool:
            return True

        def __call__(self, *_: int) -> float:
            Knot()
            no_more()
            return 0.0

    careful = sizing._Careful(Timer(), torch.device("cuda"))
    assert careful(4, 8, 1) == float("inf") and careful.most_tokens == 16
    assert freed == [True]


class SmallDevice(PlainOperations):
    """A device with memory for the logits of so many tokens."""

    most_tokens = 24

    def step(self, state: Any, batch: Any, size: int, **how: Any) -> Any:
        if len(batch.rows) * size > self.most_tokens:
            no_more()
        return super().step(state, batch, size, **how)


def test_steps_that_are_too_large_to_be_timed_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(SmallDevice, "most_tokens", 10_000)
    settings = {"max_num_seqs": 4, "tree_size": 0, "max_tree_size": 16, "enforce_eager": True}
    tiny.engine(tiny.loaded("llama"), operations=SmallDevice(), **settings)
    (file,) = (tmp_path / "costs").iterdir()
    kept = file.read_text()
    for most_tokens in (24, 3):  # fewer than what a kept table is compared with, too
        caplog.clear()
        monkeypatch.setattr(SmallDevice, "most_tokens", most_tokens)
        if most_tokens == 24:
            file.unlink()
        else:
            file.write_text(kept)
        one = tiny.engine(tiny.loaded("llama"), operations=SmallDevice(), **settings)
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert said and all("while timing a step of" in line for line in said)
        most = one.budget._most_tokens
        assert f"with steps of {most} at most" in said[-1] and most <= most_tokens
        assert most_tokens == 3 or not file.exists(), "there may be more memory next time"
        caplog.clear()
        assert_texts(tiny.decode(one, requests()))
        assert (most_tokens == 24) == (not caplog.records)
        free = one._cache.pool.free + one._stepper.state.nowhere.numel()  # type: ignore[union-attr]
        assert free == one._cache.pool.pages


@pytest.mark.parametrize(("most_tokens", "rows"), [(10, 4), (2, 2)])
def test_steps_get_smaller_before_fewer_sequences_run_together(
    most_tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SmallDevice, "most_tokens", 10_000)
    timed = {(batch, size): 1.0 for batch in (1, 4) for size in (1, 16)}
    one = tiny.engine(
        tiny.loaded("llama"), operations=SmallDevice(), max_num_seqs=4, tree_size=0,
        max_tree_size=16, enforce_eager=True, costs=CostTable(timed, context=1, per_context=0.0),
    )  # fmt: skip
    monkeypatch.setattr(SmallDevice, "most_tokens", most_tokens)
    with caplog.at_level("WARNING", logger="trbatch"):
        assert_texts(tiny.decode(one, requests()))
    said = [record.getMessage() for record in caplog.records]
    shrinks = [line for line in said if "going on with steps of" in line]
    fewer = [line for line in said if "out of memory with" in line]
    assert shrinks and said == shrinks + fewer and bool(fewer) == (rows < 4)
    assert all("1 TiB" in line for line in said)
    assert one._scheduler.most == rows and one.budget._most_tokens <= most_tokens
    assert max(size for _, size in one.budget.steps) > 1, "what fits has drafts still"


def test_a_sequence_alone_gets_smaller_steps_before_it_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SmallDevice, "most_tokens", 10_000)
    timed = {(1, size): 1.0 for size in (1, 16)}
    one = tiny.engine(
        tiny.loaded("llama"), operations=SmallDevice(), max_num_seqs=1, tree_size=0,
        max_tree_size=16, enforce_eager=True, costs=CostTable(timed, context=1, per_context=0.0),
    )  # fmt: skip
    monkeypatch.setattr(SmallDevice, "most_tokens", 3)
    assert_texts(tiny.decode(one, requests()))
    assert one.budget._most_tokens <= 3


def test_the_hosts_steps_that_are_too_large_are_not_timed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    project = CausalModel.project

    def limited(self: CausalModel, tokens: Any, *rest: Any) -> Any:
        if len(tokens) > 24:
            no_more()
        return project(self, tokens, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CausalModel, "project", limited)
        one = engine(on_device=False, tree_size=0, max_tree_size=16)
    assert "out of memory while timing a step of" in caplog.text
    assert one._cache.pool.free == one._cache.pool.pages
    assert_texts(tiny.decode(one, requests()))


def test_a_device_without_memory_for_a_single_token_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(SmallDevice, "most_tokens", 0)
    with pytest.raises(WorkerError) as raised, loading("small"):
        tiny.engine(tiny.loaded("llama"), operations=SmallDevice(), enforce_eager=True)
    assert "--max-num-seqs" in (raised.value.hint or "")


GIB = 1 << 30


def slots_on_a_gpu(*, utilization: float = 1.0, each: int = 1024, **sizes: int) -> int:
    """Of so many bytes a token each: room for 4096 tokens, and for 128 that no sequence gets."""
    loaded: Any = SimpleNamespace(
        device=torch.device("cuda"), vocab_size=128_000, dtype=torch.bfloat16
    )
    config = EngineConfig(gpu_memory_utilization=utilization, page_size=16)
    reserve = sizing.logits_bytes(config, loaded, **sizes)
    return sizing.cache_slots(
        config, loaded, each, sequences=1 << 20, longest=4096, spare=121, reserve=reserve
    )


def test_the_cache_leaves_room_for_the_logits_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*_: Any) -> tuple[int, int]:
        return free, 24 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", told)
    a_token = 2 * 128_000 * 2  # bytes of its logits, twice
    free = 20 * GIB
    assert slots_on_a_gpu(sequences=128, most=81) == (free - 4096 * a_token) // 1024
    assert slots_on_a_gpu(sequences=512, most=1) == (free - 2048 * a_token) // 1024
    free = GIB
    assert slots_on_a_gpu(sequences=128, most=81) == free // 2 // 1024, "half of it at most"


def test_logits_take_no_room_from_the_one_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    free: list[int] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[-1], 8 * GIB))
    one = 4096 + 128
    for bytes_free, slots in ((1, 1), (1.001, 1), (1.5, 1), (2, 1), (4, 2)):
        free.append(int(bytes_free * one * 1024))
        assert slots_on_a_gpu(sequences=128, most=81) == slots * one


def test_too_little_memory_for_one_sequence_is_told_with_what_there_is_and_what_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6 * GIB, 20 * GIB))
    with pytest.raises(WorkerError, match=r"4224 tokens .* 4\.12 GiB, 2\.00 GiB") as raised:
        slots_on_a_gpu(sequences=128, most=81, utilization=0.8, each=1 << 20)
    for option in ("--max-model-len", "--max-num-seqs", "raise --gpu-memory-utilization"):
        assert option in (raised.value.hint or "")
    assert "--prefill-chunk" not in (raised.value.hint or ""), "it takes none of that room"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * GIB, 20 * GIB))
    with pytest.raises(WorkerError) as raised:
        slots_on_a_gpu(sequences=128, most=81, each=1 << 20)
    assert "utilization" not in (raised.value.hint or ""), "all of it is used already"


def test_the_cache_gets_what_matrices_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(name: str, make: Any) -> Any:
        def making(*args: Any, **more: Any) -> Any:
            made.append(name)
            return make(*args, **more)

        return making

    monkeypatch.setattr(engine_module, "Matrix", noted("matrix", engine_module.Matrix))
    monkeypatch.setattr(sizing, "cache_slots", noted("cache", sizing.cache_slots))
    assert_texts(tiny.decode(engine(on_device=False), requests()))
    assert made == ["matrix", "cache"]
