"""The candidates of two rows and a spine: each token once, each in the cell that says why."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch.engine import candidates
from trbatch.engine.candidates import CELLS, cell_names, coarse_cells
from trbatch.engine.matrix import MODEL, NOWHERE, ORIGINS, OWN, TASK, Found
from trbatch.engine.spine import LONG, MATCH

row = st.lists(st.integers(0, 9), min_size=4, max_size=4, unique=True).flatmap(
    lambda tokens: st.integers(0, 4).map(lambda n: tokens[:n] + [-1] * (4 - n))
)


@st.composite
def places(draw) -> tuple[list[int], int, list[int], int, int, int]:
    first, second = draw(row), draw(row)
    origin, behind = draw(st.integers(0, ORIGINS - 1)), draw(st.integers(0, NOWHERE))
    if behind == NOWHERE:
        second = [-1] * 4
    return first, origin, second, behind, draw(st.integers(-1, 9)), draw(st.integers(4, 12))


@settings(max_examples=100, deadline=None)
@given(st.lists(places(), min_size=1, max_size=8))
def test_single_places_have_the_candidates_that_tensors_give(many) -> None:
    firsts, origins, seconds, behinds, expected, matched = map(list, zip(*many, strict=True))
    found = candidates.of_rows(
        Found(
            torch.stack([torch.tensor(firsts), torch.tensor(seconds)], dim=1),
            torch.tensor(list(zip(origins, behinds, strict=True))),
        ),
        torch.tensor(expected), torch.tensor(matched),
    )  # fmt: skip
    for i, one in enumerate(many):
        pairs = zip(found.tokens[i].tolist(), found.cells[i].tolist(), strict=True)
        by_tensor = [(token, cell) for token, cell in pairs if token >= 0]
        second = [] if one[3] == NOWHERE else one[2]
        assert candidates.of_row(one[0], one[1], second, *one[3:]) == by_tensor
        tokens = [token for token, _ in by_tensor]
        assert len(tokens) == len(set(tokens)), "none is paid for twice"
        assert set(tokens) == {t for t in (*one[0], *one[2], one[4]) if t >= 0}
        assert all(0 <= cell < CELLS for _, cell in by_tensor)


def names_of(*place) -> dict[int, tuple[str, int, int]]:
    return {token: cell_names()[cell] for token, cell in candidates.of_row(*place)}


def test_a_cell_tells_origin_and_rank() -> None:
    assert names_of([5, 6], OWN, [6, 7], MODEL) == {
        5: ("first", OWN, 0), 6: ("first", OWN, 1), 7: ("second", MODEL, 1)
    }  # fmt: skip
    spine = names_of([5, 6], TASK, [], NOWHERE, 6, MATCH)
    assert spine == {6: ("spine", 1, 0), 5: ("beside", 1, 0)}
    assert names_of([5, 6], TASK, [], NOWHERE, 5, LONG)[5] == ("spine", 2, 0)


def test_agreement_of_the_second_row_is_told_apart() -> None:
    cells = {
        tuple(second): dict(candidates.of_row([5, 6], OWN, second, MODEL))[5]
        for second in ([5, 9], [9, 5], [8, 9])
    }
    assert len(set(cells.values())) == 3


def test_every_cell_has_a_name_and_a_group() -> None:
    groups, count = coarse_cells()
    assert len(cell_names()) == CELLS == groups.numel()
    assert set(groups.tolist()) == set(range(count))
    assert count == len(set(cell_names()))
