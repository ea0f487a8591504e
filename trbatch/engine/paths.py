"""Which paths of ranks come true: what a fixed tree is learned from.

Each token that comes has a rank in the row that should have predicted it. A path of ranks (r1, …,
rd) comes true at a place when the next d tokens had these ranks, whether or not any tree held it,
so counting the ends of all runs of ranks counts every path. No path can come true more often than
its beginning: paths in falling order are a tree, and so is each first part of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

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
        self._kept = _Counts()  # as it was saved or loaded the last time
        self._fresh = _Counts()  # since
        self._distinct = 0  # paths in both
        self._tree: tuple[float, Tree] | None = None  # at so many places, the tree that was learned

    @property
    def places(self) -> float:
        """Tokens counted; old ones count less."""
        return self._kept.places + self._fresh.places

    def count(self, run: list[int], rank: int | None) -> None:
        """Count a token's rank.

        Args:
            run: the ranks just before it, kept for the next call; a miss empties it.
            rank: in the row that should have predicted it, None for a miss.
        """
        fresh = self._fresh
        fresh.places += 1
        if rank is None:
            run.clear()
            return
        run.append(rank)
        del run[:-DEEPEST]
        for begin in range(len(run)):
            path = tuple(run[begin:])
            if (known := fresh.of.get(path)) is None:
                known = 0.0
                self._distinct += path not in self._kept.of
            fresh.of[path] = known + 1
        if self.places >= _MEMORY or self._distinct > _MOST_PATHS:
            self._fade()

    def probabilities(self) -> dict[Path, float]:
        """Of all known paths, those of the paper's tree included."""
        total = self.places + _PRIOR
        found = {path: count / total for path, count in self._kept.with_others(self._fresh).items()}
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
        counted = self._kept.with_others(self._fresh)
        known = sorted(counted)
        padded = [[*path, *[-1] * (DEEPEST - len(path))] for path in known]
        counts = [*(counted[path] for path in known), self.places]
        return {
            "paths": torch.tensor(padded, dtype=torch.int8).view(-1, DEEPEST),
            "path_counts": torch.tensor(counts, dtype=torch.float64),
        }

    def restore(self, paths: Tensor | None, counts: Tensor | None) -> None:
        """Go on from what was kept; None or what is no such thing: begin anew."""
        self._fresh, self._tree = _Counts(), None
        self._kept = _Counts.of_tensors(paths, counts) or _Counts()
        self._distinct = len(self._kept.of)

    def added_to(self, paths: Tensor | None, counts: Tensor | None) -> PathCounts:
        """What others have kept, with what was counted here since `saved`."""
        others = _Counts.of_tensors(paths, counts)
        both = PathCounts()
        both._kept, both._fresh = self._kept if others is None else others, self._fresh
        both._distinct = len(both._kept.with_others(both._fresh))
        while both.places >= _MEMORY or both._distinct > _MOST_PATHS:
            both._fade()
        return both

    def saved(self) -> None:
        """What was counted so far is kept."""
        self._kept = _Counts(self._kept.with_others(self._fresh), self.places)
        self._fresh = _Counts()

    def _fade(self) -> None:
        """Let old evidence count half, and forget what came true hardly ever."""
        factor = 0.5 if self.places >= _MEMORY else 1.0
        both = self._kept.with_others(self._fresh)
        known = {path: count * factor for path, count in both.items()}
        if len(known) > _MOST_PATHS // 2:
            best = sorted(known, key=lambda p: (-known[p], len(p), p))
            known = {path: known[path] for path in best[: _MOST_PATHS // 2]}
        self._distinct = len(known)
        self._kept, self._fresh = (
            _Counts({p: n * factor for p, n in part.of.items() if p in known}, part.places * factor)
            for part in (self._kept, self._fresh)
        )


@dataclass(slots=True)
class _Counts:
    """Counts by path, and of places at all."""

    of: dict[Path, float] = field(default_factory=dict)
    places: float = 0.0

    def with_others(self, fresh: _Counts) -> dict[Path, float]:
        """Both together."""
        found = dict(self.of)
        for path, count in fresh.of.items():
            found[path] = found.get(path, 0.0) + count
        return found

    @classmethod
    def of_tensors(cls, paths: Tensor | None, counts: Tensor | None) -> Self | None:
        """What `to_tensors` has made; None if it did not."""
        if paths is None or counts is None or tuple(counts.shape) != (len(paths) + 1,):
            return None
        ranks = paths.shape[1:] == (DEEPEST,) and not paths.is_floating_point()
        if not ranks or not bool((torch.isfinite(counts) & (counts >= 0)).all()):
            return None
        if paths.numel() and not -1 <= int(paths.min()) <= int(paths.max()) < len(RANK_PROBABILITY):
            return None
        rows = [tuple(rank for rank in row if rank >= 0) for row in paths.tolist()]
        return cls(dict(zip(rows, counts.tolist()[:-1], strict=True)), float(counts[-1]))


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
