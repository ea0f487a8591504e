"""Pages of keys and values: who holds which, and where each token's lie.

One tensor per layer shape, [layers, 2, kv_heads, slots, head_dim]; a page is `page_size` slots in a
row. A sequence takes all the pages it may need when it is admitted, in one run where there is one:
then its keys are a plain view, which the CPU path needs to be quick. Knows nothing of trees: a
step's in-flight nodes lie in the slots behind the committed tokens and are moved by `move`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.transfer import to_device


class PagePool:
    """Free and taken pages.

    Args:
        pages: how many there are.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = [(0, pages)] if pages else []  # runs of (first, count), ascending

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return sum(count for _, count in self._free)

    def can_take(self, count: int) -> bool:
        """Whether `count` pages are free, in one run or several."""
        return count <= self.free

    def take(self, count: int) -> list[int]:
        """Take `count` pages, adjacent if any run is long enough (the shortest such run).

        Raises:
            AssertionError: fewer are free; ask `can_take` first.
        """
        assert self.can_take(count), f"{count} pages asked for, {self.free} free"
        fitting = [run for run in self._free if run[1] >= count]
        if fitting:
            first, length = min(fitting, key=lambda run: run[1])
            self._replace((first, length), (first + count, length - count))
            return list(range(first, first + count))
        taken: list[int] = []
        for run in sorted(self._free, key=lambda run: -run[1]):
            part = min(run[1], count - len(taken))
            taken += range(run[0], run[0] + part)
            self._replace(run, (run[0] + part, run[1] - part))
            if len(taken) == count:
                break
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Free pages that `take` gave."""
        runs = self._free + [(page, 1) for page in pages]
        merged: list[tuple[int, int]] = []
        for first, count in sorted(runs):
            if merged and sum(merged[-1]) == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            else:
                assert not merged or sum(merged[-1]) < first, f"page {first} was free already"
                merged.append((first, count))
        self._free = merged

    def _replace(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        at = self._free.index(old)
        self._free[at : at + 1] = [new] if new[1] else []


@dataclass(frozen=True, slots=True)
class Room:
    """The pages of one sequence, seen as slots.

    `slots` maps a place in the sequence to its slot; `first` is the first if they are adjacent.
    """

    pages: tuple[int, ...]
    slots: Tensor  # [capacity] int64, on the cache's device
    first: int | None

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.slots.shape[0]


class KVCache:
    """Keys and values of all layers, all sequences.

    Args:
        layer_shapes: (kv_heads, head_dim) of each layer.
        slots: tokens that fit in all, rounded down to whole pages.
    """

    def __init__(
        self,
        layer_shapes: Sequence[tuple[int, int]],
        *,
        slots: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.page_size = page_size
        self.pool = PagePool(slots // page_size)
        self._device = device
        self._stacks: list[Tensor] = []
        self._places: dict[int, tuple[Tensor, int]] = {}  # layer -> its stack, and where in it
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # the same as views: keys, values
        for shape in dict.fromkeys(layer_shapes):
            members = [i for i, other in enumerate(layer_shapes) if other == shape]
            # Zeros, not empty: a masked slot is multiplied by 0, and 0 x NaN is NaN.
            stack = torch.zeros(
                len(members), 2, shape[0], self.pool.pages * page_size, shape[1],
                device=device, dtype=dtype,
            )  # fmt: skip
            self._stacks.append(stack)
            for at, layer in enumerate(members):
                self._places[layer] = stack, at
                self._layers[layer] = stack[at, 0], stack[at, 1]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [kv_heads, slots, head_dim]."""
        return self._layers[index]

    def place(self, index: int) -> tuple[Tensor, int]:
        """The stack [layers, 2, kv_heads, slots, head_dim] that a layer is in, and where."""
        return self._places[index]

    @property
    def stacks(self) -> list[Tensor]:
        """All keys and values, a stack for each shape of layer."""
        return self._stacks

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take_room(self, tokens: int) -> Room:
        """Take pages for `tokens` tokens; ask `pool.can_take(pages_for(tokens))` first."""
        pages = self.pool.take(self.pages_for(tokens))
        starts = to_device(pages, self._device, torch.int64) * self.page_size
        slots = (starts[:, None] + torch.arange(self.page_size, device=self._device)).flatten()
        adjacent = pages == list(range(pages[0], pages[0] + len(pages)))
        first = pages[0] * self.page_size if adjacent else None
        return Room(pages=tuple(pages), slots=slots, first=first)

    def give_back(self, room: Room) -> None:
        """Free a sequence's pages."""
        self.pool.give_back(room.pages)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` [n] to `target` [n] in every layer. Reads all before it writes."""
        for stack in self._stacks:
            stack.index_copy_(3, target, stack.index_select(3, source))
