"""Adjacency rows: keys are checked, winners are defined, longest contexts come first."""

import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch.engine import drafting
from trbatch.engine.matrix import (
    MODEL,
    NOWHERE,
    OWN,
    TASK,
    TASK_PAIR,
    Contexts,
    Matrix,
    last_tokens,
)
from trbatch.engine.tree import Tree

CPU = torch.device("cpu")


def matrix(**changes) -> Matrix:
    sizes = {"slots": 3, "vocab_size": 50, "tasks": 2, "candidates": 2, "own_rows": 16}
    return Matrix(device=CPU, **{**sizes, **changes})


def contexts(tokens, slots=None, tasks=None) -> Contexts:
    count = len(tokens)
    return Contexts(
        slots=torch.tensor(slots or [0] * count),
        tasks=torch.tensor(tasks or [0] * count),
        tokens=torch.tensor(tokens),
    )


def write(target: Matrix, at: Contexts, rows) -> None:
    order = torch.arange(len(rows))
    target.write(at, torch.tensor(rows), order, order)


def test_own_rows_come_before_shared_and_longer_contexts_before_shorter() -> None:
    m = matrix()
    write(m, contexts([[5, 4, 3]], slots=[0]), [[7, 8]])
    write(m, contexts([[5, 9, 9]], slots=[1]), [[1, 2]])
    find = lambda tokens, slot: m.find(contexts([tokens], slots=[slot])).rows[:, 0].tolist()[0]  # noqa: E731
    assert find([5, 4, 3], 0) == [7, 8]  # three tokens
    assert find([5, 4, 0], 0) == [7, 8]  # two
    assert find([5, 0, 0], 0) == [7, 8]  # one
    assert find([5, 9, 9], 1) == [1, 2]
    assert find([5, 4, 3], 2) == [7, 8]  # a slot without rows: the task's of two tokens
    assert find([5, 0, 3], 2) == [1, 2]  # and of one, written last
    assert find([6, 4, 3], 0) == [-1, -1]


def test_tasks_do_not_see_each_other() -> None:
    m = matrix()
    write(m, contexts([[5, 4, 3]], tasks=[1]), [[7, 8]])
    assert m.find(contexts([[5, 4, 3]], slots=[2], tasks=[0])).rows[:, 0].tolist() == [[-1, -1]]
    assert m.find(contexts([[5, 4, 3]], slots=[2], tasks=[1])).rows[:, 0].tolist() == [[7, 8]]


def test_clearing_a_slot_leaves_only_the_shared_row() -> None:
    m = matrix()
    write(m, contexts([[5, 4, 3], [5, 9, 9]], slots=[0, 1]), [[7, 8], [1, 2]])
    m.clear_slot(0)
    assert m.find(contexts([[5, 0, 3]], slots=[0])).rows[:, 0].tolist() == [[1, 2]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 49), st.integers(0, 49), st.integers(0, 49)), max_size=80))
def test_a_collision_never_yields_another_keys_row(seen) -> None:
    """Tables of 16 rows collide all the time; what comes back was written for that context."""
    m = matrix(slots=1)
    m.clear_task(0)
    last: dict[tuple, int] = {}
    for number, tokens in enumerate(seen):
        m.write(contexts([tokens]), torch.tensor([[number, number]]),
                torch.tensor([0]), torch.tensor([-1]))  # fmt: skip
        for order in (1, 2, 3):
            last[tokens[:order]] = number
    for tokens in seen:
        found = m.find(contexts([tokens])).rows[:, 0].tolist()[0][0]
        assert found in {-1, *(last[tokens[:order]] for order in (1, 2, 3))}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 49), st.integers(0, 49)), max_size=80))
def test_a_collision_of_a_tasks_pairs_never_yields_another_pairs_row(seen) -> None:
    m = matrix(orders=0, pair_rows=16)
    last: dict[tuple[int, int], int] = {}
    for number, pair in enumerate(seen):
        m.write(contexts([[*pair, -1]]), torch.tensor([[number, number]]),
                torch.tensor([-1]), torch.tensor([0]))  # fmt: skip
        last[pair] = number
    for pair in seen:
        found = m.find(contexts([[*pair, -1]]))
        for row, origin in zip(found.rows[0].tolist(), found.origins[0].tolist(), strict=True):
            if origin == TASK_PAIR:
                assert row[0] == last[pair]


def test_the_second_row_is_the_next_that_says_something_else() -> None:
    bigrams = torch.full((50, 2), -1)
    bigrams[5] = torch.tensor([3, 4])
    m = matrix(bigrams=bigrams)
    found = lambda tokens, slot: (  # noqa: E731
        lambda f: (f.rows[0].tolist(), f.origins[0].tolist())
    )(m.find(contexts([tokens], slots=[slot])))
    assert found([5, 4, 3], 0) == ([[3, 4], [-1, -1]], [MODEL, NOWHERE])
    assert found([6, 4, 3], 0) == ([[-1, -1], [-1, -1]], [MODEL, NOWHERE])
    write(m, contexts([[5, 4, 3]], slots=[0]), [[7, 8]])
    # All rows that this write made are the same: the next other one is the model's.
    assert found([5, 4, 3], 0) == ([[7, 8], [3, 4]], [OWN + 2, MODEL])
    assert found([5, 4, 3], 1) == ([[7, 8], [3, 4]], [TASK_PAIR, MODEL])
    assert found([5, 0, 3], 1) == ([[7, 8], [3, 4]], [TASK, MODEL])
    write(m, contexts([[5, 9, 9]], slots=[1]), [[1, 2]])
    # What once followed this token elsewhere comes first alone, and behind a better row not at all…
    assert found([5, 0, 3], 2) == ([[1, 2], [3, 4]], [TASK, MODEL])
    assert found([5, 4, 3], 0) == ([[7, 8], [3, 4]], [OWN + 2, MODEL])
    assert found([5, 4, 3], 2) == ([[7, 8], [3, 4]], [TASK_PAIR, MODEL])
    # … unless the model has nothing there.
    m.bigrams.fill_(-1)
    assert found([5, 4, 3], 0) == ([[7, 8], [1, 2]], [OWN + 2, TASK])
    assert found([5, 4, 3], 1) == ([[1, 2], [7, 8]], [OWN, TASK_PAIR])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_highest_priority_wins_whatever_the_order_of_the_entries(data) -> None:
    entries = data.draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=30)
    )
    order = data.draw(st.permutations(range(len(entries))))

    def result(places) -> list:
        m = matrix()
        at = contexts([[entries[i][0], 1, 1] for i in places])
        rows = torch.tensor([[i % 50, 0] for i in places])
        priority = torch.tensor(places)
        m.write(at, rows, priority, priority)
        return m.find(contexts([[token, 1, 1] for token in range(4)])).rows[:, 0].tolist()

    assert result(range(len(entries))) == result(order)
    for token in range(4):
        wanted = [i for i, entry in enumerate(entries) if entry[0] == token]
        if wanted:
            assert result(order)[token] == [wanted[-1] % 50, 0]


def shaped(tree: Tree, tokens: torch.Tensor, contexts: torch.Tensor) -> drafting.Draft:
    """A draft of this shape and these tokens [B, T]."""
    shape, batch = tree.on(CPU), tokens.shape[0]
    return drafting.Draft(
        tokens=tokens,
        parents=shape.parents.expand(batch, -1),
        depths=shape.depths.expand(batch, -1),
        ancestors=shape.ancestors.expand(batch, -1, -1),
        contexts=contexts,
        sizes=[tree.size] * batch,
    )


def test_accepted_path_wins_over_rejected_branches_and_slots_do_not_matter() -> None:
    tree = Tree(((0,), (1,), (0, 0)))

    def shared_after(slots) -> torch.Tensor:
        m = matrix()
        tokens = torch.tensor([[5, 6, 6, 7], [5, 6, 8, 9]])  # node 1 and 2 hold the same token
        ctx = torch.stack([tokens, tokens, tokens], dim=2)
        drafted = shaped(tree, tokens, ctx)
        candidates = torch.arange(16).view(2, 4, 2)
        path = torch.tensor([[True, True, False, False], [True, False, False, False]])
        drafting.learn(
            m, drafted, candidates, path, torch.tensor(slots), torch.tensor([0, 0]),
            torch.tensor([0, 1]),
        )  # fmt: skip
        return m.shared[0].clone()

    rows = shared_after([0, 1])
    assert rows[6].tolist() == [2, 3]  # the accepted node, not the later, rejected one
    assert rows[5].tolist() == [8, 9]  # both accepted: the later row of the input
    assert torch.equal(rows, shared_after([1, 0]))


def test_a_node_behind_a_missing_candidate_is_never_recycled() -> None:
    tree = Tree(((0,), (0, 0)))
    m = matrix()
    tokens = torch.tensor([[5, -1, 7]])
    ctx = torch.stack([tokens] * 3, dim=2)
    drafted = shaped(tree, tokens, ctx)
    zero = torch.tensor([0])
    drafting.learn(
        m, drafted, torch.ones(1, 3, 2, dtype=torch.long), torch.tensor([[True, False, False]]),
        zero, zero, zero,
    )  # fmt: skip
    filled = (m.shared[0] >= 0).any(1).nonzero().flatten().tolist()
    assert filled == [5]


def test_contexts_of_a_text_are_its_last_three_tokens() -> None:
    assert last_tokens(torch.tensor([4, 5, 6, 7])).tolist() == [
        [4, -1, -1], [5, 4, -1], [6, 5, 4], [7, 6, 5],
    ]  # fmt: skip


def test_one_shared_matrix_accepts_less_in_a_batch_than_own_rows() -> None:
    """The experiment behind the design, small: these are the paper's single matrix."""
    model = tiny.loaded("llama")
    requests = [tiny.request(i, ids, max_tokens=64) for i, ids in enumerate(tiny.repetitive(16))]

    def accepted(orders: int) -> int:
        engine = tiny.engine(model, max_num_seqs=16, orders=orders, task_orders=1)
        done = tiny.decode(engine, requests)
        return sum(c.num_accepted_draft_tokens for c in done.values())

    assert accepted(3) > accepted(0)
