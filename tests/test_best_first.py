"""Trees by calibrated chance: valid whatever was taken, and the budget that pays for them."""

from itertools import pairwise

import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch.engine import best_first, costs, drafting, verify
from trbatch.engine.budget import Budget
from trbatch.engine.calibration import PLACES, Calibration, place_of
from trbatch.engine.candidates import CELLS
from trbatch.engine.costs import CostTable
from trbatch.engine.matrix import MODEL, OWN, Contexts, Matrix

CPU = torch.device("cpu")


def filled_matrix(seed: int) -> Matrix:
    """Rows of 12 tokens at random, of three slots, some of them missing."""
    generator = torch.Generator().manual_seed(seed)
    matrix = Matrix(slots=3, vocab_size=12, tasks=1, device=CPU, candidates=4, own_rows=64)
    count = 60
    at = Contexts(
        slots=torch.randint(0, 3, (count,), generator=generator),
        tasks=torch.zeros(count, dtype=torch.long),
        tokens=torch.randint(0, 12, (count, 3), generator=generator),
    )
    rows = torch.rand(count, 12, generator=generator).topk(4).indices
    rows[torch.rand(count, 4, generator=generator) < 0.1] = -1
    matrix.write(at, rows, torch.arange(count), torch.arange(count))
    return matrix


def search(matrix: Matrix, **limits) -> tuple[best_first.Nodes, torch.Tensor]:
    last = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    slots, tasks = torch.arange(3), torch.zeros(3, dtype=torch.long)
    found = best_first.expand(
        matrix, Calibration(1, CPU), slots, tasks, last, **{"width": 8, "least": 0.001, **limits}
    )
    assert found is not None
    return found, last


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 500), count=st.integers(1, 40), each=st.booleans())
def test_whatever_is_taken_is_a_tree_whose_mask_is_its_paths(seed, count, each) -> None:
    found, last = search(filled_matrix(seed))
    drafted = best_first.build(found, best_first.take_likeliest(found, count, each=each), last)
    for b, size in enumerate(drafted.sizes):
        assert drafted.tokens[b, 0] == last[b, 0]
        for node in range(1, size):
            parent = int(drafted.parents[b, node])
            assert parent < node
            assert drafted.depths[b, node] == drafted.depths[b, parent] + 1
            assert drafted.tokens[b, node] >= 0
            # Its context is its own token and then its parent's context.
            context = [int(drafted.tokens[b, node]), *drafted.contexts[b, parent, :2].tolist()]
            assert drafted.contexts[b, node].tolist() == context
            mask = drafted.ancestors[b, parent].clone()
            mask[node] = True
            assert torch.equal(drafted.ancestors[b, node], mask)
        assert (drafted.tokens[b, size:] == -1).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 500), count=st.integers(1, 20))
def test_the_search_may_stop_early_without_losing_a_likelier_node(seed: int, count: int) -> None:
    """Compared by chance: of equal nodes either may be taken."""
    matrix = filled_matrix(seed)
    chances = [
        found.chances.masked_fill(~best_first.take_likeliest(found, count, each=True), 0)
        .sort(descending=True)
        .values[:, :count]
        for found, _ in (search(matrix, least=0.0), search(matrix, least=0.0, enough=count))
    ]
    torch.testing.assert_close(*chances)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 500), answers=st.integers(0, 500))
def test_accepted_is_the_deepest_agreeing_path(seed: int, answers: int) -> None:
    found, last = search(filled_matrix(seed))
    drafted = best_first.build(found, best_first.take_likeliest(found, 30, each=True), last)
    generator = torch.Generator().manual_seed(answers)
    chosen = torch.randint(0, 12, drafted.tokens.shape, generator=generator)
    verdict = verify.accept(drafted, chosen)
    for b in range(3):
        nodes = [n for n in verdict.nodes[b].tolist() if n >= 0]
        assert nodes[0] == 0
        for above, below in pairwise(nodes):
            assert drafted.parents[b, below] == above
            assert drafted.tokens[b, below] == chosen[b, above]
        end = nodes[-1]
        children = (drafted.parents[b] == end).nonzero().flatten().tolist()
        assert not any(drafted.tokens[b, child] == chosen[b, end] for child in children if child), (
            "a longer path agrees"
        )
        assert verdict.tokens[b, : len(nodes)].tolist() == chosen[b, nodes].tolist()


def counted(calibration: Calibration, place: int, came: int, times: int) -> None:
    """Count one candidate `times` times, of which `came` times it came true."""
    places = torch.full((times,), place)
    # In several steps: the chances are looked at again only after some.
    for part in torch.arange(times).tensor_split(8):
        calibration.count(places[part], part < came)


def test_calibration_follows_what_came_true() -> None:
    calibration = Calibration(1, CPU)
    place = place_of(0, 2) + 7
    assert calibration.chances[place] < 0.5
    counted(calibration, place, 300, 400)
    assert 0.6 < calibration.chances[place] < 0.8


def test_a_cell_that_was_hardly_seen_takes_the_chance_of_its_group() -> None:
    calibration = Calibration(1, CPU)
    before = calibration.chances.clone()
    counted(calibration, place_of(0, 0), 900, 1000)  # first rank, whatever the other row says
    changed = (calibration.chances != before).nonzero().flatten().tolist()
    assert set(range(5)) <= set(changed), "all cells of the first rank of this origin"
    assert max(changed) < CELLS, "of this depth"
    assert (calibration.chances[:5] > before[:5] + 0.1).all()


def test_a_tasks_experience_is_its_own_and_can_be_kept() -> None:
    calibration = Calibration(2, CPU)
    fresh = calibration.chances.clone()
    counted(calibration, place_of(1, 2), 50, 50)
    changed = (calibration.chances != fresh).nonzero().flatten()
    assert changed.min() >= place_of(1, 2)
    assert changed.max() < place_of(1, 3)
    kept, other = calibration.of_task(1), Calibration(2, CPU)
    other.restore(0, kept)
    calibration.restore(1, kept)
    assert torch.equal(other.chances[:PLACES], calibration.chances[PLACES:])
    other.restore(0, kept[:, :2])  # of another version: no experience at all
    assert torch.equal(other.chances, fresh)


def test_chances_are_kept_as_a_list_too() -> None:
    calibration = Calibration(2, CPU)
    counted(calibration, place_of(1, 0), 30, 60)
    assert calibration.listed(1) == calibration.chances[PLACES:].tolist()
    calibration.restore(1, None)
    assert calibration.listed(1) == calibration.chances[PLACES:].tolist()


def test_a_prompts_own_continuation_is_the_first_candidate() -> None:
    matrix = Matrix(slots=1, vocab_size=20, tasks=1, device=CPU, candidates=3, own_rows=64)
    tokens = torch.tensor([4, 5, 6, 7])
    rows = torch.tensor([[9, 5, 8], [1, 2, 3], [10, 11, 12]])
    drafting.learn_prompt(matrix, tokens, 0, rows, 0, 0)
    zero = torch.tensor([0])

    def row(*context: int) -> list[int]:
        return matrix.find(Contexts(zero, zero, torch.tensor([context]))).rows[0, 0].tolist()

    assert row(4, -1, -1) == [5, 9, 8]  # was there already: moved to the front
    assert row(5, 4, -1) == [6, 1, 2]
    assert row(6, 5, 4) == [7, 10, 11]


def test_a_prompt_without_candidates_puts_its_continuation_before_what_was_known() -> None:
    matrix = Matrix(slots=1, vocab_size=20, tasks=1, device=CPU, candidates=3, own_rows=64)
    matrix.shared[0, 5] = torch.tensor([8, 6, 9], dtype=torch.int32)
    drafting.learn_prompt(matrix, torch.tensor([4, 5, 6, 7]), 0, 4, 0, 0)
    zero = torch.tensor([0])

    def row(*context: int) -> tuple[list[int], int]:
        found = matrix.find(Contexts(zero, zero, torch.tensor([context])))
        return found.rows[0, 0].tolist(), int(found.origins[0, 0])

    assert row(4, -1, -1) == ([5, -1, -1], OWN)
    assert row(5, 4, -1) == ([6, 8, 9], OWN + 1)
    assert matrix.shared[0, 5].tolist() == [6, 8, 9]
    assert row(6, 5, 4) == ([7, -1, -1], OWN + 2)
    assert row(7, 6, 5) == ([-1, -1, -1], MODEL), "nothing is known to follow the last token"


def test_no_sequence_gets_more_nodes_than_it_has_room_for() -> None:
    found, _ = search(filled_matrix(3), width=100)
    limited = best_first.limit(found, 5)
    assert ((limited.chances > 0).sum(1) <= 5).all()
    best = found.chances.sort(dim=1, descending=True).values[:, :5]
    torch.testing.assert_close(limited.chances.sort(dim=1, descending=True).values[:, :5], best)


def test_the_budget_buys_nodes_only_where_they_pay() -> None:
    flat = CostTable({(1, 1): 1.0, (1, 8): 1.01}, context=0, per_context=0.0)
    steep = CostTable({(1, 1): 1.0, (1, 8): 8.0}, context=0, per_context=0.0)
    chances = [0.6, 0.4, 0.3, 0.1, 0.05, 0.02, 0.01]
    assert Budget(flat, most=8).choose(1, 0, chances) == 7
    assert Budget(steep, most=8).choose(1, 0, chances) == 0
    assert Budget(flat, most=4).choose(1, 0, chances) == 3


def test_a_hopeless_text_is_decoded_plainly_and_tried_again_now_and_then() -> None:
    steep = CostTable({(1, 1): 1.0, (1, 8): 8.0}, context=0, per_context=0.0)
    budget, tries = Budget(steep, most=8), 0
    for _ in range(500):
        if budget.wants_draft():
            tries += 1
            assert budget.choose(1, 0, [0.1]) == 0
        budget.count(1, 1, 0, 1.0)
    assert 40 < tries < 80


def test_measured_steps_correct_the_table() -> None:
    table = CostTable({(1, 1): 1.0, (1, 8): 2.0}, context=0, per_context=0.0)
    budget = Budget(table, most=8)
    for _ in range(100):
        budget.count(1, 1, 0, 0.5)
    assert abs(budget.plain_seconds(1, 0) - 0.5) < 0.01


def test_a_machine_that_slows_down_is_not_taken_for_dear_plain_steps() -> None:
    """Steps that are not being made become as slow as those that are."""
    table = CostTable({(1, 1): 1.0, (1, 8): 2.0}, context=0, per_context=0.0)
    budget = Budget(table, most=8)
    chances = [0.04] * 7  # 1.28 tokens in 2 seconds: worse than 1 in 1
    for seconds in [1.0] * 50 + [1.8] * 100:
        assert budget.choose(1, 0, chances) == 0
        budget.count(1, 1, 0, seconds)


def test_what_the_table_got_wrong_about_some_steps_is_learned_about_these() -> None:
    table = CostTable({(1, 1): 1.0, (1, 8): 1.0}, context=0, per_context=0.0)
    budget = Budget(table, most=8)
    chances = [0.1] * 7
    assert budget.choose(1, 0, chances) == 7
    for _ in range(200):
        budget.count(1, 1, 0, 1.0)
        budget.count(8, 1, 0, 2.0)
    assert budget.choose(1, 0, chances) == 5, "as large as what nothing is known against: T = 6"
    assert abs(budget.plain_seconds(1, 0) - 1.0) < 0.15


def test_a_disturbed_timing_does_not_make_larger_steps_cheap() -> None:
    timed = {(1, 1): 1.0, (1, 8): 3.0, (1, 16): 2.0, (8, 1): 4.0, (8, 8): 9.0}
    assert costs.rising(timed) == {**timed, (1, 8): 2.0}
    table = CostTable({(1, 1): 1.0, (1, 8): 2.0, (1, 16): 2.0}, context=0, per_context=0.0)
    assert table.seconds(1, 24, 0) > 3.0


def test_nodes_picked_by_chance_accept_more_than_the_published_tree() -> None:
    model = tiny.loaded("llama")
    requests = [tiny.request(i, ids, max_tokens=64) for i, ids in enumerate(tiny.repetitive(8))]

    def forwards(**settings) -> int:
        done = tiny.decode(tiny.engine(model, max_num_seqs=8, tree_size=9, **settings), requests)
        return sum(c.num_spec_steps for c in done.values())

    assert forwards() < forwards(tree="paper")
