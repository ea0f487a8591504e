"""The kernels that draft, and count what came true, and their slow twins.

Where there is no GPU they run in Triton's interpreter; where there is one, compiled on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_devices import on_every_device
from random_drafts import PATH, SLOTS, TASKS, case, random_answers
from torch import Tensor

from trbatch.engine import best_first, drafting, verify
from trbatch.engine.calibration import PLACES, Calibration
from trbatch.engine.device_state import NO_RANK
from trbatch.engine.gpu_attention import pack_bits
from trbatch.engine.kernels.draft import Trees


def check(found: Trees, wanted: drafting.Draft, chances: Tensor) -> None:
    """All of every tree, and what stands where there is no node."""
    width, size = wanted.tokens.shape[1], found.tokens.shape[1]
    assert found.sizes.tolist() == wanted.sizes
    for name, absent in (("tokens", -1), ("parents", 0), ("depths", 0), ("contexts", -1)):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert torch.equal(mine[:, :width], theirs), name
        assert (mine[:, width:] == absent).all(), name
    assert torch.equal(found.chances, chances)
    seen = torch.eye(size, dtype=torch.bool, device=chances.device)
    seen[:, 0] = True
    seen = seen.repeat(len(wanted.sizes), 1, 1)
    seen[:, :width, :width] = wanted.ancestors
    assert torch.equal(found.ancestors, pack_bits(seen))


def check_roots(found: Trees, last: Tensor) -> None:
    """Trees of nothing but a root."""
    size = found.tokens.shape[1]
    for row, context in enumerate(last.tolist()):
        assert found.tokens[row].tolist() == [context[0]] + [-1] * (size - 1)
        assert found.contexts[row, 0].tolist() == context
        assert found.chances[row].tolist() == [1.0] + [0.0] * (size - 1)
        assert not found.parents[row].any()
        assert not found.depths[row].any()
        assert found.ancestors[row, :, 0].tolist() == [1 | 1 << node for node in range(size)]
    assert found.sizes.tolist() == [1] * len(last)


def rows_of(found: Trees, rows: Tensor) -> Trees:
    """The trees of some sequences."""
    return replace(found, **{f.name: getattr(found, f.name)[rows] for f in fields(found)})


@on_every_device
@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, SLOTS),
    size=st.sampled_from([2, 3, 4, 9, 16, 33]),
    tables=st.fixed_dictionaries(
        {
            "spines": st.booleans(),
            "orders": st.integers(0, 3),  # orders 0 and task_orders 1: the paper's one matrix
            "task_orders": st.integers(1, 2),
            "k": st.sampled_from([1, 4, 5, 8]),
            "rows": st.sampled_from([12, 150]),  # few: most rows are missing
        }
    ),
)
def test_trees_equal_those_of_the_twin(
    seed: int, batch: int, size: int, tables: dict[str, Any], device: str
) -> None:
    these = case(seed, batch, device, **tables)
    check(these.drafted(size), *these.twin(size))


@on_every_device
@pytest.mark.parametrize(("size", "width"), [(81, 32), (20, 2), (20, 3), (300, 32), (400, 32)])
def test_large_and_narrow_trees_equal_those_of_the_twin(size: int, width: int, device: str) -> None:
    these = case(size, 2, device)
    found = these.drafted(size, width)
    check(found, *these.twin(size, width))
    assert size == 400 or found.sizes.tolist() == [size, size], "the case is too poor"


@on_every_device
def test_what_is_not_known_is_not_drafted(device: str) -> None:
    """Nothing to draft from at all; a chain alone."""
    these = case(1, 3, device, spines=False)
    these.matrix.keys.fill_(-2)
    these.matrix.pair_keys.fill_(-2)
    these.matrix.shared.fill_(-1)
    these.matrix.bigrams.fill_(-1)
    found = these.drafted(9)
    check(found, *these.twin(9))
    check_roots(found, these.last)
    these.ahead.tokens.fill_(3)
    these.ahead.matched.fill_(5)
    these.calibration.chances.fill_(0.5)
    found = these.drafted(33)
    check(found, *these.twin(33))
    assert found.sizes.tolist() == [1 + best_first.MAX_DEPTH] * 3


@on_every_device
def test_a_sequence_that_is_not_active_gets_its_root_alone(device: str) -> None:
    these = case(4, 5, device)
    these.active[[1, 3, 4]] = False
    these.slots[1] = these.tasks[1] = -1  # padding
    these.slots[4], these.tasks[4] = 1 << 30, 1 << 20  # or anything
    found = these.drafted(9)
    running = these.active.nonzero()[:, 0]
    check(rows_of(found, running), *these.only(running).twin(9))
    check_roots(rows_of(found, ~these.active), these.last[~these.active])


@on_every_device
def test_of_equal_chances_the_first_is_taken(device: str) -> None:
    these = case(5, 5, device)
    these.calibration.chances.fill_(0.25)
    check(these.drafted(33), *these.twin(33))


@on_every_device
def test_chances_too_small_to_count_are_none(device: str) -> None:
    """Products that become denormal, and then 0, a few levels down."""
    these = case(6, 5, device)
    these.calibration.chances.mul_(1e-10)
    found = these.drafted(130)
    check(found, *these.twin(130))
    assert (found.chances[found.tokens >= 0] < 1e-38).any(), "the case is too tame"


class Paths:
    """Room for accepted paths as `kernels.accept` reports them: tokens behind other numbers."""

    def __init__(self, batch: int, device: str) -> None:
        self.nodes = torch.full((batch, PATH), -1, dtype=torch.int32, device=device)
        report = torch.full((batch, 3 + 2 * PATH), 7, dtype=torch.int32, device=device)
        self.truths, self.ranks = report[:, 3 : 3 + PATH], report[:, 3 + PATH :]

    def put(self, verdict: verify.Verdict) -> None:
        width = verdict.nodes.shape[1]
        for mine, theirs in ((self.nodes, verdict.nodes), (self.truths, verdict.tokens)):
            mine.fill_(-1)
            mine[:, :width] = theirs
        self.ranks.fill_(NO_RANK)

    def found(self) -> list[list[int]]:
        """The ranks that were looked for."""
        return [[rank for rank in row if rank != NO_RANK] for row in self.ranks.tolist()]


def no_counts(device: str) -> Tensor:
    return torch.zeros(TASKS, 2, PLACES, dtype=torch.int32, device=device)


@on_every_device
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, SLOTS),
    spines=st.booleans(),
    k=st.sampled_from([4, 8]),
)
def test_what_came_true_is_counted_as_by_the_twin(
    seed: int, batch: int, spines: bool, k: int, device: str
) -> None:
    these = case(seed, batch, device, spines=spines, k=k)
    drafted, _ = these.twin(33)
    verdict = verify.accept(drafted, random_answers(drafted, seed))
    if spines:  # they come true for a while
        for row, came in enumerate(verdict.tokens):
            long = (seed + row) % 5
            these.ahead.tokens[row, : len(came[:long])] = came[:long]
    paths, fresh = Paths(batch, device), no_counts(device)
    paths.put(verdict)
    these.calibrate(fresh, drafted, paths.nodes, paths.truths, paths.ranks)
    wanted, ranks = these.counted(drafted, verdict)
    assert torch.equal(fresh.cpu(), wanted.cpu())
    assert paths.found() == ranks


@on_every_device
def test_only_active_sequences_are_counted(device: str) -> None:
    these = case(2, 3, device)
    drafted, _ = these.twin(9)
    verdict = verify.accept(drafted, random_answers(drafted, 2))
    fresh, paths = no_counts(device), Paths(3, device)
    paths.put(verdict)
    these.active[:] = torch.tensor([False, True, False])
    wanted, ranks = these.only(these.active).counted(*some_of(drafted, verdict, these.active))
    these.slots[0] = these.tasks[0] = -1
    these.slots[2], these.tasks[2] = 1 << 30, 1 << 20
    these.calibrate(fresh, drafted, paths.nodes, paths.truths, paths.ranks)
    assert fresh.any()
    assert torch.equal(fresh.cpu(), wanted.cpu())
    assert paths.found() == [[], *ranks, []]


def some_of(
    drafted: drafting.Draft, verdict: verify.Verdict, rows: Tensor
) -> tuple[drafting.Draft, verify.Verdict]:
    """Of some sequences."""
    kept = {f.name: getattr(drafted, f.name) for f in fields(drafted)}
    kept = {name: value[rows] for name, value in kept.items() if name != "sizes"}
    sizes = [size for size, wanted in zip(drafted.sizes, rows.tolist(), strict=True) if wanted]
    return drafting.Draft(**kept, sizes=sizes), verify.Verdict(
        verdict.nodes[rows], verdict.tokens[rows], verdict.on_path[rows]
    )


def repeatable(call: Callable[[], None], device: str) -> Callable[[], None]:
    """The same launches again over the same tensors; on a GPU as a graph."""
    if device == "cpu":
        return call
    call()  # compiled here, not while it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@on_every_device
def test_launches_are_repeated_over_the_same_tensors(device: str) -> None:
    """Nothing remains of the step before, whatever it was."""
    batch, size = 5, 17
    these, out, paths = case(0, batch, device), Trees.empty(batch, size, device), Paths(5, device)
    fresh, wanted = no_counts(device), no_counts("cpu")
    draws = repeatable(lambda: these.draft(out), device)
    counts = repeatable(
        lambda: these.calibrate(fresh, out, paths.nodes, paths.truths, paths.ranks), device
    )
    fresh.zero_()
    for seed in range(3):
        these.become(case(seed, batch, device, spines=seed != 2))
        these.active[seed] = False
        these.slots[seed] = -1
        draws()
        on = these.active.nonzero()[:, 0]
        running = these.only(on)
        drafted, chances = running.twin(size)
        check(rows_of(out, on), drafted, chances)
        check_roots(rows_of(out, ~these.active), these.last[~these.active])
        verdict = verify.accept(drafted, random_answers(drafted, seed))
        missing = torch.full((batch, verdict.nodes.shape[1]), -1, device=device)
        paths.put(verify.Verdict(
            missing.index_copy(0, on, verdict.nodes), missing.index_copy(0, on, verdict.tokens),
            verdict.on_path,
        ))  # fmt: skip
        counts()
        wanted += running.counted(drafted, verdict)[0].cpu()
        assert torch.equal(fresh.cpu(), wanted)
    assert wanted[:, 0].sum() > 10


def test_counts_of_one_step_are_absorbed_as_if_counted_here() -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = (Calibration(TASKS, torch.device("cpu")) for _ in range(2))
    for _ in range(6):
        places = torch.randint(0, TASKS * PLACES, (5000,), generator=generator)
        true = torch.rand(5000, generator=generator) < 0.3
        fresh = torch.stack(
            [p.bincount(minlength=TASKS * PLACES) for p in (places[true], places)]
        ).view(2, TASKS, PLACES)
        fresh = fresh.transpose(0, 1).int().contiguous()
        here.count(places, true)
        there.absorb(fresh, range(TASKS))
        assert not fresh.any(), "they would be counted again"
        assert torch.equal(here.chances, there.chances)
        assert all(torch.equal(here.of_task(t), there.of_task(t)) for t in range(TASKS))


def test_steps_absorbed_together_age_the_chances_as_single_ones() -> None:
    calibration = Calibration(1, torch.device("cpu"))
    before = calibration.chances.clone()
    fresh = torch.zeros(1, 2, PLACES, dtype=torch.int32)
    for _ in range(2):  # the first refresh was at step 0, the next is 4 steps later
        fresh[0, :, 7] = 50
        calibration.absorb(fresh, [0], steps=4)
    assert calibration.chances[7] > before[7] + 0.2


# Tokens of a tree, orders, task orders, candidates. A compilation takes a second or two.
FEW_ORDERS = ("2,0,1,4",)  # what Triton 3.6 once failed to compile
ALL_ORDERS = [f"2,{orders},{task_orders},8" for orders in range(4) for task_orders in (1, 2)]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(FEW_ORDERS, id="few orders"),
        pytest.param((*ALL_ORDERS, "2,0,1,1"), id="all", marks=pytest.mark.long),
    ],
)
def test_whatever_rows_there_are_an_h200_gets_compiled_kernels(
    cases: tuple[str, ...], tmp_path: Path
) -> None:
    """For a chip that need not be here: the interpreter runs what the compiler may refuse."""
    script = Path(__file__).with_name("compile_drafts.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script), "90", *cases],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = ("_draft", "_calibrate", "_claim", "_write")
    wanted = [(case, kernel) for case in cases for kernel in kernels]
    assert [(one["case"], one["kernel"]) for one in found] == wanted
