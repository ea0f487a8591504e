"""What a CPU does node by node agrees with its slow twin in tensors: accept, learn, calibrate."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heap_search import LAST, SLOTS, TASKS, ahead, filled_matrix

from trbatch.config import EngineConfig
from trbatch.engine import drafter, drafting, heap_search, verify
from trbatch.engine.budget import Budget
from trbatch.engine.calibration import Calibration
from trbatch.engine.coming_true import count_paths
from trbatch.engine.costs import CostTable
from trbatch.engine.drafter import Drafter
from trbatch.engine.drafting import Draft
from trbatch.engine.host_rows import HostRows
from trbatch.engine.matrix import Matrix


def a_draft(matrix: Matrix, seed: int, count: int) -> Draft:
    found = heap_search.search(
        HostRows.of(matrix), Calibration(2, torch.device("cpu")), SLOTS, TASKS, LAST, ahead(seed),
        most=20, least=0.002,
    )  # fmt: skip
    return heap_search.build(found[:count], LAST)


def choices(drafted: Draft, seed: int) -> torch.Tensor:
    """What a model might choose at each node: mostly one of the node's own children."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, 12, drafted.tokens.shape, generator=generator)
    for b, size in enumerate(drafted.sizes):
        for node in range(1, size):
            if torch.rand(1, generator=generator) < 0.6:
                chosen[b, drafted.parents[b, node]] = drafted.tokens[b, node]
    return chosen


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 500), count=st.integers(0, 30))
def test_few_nodes_are_accepted_as_many_are(seed: int, count: int) -> None:
    drafted = a_draft(filled_matrix(seed), seed, count)
    chosen = choices(drafted, seed)
    quick, slow = verify.accept_few(drafted, chosen), verify.accept(drafted, chosen)
    assert torch.equal(quick.nodes, slow.nodes)
    assert torch.equal(quick.tokens, slow.tokens)
    assert torch.equal(quick.on_path, slow.on_path)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 500), count=st.integers(0, 30), turn=st.permutations([0, 1, 2]))
def test_few_nodes_are_learned_as_many_are(seed: int, count: int, turn: list[int]) -> None:
    one, other = filled_matrix(seed), filled_matrix(seed)
    drafted = a_draft(one, seed, count)
    verdict = verify.accept(drafted, choices(drafted, seed))
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.rand(*drafted.tokens.shape, 12, generator=generator).topk(4).indices
    # Two sequences of one task, so that its rows are wanted twice.
    tasks = torch.tensor([0, 0, 1])
    drafting.learn_few(
        HostRows.of(one), drafted, candidates, verdict.on_path, SLOTS, tasks, turn
    )  # fmt: skip
    drafting.learn(
        other, drafted, candidates, verdict.on_path, SLOTS, tasks, torch.tensor(turn)
    )  # fmt: skip
    assert torch.equal(one.shared, other.shared)
    for keys, rows in (("keys", "rows"), ("pair_keys", "pair_rows")):
        assert torch.equal(getattr(one, keys), getattr(other, keys))
        there = getattr(one, keys) >= 0
        assert torch.equal(getattr(one, rows)[there], getattr(other, rows)[there])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 500), count=st.integers(0, 30))
def test_few_nodes_are_calibrated_as_many_are(seed: int, count: int) -> None:
    matrix, spines = filled_matrix(seed), ahead(seed)
    drafted = a_draft(matrix, seed, count)
    verdict = verify.accept(drafted, choices(drafted, seed))
    quick, slow = Calibration(2, torch.device("cpu")), Calibration(2, torch.device("cpu"))
    ranks = heap_search.calibrate(
        HostRows.of(matrix), quick, drafted, verdict, SLOTS, TASKS, spines
    )  # fmt: skip
    assert count_paths(matrix, slow, drafted, verdict, SLOTS, TASKS, spines) == ranks
    for task in range(2):
        torch.testing.assert_close(quick.of_task(task), slow.of_task(task), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(quick.chances, slow.chances, rtol=1e-3, atol=1e-3)


def test_many_nodes_go_through_tensors() -> None:
    matrix = filled_matrix(1)
    budget = Budget(CostTable({(1, 1): 1.0}, context=0, per_context=0.0), most=21)
    one = Drafter(
        matrix,
        Calibration(2, torch.device("cpu")),
        [],
        budget,
        EngineConfig(),
        most=21,
        template=None,
    )
    drafted = a_draft(matrix, 1, 30)
    assert one._few(drafted) is not None
    many = Draft(
        drafted.tokens, drafted.parents, drafted.depths, drafted.ancestors, drafted.contexts,
        [drafter._FEW, 1],
    )  # fmt: skip
    assert one._few(many) is None
