"""Which paths of ranks come true: what a fixed tree is learned from.

Each token that comes has a rank in the row that should have predicted it. A path of ranks (r1, …,
rd) comes true at a place when the next d tokens had these ranks, whether or not any tree held it,
so counting the ends of all runs of ranks counts every path. No path can come true more often than
its beginning: paths in falling order are a tree, and so is each first part of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trbatch.engine.tree import RANK_PROBABILITY, Path, Tree, paper_paths

DEEPEST = 12
LARGEST = 128  # tokens of a learned tree, the root included
_PRIOR = 500.0  # places that the paper's tree is worth
_MEMORY = 20_000.0  # places after which an old one counts half
_MOST_PATHS = 16_384  # kept; the rarest are forgotten


class PathCounts:
    """How often each path came true."""

    def __init__(self) -> None:
        self._counts: dict[Path, float] = {}
        self.places = 0.0
        self._tree: tuple[float, Tree] | None = None  # at so many places, the tree that was learned

    def count(self, run: list[int], rank: int | None) -> None:
        """Count a token's rank.

        Args:
            run: the ranks just before it, kept for the next call; a miss empties it.
            rank: in the row that should have predicted it, None for a miss.
        """
        self.places += 1
        if rank is None:
            run.clear()
            return
        run.append(rank)
        del run[:-DEEPEST]
        for begin in range(len(run)):
            path = tuple(run[begin:])
            self._counts[path] = self._counts.get(path, 0.0) + 1
        if self.places >= _MEMORY or len(self._counts) > _MOST_PATHS:
            self._fade()

    def probabilities(self) -> dict[Path, float]:
        """Of all known paths, those of the paper's tree included."""
        total = self.places + _PRIOR
        found = {path: count / total for path, count in self._counts.items()}
        for path in paper_paths():
            found[path] = found.get(path, 0.0) + _PRIOR / total * _prior(path)
        return found

    def tree(self) -> Tree:
        """The likeliest paths in falling order; learned again when the evidence has grown."""
        if self._tree is None or self.places > 1.25 * self._tree[0] + 50:
            found = self.probabilities()
            order = sorted(found, key=lambda path: (-found[path], len(path), path))
            self._tree = (self.places, Tree(tuple(_rooted(order)[: LARGEST - 1])))
        return self._tree[1]

    def described(self) -> list[tuple[list[int], float]]:
        """The tree as people read it: each node's path of ranks and the chance that it is true."""
        known = self.probabilities()
        return [(list(path), round(known[path], 5)) for path in self.tree().paths]

    def to_tensors(self) -> dict[str, Tensor]:
        """What was counted, to be kept: paths [n, DEEPEST] padded with -1, their counts, places."""
        known = sorted(self._counts)
        padded = [[*path, *[-1] * (DEEPEST - len(path))] for path in known]
        counts = [*(self._counts[path] for path in known), self.places]
        return {
            "paths": torch.tensor(padded, dtype=torch.int8).view(-1, DEEPEST),
            "path_counts": torch.tensor(counts, dtype=torch.float64),
        }

    def restore(self, paths: Tensor | None, counts: Tensor | None) -> None:
        """Go on from what was kept; None: begin anew."""
        self._counts, self.places, self._tree = {}, 0.0, None
        if paths is None or counts is None or paths.shape[0] + 1 != counts.shape[0]:
            return
        for row, count in zip(paths.tolist(), counts.tolist()[:-1], strict=True):
            self._counts[tuple(rank for rank in row if rank >= 0)] = count
        self.places = float(counts[-1])

    def _fade(self) -> None:
        """Let old evidence count half, and forget what came true hardly ever."""
        if self.places >= _MEMORY:
            self.places *= 0.5
            self._counts = {path: count * 0.5 for path, count in self._counts.items()}
        if len(self._counts) > _MOST_PATHS // 2:
            kept = sorted(self._counts, key=lambda p: (-self._counts[p], len(p), p))
            self._counts = {path: self._counts[path] for path in kept[: _MOST_PATHS // 2]}


def _prior(path: Path) -> float:
    product = 1.0
    for rank in path:
        product *= RANK_PROBABILITY[rank]
    return product


def _rooted(order: Iterable[Path]) -> list[Path]:
    """Only paths whose beginning stands before them: forgetting can have torn some off."""
    known: set[Path] = {()}
    kept = []
    for path in order:
        if path[:-1] in known:
            known.add(path)
            kept.append(path)
    return kept
