"""The learned tree: nested, rooted, reproducible, and made of what came true."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch.engine import paths
from trbatch.engine.paths import DEEPEST, LARGEST, PathCounts
from trbatch.engine.tree import paper_paths

ranks = st.lists(st.one_of(st.none(), st.integers(0, 7)), max_size=200)


def counted(text: list[int | None], counts: PathCounts | None = None) -> PathCounts:
    counts = counts or PathCounts()
    run: list[int] = []
    for rank in text:
        counts.count(run, rank)
    return counts


@settings(max_examples=60, deadline=None)
@given(ranks)
def test_every_first_part_of_a_learned_tree_is_a_tree_with_parents_first(text) -> None:
    tree = counted(text).tree()
    assert 81 <= tree.size <= LARGEST, "the paper's tree is its beginning"
    nodes = [(), *tree.paths]
    whole = tree.on(torch.device("cpu")).ancestors
    for node, path in enumerate(nodes):
        chain = {i for i, p in enumerate(nodes) if p == path[: len(p)]}
        assert set(whole[node].nonzero().flatten().tolist()) == chain
    for size in range(1, tree.size + 1):
        part = tree.prefix(size)
        known = {()}
        for path in part.paths:  # `Tree` itself asserts it too
            assert path[:-1] in known
            assert path not in known, "a sibling twice"
            known.add(path)
        assert part.paths == tree.paths[: size - 1]
        assert torch.equal(part.on(torch.device("cpu")).ancestors, whole[:size, :size])


@settings(max_examples=60, deadline=None)
@given(ranks)
def test_each_path_is_counted_wherever_it_came_true(text) -> None:
    known, prior = counted(text).probabilities(), PathCounts().probabilities()
    for path in [(0,), (1,), (0, 0), (0, 1, 0), (3,) * 4]:
        places = range(len(text) - len(path) + 1)
        times = sum(tuple(text[i : i + len(path)]) == path for i in places)
        weighed = known.get(path, 0.0) * (len(text) + paths._PRIOR)
        assert weighed == pytest.approx(times + paths._PRIOR * prior.get(path, 0.0))


def test_no_path_is_likelier_than_its_beginning() -> None:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(-1, 4, (3000,), generator=generator).tolist()
    known = counted([None if rank < 0 else rank for rank in text]).probabilities()
    for path, chance in known.items():
        if len(path) > 1:
            assert chance <= known[path[:-1]] + 1e-12


def test_without_evidence_it_is_the_papers_tree_by_probability() -> None:
    tree = PathCounts().tree()
    assert set(tree.paths) == set(paper_paths())
    assert tree.paths[0] == (0,)


def test_what_comes_true_moves_to_the_front_and_deep() -> None:
    tree = counted([0] * 40 + [None] + [2, 2] * 200).tree()
    assert tree.paths.index((2, 2)) < tree.paths.index((1,))
    assert max(tree.depths) == DEEPEST


def test_learning_is_reproducible_and_goes_on_from_what_was_kept() -> None:
    generator = torch.Generator().manual_seed(1)
    text = [
        r if r < 8 else None for r in torch.randint(0, 11, (4000,), generator=generator).tolist()
    ]
    whole, again, first = counted(text), counted(text), counted(text[:2000])
    assert whole.tree() == again.tree()
    kept = first.to_tensors()
    other = PathCounts()
    other.restore(kept["paths"], kept["path_counts"])
    assert other.tree() == first.tree()
    assert other.probabilities() == first.probabilities()
    assert kept["paths"].dtype == torch.int8
    other.restore(None, None)
    assert other.tree() == PathCounts().tree()


def test_old_evidence_fades_and_memory_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(paths, "_MEMORY", 1000.0)
    monkeypatch.setattr(paths, "_MOST_PATHS", 200)
    generator = torch.Generator().manual_seed(2)
    counts = counted(torch.randint(0, 8, (3000,), generator=generator).tolist())
    assert counts.places < 1000
    assert len(counts.to_tensors()["paths"]) <= 200
    counted([5, None] * 2000, counts)
    assert counts.tree().paths[0] == (5,)


def test_an_engine_with_a_learned_tree_says_what_plain_decoding_says() -> None:
    model = tiny.loaded("llama")
    requests = [tiny.request(i, ids, max_tokens=60) for i, ids in enumerate(tiny.repetitive(6))]
    plain = tiny.decode(tiny.engine(model, speculate=False), requests)
    for size in (0, 9):
        engine = tiny.engine(model, tree="learned", tree_size=size)
        done = tiny.decode(engine, requests)
        for key, one in plain.items():
            assert done[key].token_ids == one.token_ids
        if size:
            assert sum(one.num_spec_steps for one in done.values()) < 60 * 6 * 0.8
            assert engine._paths[0].places > 100
