"""The second half of a step, accepting and learning, as kernels, and their slow twins.

Where there is no GPU they run in Triton's interpreter; where there is one, compiled on it.
"""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_devices import GPU, on_every_device
from random_steps import (
    DEEPEST,
    PAGE,
    PAGES,
    SPARE,
    STOPS,
    TASKS,
    VOCAB,
    K,
    Step,
    a_step,
    random_slots,
)
from torch import Tensor

from trbatch.config import SamplingParams
from trbatch.engine import drafting, reference, spans, verify
from trbatch.engine.device_state import FULL, GOES_ON, MOST_TURNS, STOPPED, Accepted, Slots
from trbatch.engine.drafting import Draft
from trbatch.engine.kernels.accept import accept
from trbatch.engine.kernels.learn import learn
from trbatch.engine.kv_cache import Room
from trbatch.engine.matrix import Matrix
from trbatch.engine.sequence import Figures, Request, Sequence
from trbatch.engine.text import StopChecker

sizes = pytest.mark.parametrize("size", [1, 4, 9, 33, 81])  # T


def moved(what: Any, device: str) -> Any:
    """A copy of a dataclass of tensors on another device."""
    return replace(
        what,
        **{
            field.name: value.to(device, copy=True) if isinstance(value, Tensor) else value
            for field in fields(what)
            for value in [getattr(what, field.name)]
        },
    )


def assert_equal(found: Any, wanted: Any) -> None:
    """Two dataclasses of tensors, bit for bit."""
    for field in fields(wanted):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        assert one.dtype == other.dtype, field.name
        assert torch.equal(one.cpu(), other), f"{field.name}: {one} is not {other}"


def by_twin(step: Step, slots: Slots, deepest: int = DEEPEST) -> Accepted:
    return reference.accept(
        slots, step.rows, step.drafted.tokens, step.drafted.parents, step.chosen,
        deepest=deepest, page_size=PAGE,
    )  # fmt: skip


def by_kernel(step: Step, slots: Slots, deepest: int = DEEPEST) -> Accepted:
    device = slots.left.device
    tensors = (step.rows, step.drafted.tokens, step.drafted.parents, step.chosen)
    return accept(
        slots, *(tensor.to(device) for tensor in tensors), deepest=deepest, page_size=PAGE
    )


@on_every_device
@sizes
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 5))
def test_accepting_equals_its_twin(seed: int, batch: int, size: int, device: str) -> None:
    step = a_step(seed, batch, size)
    slots, wanted_slots = moved(step.slots, device), moved(step.slots, "cpu")
    assert_equal(by_kernel(step, slots), by_twin(step, wanted_slots))
    assert_equal(slots, wanted_slots)


@on_every_device
@pytest.mark.parametrize("deepest", [0, 1, 3])
def test_no_more_levels_are_accepted_than_there_is_room_for(deepest: int, device: str) -> None:
    step = a_step(5, 5, 33)
    slots, wanted_slots = moved(step.slots, device), moved(step.slots, "cpu")
    assert_equal(by_kernel(step, slots, deepest), by_twin(step, wanted_slots, deepest))
    assert_equal(slots, wanted_slots)


@on_every_device
def test_one_tree_serves_all_rows(device: str) -> None:
    """Parents may be a view that repeats one row."""
    step = a_step(8, 4, 9)
    parents = step.drafted.parents[:1].expand(4, -1)
    step = replace(step, drafted=replace(step.drafted, parents=parents))
    slots, wanted_slots = moved(step.slots, device), moved(step.slots, "cpu")
    tensors = (step.rows.to(device), step.drafted.tokens.to(device))
    one = parents[:1].to(device).expand(4, -1)
    found = accept(slots, *tensors, one, step.chosen.to(device), deepest=DEEPEST, page_size=PAGE)
    assert_equal(found, by_twin(step, wanted_slots))


def test_what_rows_look_like_when_they_end() -> None:
    """A chain of four nodes, all right: cut by nothing, by a stop, by what is left; and no row."""
    device = torch.device("cpu")
    slots = Slots.empty(4, stops=2, pages=4, longest=64, device=device)
    ends: list[dict[str, Any]] = [
        {"left": 9, "stops": []}, {"left": 3, "stops": [9, 6]}, {"left": 2, "stops": [7]},
    ]  # fmt: skip
    for slot, end in enumerate(ends):
        slots.put(slot, [1, 2, 3, 4], pages=[slot], task=0, turn=slot, **end)
    tokens = torch.tensor([[4, 5, 0, 6, 7]]).expand(4, -1)
    parents = torch.tensor([[0, 0, 0, 1, 3]]).expand(4, -1)
    chosen = torch.tensor([[5, 6, 1, 7, 8]]).expand(4, -1)
    rows = torch.tensor([0, 1, 2, -1])
    out = reference.accept(slots, rows, tokens, parents, chosen, deepest=4, page_size=16)
    assert out.tokens.tolist() == [
        [5, 6, 7, 8, -1], [5, 6, -1, -1, -1], [5, 6, -1, -1, -1], [-1] * 5,
    ]  # fmt: skip
    assert out.nodes.tolist() == [
        [0, 1, 3, 4, -1], [0, 1, -1, -1, -1], [0, 1, -1, -1, -1], [-1] * 5,
    ]  # fmt: skip
    assert out.count.tolist() == [4, 2, 2, 0]
    assert out.finished.tolist() == [GOES_ON, STOPPED, FULL, GOES_ON]
    assert out.drafted.tolist() == [3, 2, 2, 0]
    # The root lies in place 3 of the sequence, its nodes behind it.
    assert out.sources.tolist() == [[-1, 6, 7, -1]] + [[-1] * 4] * 3
    assert out.targets.tolist() == [[-1, 5, 6, -1]] + [[-1] * 4] * 3
    assert out.on_path.tolist() == [[True, True, False, True, True]] * 3 + [[False] * 5]
    assert slots.lengths.tolist() == [8, 6, 6, 0]
    assert slots.last.tolist() == [[8, 7, 6], [6, 5, 4], [6, 5, 4], [-1, -1, -1]]
    assert slots.left.tolist() == [5, 1, 0, 0]
    assert slots.active.tolist() == [True, False, False, False]


def sequence_of(slots: Slots, slot: int) -> Sequence:
    """The same sequence as the engine of today has it; its text before the last three is 0."""
    length, left = int(slots.lengths[slot]), int(slots.left[slot])
    newest = [token for token in slots.last[slot].tolist() if token >= 0]
    stops = tuple(token for token in slots.stops[slot].tolist() if token >= 0)
    # Half of the stops as the model's own.
    params = SamplingParams(max_tokens=left, stop_token_ids=list(stops[::2]))
    pages = slots.pages[slot].tolist()
    return Sequence(
        request=Request(key=slot, sampling=params),
        tokens=[*[0] * (length - len(newest)), *newest[::-1]],
        prompt_length=length,
        max_tokens=left,
        stop=StopChecker(None, params, frozenset(stops[1::2])),
        figures=Figures(),
        room=Room(pages, PAGE, torch.device("cpu")),
    )


@sizes
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 5))
def test_the_twin_does_what_sequences_do(seed: int, batch: int, size: int) -> None:
    step = a_step(seed, batch, size)
    step = replace(step, chosen=step.chosen.clamp(min=0))  # the engine chooses on the whole path
    before, slots = step.slots, moved(step.slots, "cpu")
    out = by_twin(step, slots)
    verdict = verify.accept(step.drafted, step.chosen)
    assert torch.equal(verdict.nodes, verify.accept_few(step.drafted, step.chosen).nodes)
    ran = set()
    for row, slot in enumerate(step.rows.tolist()):
        if slot < 0 or not before.active[slot]:
            assert int(out.count[row]) == 0 and not out.on_path[row].any()
            continue
        ran.add(slot)
        sequence = sequence_of(before, slot)
        path = [node for node in verdict.nodes[row].tolist() if node >= 0]
        proposed = verdict.tokens[row, : len(path)].tolist()
        count = sequence.take(proposed)
        assert int(out.count[row]) == count
        assert out.tokens[row, :count].tolist() == proposed[:count]
        assert out.nodes[row, :count].tolist() == path[:count]
        assert int(out.drafted[row]) == min(count, len(proposed) - 1)  # as the engine counts
        reason = ["", "stop", "length"][int(out.finished[row])]
        assert reason == sequence.finish_reason
        assert torch.equal(out.on_path[row], verdict.on_path[row])
        sources, targets = spans.moves([sequence], [path])
        for found, wanted in ((out.sources, sources), (out.targets, targets)):
            assert [int(slot) for slot in found[row] if slot >= 0] == [int(at) for at in wanted]
        assert int(slots.lengths[slot]) == len(sequence.tokens)
        assert int(slots.left[slot]) == sequence.max_tokens - sequence.generated
        assert bool(slots.active[slot]) == (not sequence.finish_reason)
        assert slots.last[slot].tolist() == ([-1] * 3 + sequence.tokens)[:-4:-1]
        length = int(before.lengths[slot])
        taken = slots.texts[slot, length : len(sequence.tokens)]
        assert taken.tolist() == sequence.tokens[length:]
    others = [slot for slot in range(len(before.left)) if slot not in ran]
    for field in fields(Slots):
        one, other = getattr(slots, field.name), getattr(before, field.name)
        columns = field.name in ("whole", "real", "wide")  # a slot is a column there
        at = (slice(None), others) if columns else others
        assert torch.equal(one[at], other[at]), field.name


LEARNED = (
    "keys", "rows", "shared", "changed", "pair_keys", "pair_rows", "pair_changed",
    "claims", "shared_claims", "pair_claims",
)  # fmt: skip


def small_matrix(device: str, slots: int, *, orders: int = 3, task_orders: int = 2) -> Matrix:
    """Hash tables so small that most rows collide."""
    return Matrix(
        slots=slots, vocab_size=VOCAB, tasks=TASKS, device=torch.device(device), orders=orders,
        task_orders=task_orders, candidates=K, own_rows=8, pair_rows=16,
    )  # fmt: skip


def learned_by_twin(matrix: Matrix, step: Step, on_path: Tensor) -> None:
    """`drafting.learn` of the rows that ran, as a batch of their own."""
    ran = on_path[:, 0].nonzero().flatten()
    draft = step.drafted
    drafted = Draft(
        draft.tokens[ran], draft.parents[ran], draft.depths[ran], draft.ancestors[ran],
        draft.contexts[ran], [draft.tokens.shape[1]] * len(ran),
    )  # fmt: skip
    slots = step.rows[ran]
    turn = step.slots.turns[slots].argsort().argsort()
    tasks = step.slots.tasks[slots].long()
    drafting.learn(matrix, drafted, step.candidates[ran], on_path[ran], slots, tasks, turn)


def learned_by_kernel(matrix: Matrix, step: Step, on_path: Tensor) -> None:
    device = matrix.shared.device
    draft = step.drafted
    tensors = (
        step.rows, draft.tokens, draft.parents, draft.contexts, step.candidates, on_path,
    )  # fmt: skip
    learn(matrix, moved(step.slots, device), *(tensor.to(device) for tensor in tensors))


def assert_same_rows(found: Matrix, wanted: Matrix) -> None:
    for name in LEARNED:
        one, other = getattr(found, name), getattr(wanted, name)
        assert torch.equal(one.cpu(), other), name
    for name in ("claims", "shared_claims", "pair_claims"):
        assert bool((getattr(found, name) == -1).all()), f"{name} must be free between steps"


@on_every_device
@sizes
@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 5))
def test_learning_equals_its_twin(seed: int, batch: int, size: int, device: str) -> None:
    """Step after step into the same rows."""
    found, wanted = (small_matrix(where, batch + SPARE) for where in (device, "cpu"))
    for later in range(2):
        step = a_step(seed + later, batch, size)
        on_path = by_twin(step, moved(step.slots, "cpu")).on_path
        learned_by_twin(wanted, step, on_path)
        learned_by_kernel(found, step, on_path)
        assert_same_rows(found, wanted)


@on_every_device
@pytest.mark.parametrize("task_orders", [1, 2])
@pytest.mark.parametrize("orders", [0, 1, 2, 3])
def test_learning_knows_all_orders_of_rows(orders: int, task_orders: int, device: str) -> None:
    options = {"orders": orders, "task_orders": task_orders}
    found, wanted = (small_matrix(where, 4 + SPARE, **options) for where in (device, "cpu"))
    step = a_step(orders, 4, 9)
    on_path = by_twin(step, moved(step.slots, "cpu")).on_path
    learned_by_twin(wanted, step, on_path)
    learned_by_kernel(found, step, on_path)
    assert_same_rows(found, wanted)


@on_every_device
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_of_several_sequences_the_later_turn_wins_whatever_the_slots(
    data: Any, device: str
) -> None:
    """The same sequences in other slots and other rows teach their task the same."""
    batch, size = 4, 9
    step = a_step(data.draw(st.integers(0, 2**32)), batch, size)
    slots = Slots.empty(batch, stops=STOPS, pages=PAGES, longest=64, device=torch.device("cpu"))
    step = replace(step, slots=slots, rows=torch.arange(batch))
    slots.turns[:] = torch.tensor([7, 3, MOST_TURNS - 1, 4])
    on_path = torch.zeros(batch, size, dtype=torch.bool)
    on_path[:, :2] = True
    matrices = []
    for order in (range(batch), data.draw(st.permutations(range(batch)))):
        at = torch.tensor(list(order))  # the slot and the row of each sequence
        back = at.argsort()
        draft = step.drafted
        names = ("tokens", "parents", "depths", "ancestors", "contexts")
        elsewhere = Step(
            replace(slots, wide=slots.wide[:, back]),
            torch.arange(batch),
            replace(draft, **{name: getattr(draft, name)[back] for name in names}),
            step.chosen[back],
            step.candidates[back],
        )
        matrices.append(small_matrix(device, batch))
        learned_by_kernel(matrices[-1], elsewhere, on_path)
    for name in ("shared", "changed", "pair_keys", "pair_rows", "pair_changed"):
        assert torch.equal(*(getattr(matrix, name) for matrix in matrices)), name


@on_every_device
def test_a_step_without_a_row_that_runs_leaves_all_as_it_was(device: str) -> None:
    step = a_step(3, 4, 9)
    step.slots.active[:] = False
    slots, matrix = moved(step.slots, device), small_matrix(device, 4 + SPARE)
    out = by_kernel(step, slots)
    assert_equal(out, Accepted.nothing(4, 9, DEEPEST, torch.device("cpu")))
    assert_equal(slots, step.slots)
    learned_by_kernel(matrix, step, out.on_path)
    assert_same_rows(matrix, small_matrix("cpu", 4 + SPARE))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU here")
def test_a_captured_graph_follows_the_slots_from_step_to_step() -> None:
    batch, size, device = 5, 9, "cuda"
    steps = [a_step(seed, batch, size) for seed in range(6)]
    wanted_slots = random_slots(random.Random(0), batch + SPARE, [17, 40])
    slots = moved(wanted_slots, device)
    wanted, found = (small_matrix(where, batch + SPARE) for where in ("cpu", device))
    names = ("tokens", "parents", "contexts")
    held = {name: getattr(steps[0].drafted, name).to(device) for name in names}
    held |= {name: getattr(steps[0], name).to(device) for name in ("chosen", "candidates")}
    rows = torch.arange(batch, device=device)

    def run(state: Slots, matrix: Matrix) -> Accepted:
        out = accept(
            state, rows, held["tokens"], held["parents"], held["chosen"],
            deepest=DEEPEST, page_size=PAGE,
        )  # fmt: skip
        learn(
            matrix, state, rows, held["tokens"], held["parents"], held["contexts"],
            held["candidates"], out.on_path,
        )  # fmt: skip
        return out

    run(moved(slots, device), small_matrix(device, batch + SPARE))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(slots, found)
    for step in steps:
        for name, tensor in held.items():
            source = step.drafted if name in names else step
            tensor.copy_(getattr(source, name))
        graph.replay()
        now = replace(step, slots=wanted_slots, rows=torch.arange(batch))
        expected = by_twin(now, wanted_slots)
        assert_equal(out, expected)
        assert_equal(slots, wanted_slots)
        learned_by_twin(wanted, now, expected.on_path)
        assert_same_rows(found, wanted)
