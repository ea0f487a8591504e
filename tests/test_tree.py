"""Draft trees: nested, valid at every size, masks equal to paths."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trbatch.engine.tree import (
    RANK_PROBABILITY,
    Tree,
    by_probability,
    default_tree,
    paper_paths,
    paper_tree,
)


def test_paper_tree_has_eighty_nodes_and_its_published_levels() -> None:
    depths = paper_tree().depths
    assert [depths.count(depth) for depth in range(8)] == [1, 8, 21, 25, 15, 8, 3, 0]
    assert set(default_tree().paths) == set(paper_paths())


@given(size=st.integers(1, 81))
def test_every_prefix_is_a_valid_tree_whose_mask_is_its_paths(size: int) -> None:
    tree = default_tree().prefix(size)
    shape = tree.on(torch.device("cpu"))
    assert tree.size == size
    for node in range(size):
        chain, at = {node}, node
        while at:
            assert tree.parents[at] < at
            assert tree.depths[at] == tree.depths[tree.parents[at]] + 1
            at = tree.parents[at]
            chain.add(at)
        assert set(shape.ancestors[node].nonzero().flatten().tolist()) == chain
        path = [n for n in shape.paths[node].tolist() if n >= 0]
        assert set(path) == chain and path == sorted(path)
        below = [n for n in shape.children[node].tolist() if n >= 0]
        assert below == [n for n in range(1, size) if tree.parents[n] == node]


@given(
    st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8).map(
        lambda values: sorted(values, reverse=True)
    )
)
def test_order_by_probability_is_nested_whatever_the_probabilities(chances) -> None:
    Tree(tuple(by_probability(paper_paths(), chances)))  # asserts that parents come first


def test_small_trees_reach_deep_before_wide() -> None:
    """The published order begins with eight siblings; by probability it does not."""
    assert max(paper_tree().prefix(9).depths) == 1
    assert max(default_tree().prefix(9).depths) >= 3
    assert list(RANK_PROBABILITY) == sorted(RANK_PROBABILITY, reverse=True)
