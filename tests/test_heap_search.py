"""The CPU's search for draft nodes agrees with its slow twin in tensors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch.engine import best_first, heap_search
from trbatch.engine.ahead import Ahead
from trbatch.engine.calibration import PLACES, Calibration
from trbatch.engine.host_rows import HostRows
from trbatch.engine.matrix import OWN, Contexts, Matrix

CPU = torch.device("cpu")
SLOTS, TASKS = torch.tensor([2, 0, 1]), torch.tensor([0, 1, 0])
LAST = torch.tensor([[1, 2, 3], [4, 5, -1], [7, -1, -1]])


def filled_matrix(seed: int, orders: int = 3) -> Matrix:
    """Rows of 12 tokens at random, of three slots and two tasks, some without some candidates."""
    generator = torch.Generator().manual_seed(seed)
    bigrams = torch.rand(12, 12, generator=generator).topk(4).indices
    bigrams[torch.rand(12, generator=generator) < 0.3] = -1
    matrix = Matrix(
        slots=3, vocab_size=12, tasks=2, device=CPU, candidates=4, own_rows=64, orders=orders,
        bigrams=bigrams,
    )  # fmt: skip
    count = 80
    at = Contexts(
        slots=torch.randint(0, 3, (count,), generator=generator),
        tasks=torch.randint(0, 2, (count,), generator=generator),
        tokens=torch.randint(0, 12, (count, 3), generator=generator),
    )
    # No row holds a token twice, as the candidates of one place never do.
    rows = torch.rand(count, 12, generator=generator).topk(4).indices
    rows[torch.rand(count, 4, generator=generator) < 0.1] = -1
    matrix.write(at, rows, torch.arange(count), torch.arange(count))
    return matrix


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 500), orders=st.integers(0, 3), large=st.booleans())
def test_a_row_read_alone_is_the_row_found_by_tensors(seed: int, orders: int, large: bool) -> None:
    matrix = filled_matrix(seed, orders)
    if large:  # keys of three tokens beyond 2**31
        matrix = Matrix(
            slots=3, vocab_size=50_000, tasks=2, device=CPU, candidates=4, orders=orders
        )
    generator = torch.Generator().manual_seed(seed + 1)
    high = matrix.vocab_size
    tokens = torch.randint(0, high, (60, 3), generator=generator)
    slots = torch.randint(0, 3, (60,), generator=generator)
    tasks = torch.randint(0, 2, (60,), generator=generator)
    at = Contexts(slots, tasks, tokens)
    if large:
        order = torch.arange(60)
        matrix.write(at, torch.randint(0, high, (60, 4), generator=generator), order, order)
    tokens[::7, 2] = -1
    tokens[::14, 1] = -1
    found = matrix.find(at)
    if large and orders:
        assert (found.origins[:, 0] >= OWN).any()
    reader = HostRows.of(matrix)
    for i in range(60):
        first, origin, second, behind = reader.find(
            int(slots[i]), int(tasks[i]), tokens[i].tolist()
        )
        assert [first, second or [-1] * 4] == found.rows[i].tolist()
        assert [origin, behind] == found.origins[i].tolist()


def ahead(seed: int) -> Ahead | None:
    """Spines at random: no tokens, some, or many; None one time in four."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 4 == 0:
        return None
    tokens = torch.randint(0, 12, (3, best_first.MAX_DEPTH + 1), generator=generator)
    for member in range(3):
        tokens[member, int(torch.randint(0, 9, (1,), generator=generator)) :] = -1
    return Ahead(tokens, torch.randint(4, 12, (3,), generator=generator))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 500),
    most=st.integers(1, 12),
    least=st.sampled_from([0.0051, 0.0213, 0.107, 0.31]),
)
def test_both_searches_find_the_same_chances(seed: int, most: int, least: float) -> None:
    matrix, calibration, spines = filled_matrix(seed), Calibration(2, CPU), ahead(seed)
    # Two tasks with different experience.
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        places = torch.randint(0, 2 * PLACES, (20_000,), generator=generator)
        calibration.count(places, torch.rand(20_000, generator=generator) < 0.3)
    nodes = heap_search.search(
        HostRows.of(matrix), calibration, SLOTS, TASKS, LAST, spines, most=most, least=least
    )  # fmt: skip
    chances = [node.chance for node in nodes]
    assert chances == sorted(chances, reverse=True)
    found = best_first.expand(
        matrix, calibration, SLOTS, TASKS, LAST, spines, width=1000, least=least / 2
    )
    if found is None:
        assert not nodes
        return
    twin = best_first.limit(found, most).chances
    for member in range(3):
        own = torch.tensor([node.chance for node in nodes if node.member == member])
        other = twin[member].sort(descending=True).values
        torch.testing.assert_close(own, other[other >= least], check_dtype=False)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 500), count=st.integers(1, 30))
def test_any_first_part_of_the_nodes_is_a_tree_whose_mask_is_its_paths(
    seed: int, count: int
) -> None:
    matrix = filled_matrix(seed)
    nodes = heap_search.search(
        HostRows.of(matrix), Calibration(2, CPU), SLOTS, TASKS, LAST, most=20, least=0.002
    )[:count]  # fmt: skip
    drafted = heap_search.build(nodes, LAST)
    assert sum(drafted.sizes) == len(nodes) + 3
    for b, size in enumerate(drafted.sizes):
        assert drafted.contexts[b, 0].tolist() == LAST[b].tolist()
        assert drafted.depths[b, 0] == 0
        assert drafted.ancestors[b, 0, 0]
        siblings = set()
        for node in range(1, size):
            parent = int(drafted.parents[b, node])
            assert parent < node
            assert drafted.depths[b, node] == drafted.depths[b, parent] + 1
            token = int(drafted.tokens[b, node])
            siblings.add((parent, token))
            context = [token, *drafted.contexts[b, parent, :2].tolist()]
            assert drafted.contexts[b, node].tolist() == context
            # The row that it came from holds it.
            at = Contexts(SLOTS[b : b + 1], TASKS[b : b + 1], drafted.contexts[b, parent][None])
            assert token in matrix.find(at).rows.flatten().tolist()
            mask = drafted.ancestors[b, parent].clone()
            mask[node] = True
            assert torch.equal(drafted.ancestors[b, node], mask)
        assert (drafted.tokens[b, size:] == -1).all()


def test_without_rows_there_are_no_nodes() -> None:
    matrix = Matrix(slots=3, vocab_size=12, tasks=2, device=CPU)
    assert not heap_search.search(
        HostRows.of(matrix), Calibration(2, CPU), SLOTS, TASKS, LAST, most=8, least=0.01
    )  # fmt: skip
    drafted = heap_search.build([], LAST)
    assert drafted.sizes == [1, 1, 1]
    assert drafted.tokens.tolist() == [[1], [4], [7]]
