"""Captured work: what cannot be captured is launched, what fails for lack of memory is tried again.

Without a GPU, also where there is one: graphs are stand-ins that run their work anew.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import tiny
import torch

from trbatch.engine import step_shapes
from trbatch.engine.captured import Graphs, Replay
from trbatch.engine.costs import CostTable
from trbatch.engine.sampling import Kind
from trbatch.engine.step_plain import PlainOperations
from trbatch.engine.step_shapes import Key, StepShapes

FULL = "CUDA out of memory. Tried to allocate 1.96 GiB"
FORBIDDEN = "CUDA error: operation not permitted when stream is capturing"
BROKEN_OFF = "CUDA error: operation failed due to a previous error during capture"


class Cuda:
    """Stand-ins for what captures need of `torch.cuda`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.capturing = False
        self.end_fails = ""  # what the end of a capture says that something failed in
        self.pools: list[Any] = []  # of the captures, in their order
        self.graphs: list[weakref.ref[_Graph]] = []  # theirs
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(torch.cuda, "CUDAGraph", _Graph)
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        patch.setattr(torch.cuda, "graph", self.capture)
        patch.setattr(tiny, "DEVICE", "cpu")  # a real one would be handed streams that are none

    def capture(self, graph: Any, *, pool: Any, capture_error_mode: str) -> _Capture:
        others = [
            there() for one, there in zip(self.pools, self.graphs, strict=True) if one is pool
        ]
        assert not others or any(others), "a pool ends with the last graph in it"
        self.pools.append(pool)
        self.graphs.append(weakref.ref(graph))
        return _Capture(self)


class _Capture:
    """A class, as torch's is. Through a generator an error and contextlib's frame would hold each
    other, from Python 3.12 on, and so hold what the work held."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def __enter__(self) -> None:
        self.cuda.capturing = True

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.cuda.capturing = False
        if kind is not None and self.cuda.end_fails:
            raise torch.AcceleratorError(self.cuda.end_fails)


class _Stream:
    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


class _Graph:
    again: Callable[[], None]

    def replay(self) -> None:
        self.again()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def recording(cuda: Cuda, error: RuntimeError) -> tuple[Graphs, Callable[[], Replay[int]]]:
    """Graphs, and what captures work that fails with this error when it is captured."""
    graphs = Graphs(torch.device("cpu"), wanted=True)

    def work() -> int:
        if cuda.capturing:
            raise error
        return 5

    return graphs, lambda: graphs.record(work, what="a step")


@pytest.mark.parametrize("end_fails", ["", BROKEN_OFF])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture"),
        torch.AcceleratorError(f"{FORBIDDEN}\nCompile with `TORCH_USE_CUDA_DSA`"),
    ],
)  # fmt: skip
def test_work_that_cannot_be_captured_is_launched_from_then_on(
    cuda: Cuda, error: RuntimeError, end_fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.end_fails = end_fails
    graphs, record = recording(cuda, error)
    replay = record()
    assert replay.graph is None and replay.run() == 5 and not graphs.wanted
    assert "cannot be captured, they are launched: " in caplog.text
    assert "TORCH_USE" not in caplog.text
    assert graphs.record(lambda: 1, what="another").graph is None


@pytest.mark.parametrize("end_fails", ["", BROKEN_OFF])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(FULL), torch.AcceleratorError("CUDA error: out of memory\nSearch for")],
)
def test_memory_that_runs_out_in_a_capture_is_told_and_the_next_one_is_captured(
    cuda: Cuda, error: RuntimeError, end_fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.end_fails = end_fails
    graphs, record = recording(cuda, error)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        record()
    assert graphs.wanted and not caplog.records
    for _ in range(2):
        assert graphs.record(lambda: 1, what="a smaller one").graph is not None
    failed, first, second = cuda.pools
    assert first is second and first is not failed, "a pool lives as long as a graph that has it"


def test_graphs_that_nobody_keeps_do_not_end_the_memory_that_others_will_share(cuda: Cuda) -> None:
    graphs = Graphs(torch.device("cpu"), wanted=True)
    for _ in range(3):
        assert graphs.record(lambda: 1, what="a prefill").graph is not None
        gc.collect()


@pytest.mark.parametrize("end_fails", ["", BROKEN_OFF])
def test_a_device_that_fails_in_a_capture_is_not_the_models_fault(
    cuda: Cuda, end_fails: str
) -> None:
    cuda.end_fails = end_fails
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    graphs, record = recording(cuda, error)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        record()
    assert graphs.wanted


@pytest.mark.parametrize("end_fails", ["", BROKEN_OFF])
@pytest.mark.parametrize(
    ("kind", "said"),
    [(torch.OutOfMemoryError, FULL), (torch.AcceleratorError, "CUDA error: out of memory")],
)
def test_what_a_failed_capture_held_is_free_as_soon_as_its_error_is_handled(
    cuda: Cuda, kind: type[RuntimeError], said: str, end_fails: str
) -> None:
    cuda.end_fails = end_fails
    graphs, held = Graphs(torch.device("cpu"), wanted=True), []

    def work() -> None:
        logits = torch.zeros(4)
        held.append(weakref.ref(logits))
        if cuda.capturing:
            raise kind(said)

    gc.disable()
    try:
        with suppress(torch.OutOfMemoryError):
            graphs.record(work, what="a step")
        assert [reference() for reference in held] == [None] * 3
    finally:
        gc.enable()


class Captured(PlainOperations):
    """Steps that are captured; of prompts, nothing is."""

    captures = True


def limit_captures(cuda: Cuda, patch: pytest.MonkeyPatch, *, rows: int, prompt: int = 512) -> None:
    """Let memory suffice for steps of so many rows and for so many tokens of prompts at once."""
    record = Graphs.record

    def recorded(self: Graphs, work: Any, *, what: str) -> Any:
        if not what.startswith("a step"):
            if int(what.split()[-2]) > prompt:
                raise torch.OutOfMemoryError(FULL)
            return Replay(work)

        def limited() -> Any:
            if cuda.capturing and len(work.args[1].rows) > rows:
                raise torch.OutOfMemoryError(FULL)
            return work()

        replay = record(self, limited, what=what)
        if replay.graph is not None:
            given: Any = replay.given
            replay.graph.again = lambda: given.report.copy_(work().report)
        return replay

    patch.setattr(Graphs, "record", recorded)


def engine(patch: pytest.MonkeyPatch) -> Any:
    timed = {(batch, size): 1.0 for batch in (1, 6) for size in (1, 5)}
    costs = CostTable(timed, context=1, per_context=0.0)
    one = tiny.engine(
        tiny.loaded("llama"), operations=Captured(), max_num_seqs=6, tree_size=5, costs=costs
    )
    patch.setattr(one._stepper, "wait", lambda: None)
    return one


def assert_texts(one: Any, prompts: list[list[int]]) -> None:
    length = 16
    done = tiny.decode(
        one, [tiny.request(i, ids, max_tokens=length) for i, ids in enumerate(prompts)]
    )
    network = tiny.network("llama")
    for key, ids in enumerate(prompts):
        assert done[key].token_ids == tiny.generate(network, ids, length)


def test_fewer_rows_run_together_when_memory_runs_out_in_a_capture_and_are_captured(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit_captures(cuda, monkeypatch, rows=2)
    one = engine(monkeypatch)
    free = one._cache.pool.free
    with caplog.at_level("WARNING", logger="trbatch"):
        assert_texts(one, tiny.repetitive(3, length=19, seed=4) + tiny.prompts(3, seed=5))
    said = [record.getMessage() for record in caplog.records]
    assert said and all("out of memory with" in line and FULL in line for line in said)
    shapes = one._stepper.shapes.made
    assert one._stepper.graphs.wanted and shapes
    assert all(shape.replay.graph is not None for shape in shapes.values())
    assert max(bucket for bucket, *_ in shapes) <= 2
    assert one._cache.pool.free == free


def test_prompts_come_in_smaller_pieces_when_memory_runs_out_in_their_capture(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit_captures(cuda, monkeypatch, rows=6, prompt=128)
    with caplog.at_level("WARNING", logger="trbatch"):
        one = engine(monkeypatch)
        assert "out of memory while prefills of 256 tokens were captured" in caplog.text
        assert_texts(one, [*tiny.repetitive(1, length=190, seed=2), *tiny.prompts(2, seed=5)])
    assert "going on with pieces of 128 tokens" in caplog.text
    assert one._stepper.graphs.wanted and one._stepper.shapes.made


def test_what_others_prompts_have_kept_comes_in_pieces_as_small_as_prompts_do(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit_captures(cuda, monkeypatch, rows=6, prompt=128)
    one = engine(monkeypatch)
    prefix = tiny.repetitive(1, length=190, seed=2)[0]
    assert_texts(one, [prefix])  # and pieces are of 128 tokens from here on
    hits, told = one.stats()["prefix_hit_tokens"], len(caplog.records)
    assert_texts(one, [[*prefix, *ids] for ids in tiny.prompts(3, seed=5)])
    assert one.stats()["prefix_hit_tokens"] - hits > 2 * 128
    assert not [record.getMessage() for record in caplog.records[told:]]


def test_a_few_steps_of_few_rows_are_made_by_a_shape_for_more(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end one after the other need no shape for each number; who goes on long does."""
    limit_captures(cuda, monkeypatch, rows=6)
    one = engine(monkeypatch)
    prompts = [*tiny.repetitive(2, length=19, seed=4), *tiny.prompts(4, seed=5)]
    lengths = [8, 12, 16, 20, 24, 30]
    done = tiny.decode(
        one,
        [
            tiny.request(i, ids, max_tokens=length)
            for i, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
        ],
    )
    network = tiny.network("llama")
    for key, (ids, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert done[key].token_ids == tiny.generate(network, ids, length)
    shapes = one._stepper.shapes
    assert {rows for rows, *_ in shapes.made} == {6, 2}, "4 of 6, 1 of 2, but not 2 of 6"
    assert {rows for (rows, *_), steps in shapes.lent.items() if steps} == {1, 4}
    monkeypatch.setattr(step_shapes, "WORTH_A_SHAPE", 2)
    assert_texts(one, prompts[:1])
    assert {rows for rows, *_ in shapes.made} == {6, 2, 1}


@pytest.mark.parametrize(("least", "lent"), [(1, True), (2, False)])
def test_plain_steps_that_others_are_compared_with_have_shapes_of_their_own(
    least: int, lent: bool
) -> None:
    shapes = StepShapes(lambda key: key, lending=True, least=least)  # type: ignore[arg-type,return-value]
    large, small = (Key(rows, 1, Kind.GREEDY) for rows in (8, 4))
    shapes.take(large)
    assert shapes.take(small) == (large if lent else small, lent)
    shapes.take(Key(8, 5, Kind.GREEDY))
    assert shapes.take(Key(4, 5, Kind.GREEDY)) == (Key(8, 5, Kind.GREEDY), True)
    assert shapes.take(Key(4, 5, Kind.SAMPLED)) == (Key(4, 5, Kind.SAMPLED), False)
