"""Draft trees: which candidates of which rows are tried. Owner of parents, ranks, depths, masks.

A tree is a list of nodes, node 0 the root (the last committed token). Each other node is the
`rank`-th candidate of its parent's row. The order is nested: the first T nodes are a valid tree for
every T, so a smaller budget is a smaller T. Source of the default: the static 80-node tree of Luo
et al., arXiv 2408.08696, figure 4; its nodes are taken here by falling path probability instead of
breadth first, which lifts small trees (`docs/performance.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.errors import UsageError

# The paper's tree: how many candidates of the row at the end of each path are tried. A path is
# written as the ranks that lead to it, "" is the root.
_PAPER_CHILDREN = {
    "": 8,
    "0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1,
    "00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1,
    "10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1,
    "000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1,
    "100": 1, "200": 1, "300": 1,
    "0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1,
    "00000": 2, "00010": 1,
}  # fmt: skip

# How often the candidate of each rank came true, given that its row's own token had (measured).
RANK_PROBABILITY = (0.52, 0.13, 0.06, 0.04, 0.03, 0.02, 0.018, 0.015)

Path = tuple[int, ...]


def paper_paths() -> list[Path]:
    """The paper's 80 nodes as rank paths, breadth first as published."""
    paths = [
        (*(int(rank) for rank in parent), child)
        for parent, count in _PAPER_CHILDREN.items()
        for child in range(count)
    ]
    return sorted(paths, key=lambda path: (len(path), path))


def by_probability(paths: Sequence[Path], rank_probability: Sequence[float]) -> list[Path]:
    """Order paths by falling probability, parents before children: a nested order."""

    def probability(path: Path) -> float:
        product = 1.0
        for rank in path:
            product *= rank_probability[rank]
        return product

    return sorted(paths, key=lambda path: (-probability(path), len(path), path))


@dataclass(frozen=True)
class Tree:
    """A nested draft tree of T nodes, the root included.

    Args:
        paths: of the nodes 1 … T-1, each the ranks from the root; every parent stands before its
            children.
    """

    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        known: set[Path] = {()}
        for path in self.paths:
            assert path[:-1] in known, f"node {path} stands before its parent"
            assert path not in known, f"node {path} stands twice"
            known.add(path)

    @property
    def size(self) -> int:
        """T: tokens that a forward takes per sequence."""
        return 1 + len(self.paths)

    @cached_property
    def _index(self) -> dict[Path, int]:
        return {(): 0} | {path: at for at, path in enumerate(self.paths, 1)}

    @cached_property
    def parents(self) -> list[int]:
        """[T] index of each node's parent; the root's is 0."""
        return [0] + [self._index[path[:-1]] for path in self.paths]

    @cached_property
    def ranks(self) -> list[int]:
        """[T] which candidate of the parent's row a node is; the root's is 0."""
        return [0] + [path[-1] for path in self.paths]

    @cached_property
    def depths(self) -> list[int]:
        """[T] edges from the root."""
        return [0] + [len(path) for path in self.paths]

    def prefix(self, size: int) -> Tree:
        """The tree of the first `size` nodes, the root included."""
        return _prefix(self, min(size, self.size))

    def on(self, device: torch.device) -> TreeTensors:
        """The same facts as tensors on a device (made once)."""
        return _tensors(self, device)

    def __hash__(self) -> int:
        return hash(self.paths)


@dataclass(frozen=True, slots=True)
class Level:
    """One step of drafting: the nodes of a depth that have children, and those children."""

    internal: Tensor  # [I] nodes whose rows are looked up
    children: Tensor  # [C] nodes of the next depth
    parent_at: Tensor  # [C] index into `internal`
    parents: Tensor  # [C] the same as node indices
    ranks: Tensor  # [C]


@dataclass(frozen=True, slots=True)
class TreeTensors:
    """A tree as tensors."""

    parents: Tensor  # [T] int64
    depths: Tensor  # [T] int64
    ancestors: Tensor  # [T, T] bool: row i is true at i and at each node on its way to the root
    paths: Tensor  # [T, D+1] int64: nodes from the root to each node, -1 behind the end
    children: Tensor  # [T, C] int64: each node's children, -1 behind the end
    levels: tuple[Level, ...]


@lru_cache(maxsize=512)
def _prefix(tree: Tree, size: int) -> Tree:
    return tree if size == tree.size else Tree(tree.paths[: size - 1])


@lru_cache(maxsize=512)
def _tensors(tree: Tree, device: torch.device) -> TreeTensors:
    size, depths, parents = tree.size, tree.depths, tree.parents
    chains: list[list[int]] = [[0]]
    offspring: list[list[int]] = [[] for _ in range(size)]
    for node in range(1, size):
        chains.append([*chains[parents[node]], node])
        offspring[parents[node]].append(node)
    ancestors = torch.zeros(size, size, dtype=torch.bool)
    for node, chain in enumerate(chains):
        ancestors[node, chain] = True
    return TreeTensors(
        parents=torch.tensor(parents, device=device),
        depths=torch.tensor(depths, device=device),
        ancestors=ancestors.to(device),
        paths=_padded(chains, device),
        children=_padded(offspring, device),
        levels=tuple(_level(tree, depth, offspring, device) for depth in range(max(depths))),
    )


def _level(tree: Tree, depth: int, offspring: list[list[int]], device: torch.device) -> Level:
    internal = [n for n in range(tree.size) if tree.depths[n] == depth and offspring[n]]
    children = [child for node in internal for child in offspring[node]]
    parents = [tree.parents[child] for child in children]
    columns = (
        internal, children, [internal.index(p) for p in parents], parents,
        [tree.ranks[child] for child in children],
    )  # fmt: skip
    return Level(*(torch.tensor(column, device=device) for column in columns))


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    width = max(1, *(len(row) for row in rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=device)


def default_tree() -> Tree:
    """The paper's 80 nodes and the root, likeliest first."""
    return Tree(tuple(by_probability(paper_paths(), RANK_PROBABILITY)))


def paper_tree() -> Tree:
    """The paper's tree in its own, breadth-first order: the reference."""
    return Tree(tuple(paper_paths()))


def fixed_tree(config: EngineConfig, tree: Tree | None = None) -> Tree | None:
    """The fixed tree that an engine uses, None where nodes are picked by chance (`best_first`).

    Raises:
        UsageError: the paper's tree without a size: only best-first trees follow a budget.
    """
    if tree is None and (config.tree != "paper" or not config.speculate):
        return None
    if not config.tree_size:
        raise UsageError("the paper's tree needs a fixed size", hint="set tree_size, e.g. 81")
    return (tree or default_tree()).prefix(config.tree_size)
