"""Pages of keys and values: who holds which, and where each token's lie.

One tensor per layer shape, [layers, 2, kv_heads, slots, head_dim]; a page is `page_size` slots in a
row. Pages of one sequence may lie anywhere; where they are adjacent its keys are a plain view, and
the CPU path needs that to be quick. Knows nothing of trees: a step's in-flight nodes lie in the
slots behind the committed tokens and are moved by `move`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from trbatch.engine.transfer import to_device

_FREE, _HELD, _IDLE = 0, 1, 2
_FREE_RUNS = re.compile(rb"\x00+")


class PagePool:
    """Who holds which page.

    A page is held by one sequence or by several that say the same; or it is free; or it is idle:
    nobody holds it, but what lies in it is known and may be wanted again. Idle pages are given away
    when no free ones are left, first the one that was left longest ago.

    Args:
        pages: how many there are.
        adjacent: whether pages that are taken together should be neighbours. Looking for such
            takes time.
        forget: is told of each idle page that is given away.
    """

    def __init__(
        self,
        pages: int,
        *,
        adjacent: bool = True,
        forget: Callable[[int], None] = lambda page: None,
    ) -> None:
        self.pages = pages
        self.forget = forget
        self._adjacent = adjacent
        self._state = bytearray(pages)
        self._holders = [0] * pages
        self._known: set[int] = set()
        # In the order in which they were left. Of a plain dict, the first key takes the longer to
        # find the more were removed before it.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._held = 0
        # Free ones, the next last. Unused where neighbours are wanted.
        self._stack = [] if adjacent else list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self.pages - self._held

    def can_take(self, count: int) -> bool:
        """Whether `count` pages can be had, adjacent or not."""
        return count <= self.free

    def take(self, count: int, *, behind: int = -1) -> list[int]:
        """Take `count` pages, adjacent if that is wanted and possible (the shortest such run).

        Args:
            behind: a page whose next neighbours are wanted first.

        Raises:
            AssertionError: fewer can be had; ask `can_take` first.
        """
        assert self.can_take(count), f"{count} pages asked for, {self.free} free"
        if self._adjacent:
            taken = self._neighbours(count, behind)
        else:
            taken = [self._stack.pop() if self._stack else self._oldest() for _ in range(count)]
        for page in taken:
            self._unmark(page)
            self._state[page], self._holders[page] = _HELD, 1
        self._held += count
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages whose text is known once more."""
        for page in pages:
            assert page in self._known, f"page {page} may say anything"
            if self._holders[page] == 0:
                del self._idle[page]
                self._state[page] = _HELD
                self._held += 1
            self._holders[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """Let go of pages; those behind others are given away before these."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} was free already"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._held -= 1
                if page in self._known:
                    self._state[page] = _IDLE
                    self._idle[page] = None
                else:
                    self._set_free(page)

    def know(self, page: int) -> None:
        """Keep a page that is held for later, too, when nobody holds it any more."""
        assert self._holders[page] > 0, f"nobody holds page {page}"
        self._known.add(page)

    def unknow(self, page: int) -> None:
        """A page's text is of no use any more."""
        self._known.discard(page)
        if page in self._idle:
            del self._idle[page]
            self._set_free(page)

    def _set_free(self, page: int) -> None:
        self._state[page] = _FREE
        if not self._adjacent:
            self._stack.append(page)

    def _unmark(self, page: int) -> None:
        """Of a page that is being taken: whatever was known of it is so no longer."""
        if page in self._known:
            self._known.remove(page)
            self._idle.pop(page, None)
            self.forget(page)

    def _oldest(self) -> int:
        return self._idle.popitem(last=False)[0]

    def _neighbours(self, count: int, behind: int) -> list[int]:
        wanted = bytes(count)
        if behind >= 0 and self._state[behind + 1 : behind + 1 + count] == wanted:
            return list(range(behind + 1, behind + 1 + count))
        runs = [(m.end() - m.start(), m.start()) for m in _FREE_RUNS.finditer(self._state)]
        fitting = [run for run in runs if run[0] >= count]
        if fitting:
            first = min(fitting)[1]
            return list(range(first, first + count))
        first = self._run_with_idle(wanted)
        if first >= 0:
            return list(range(first, first + count))
        scattered = [
            page for length, first in sorted(runs, key=lambda run: -run[0])
            for page in range(first, first + length)
        ]  # fmt: skip
        return [*scattered, *self._idle][:count]

    def _run_with_idle(self, wanted: bytes) -> int:
        """The run that is made when idle pages are freed one after the other; -1: there is none."""
        state, count = bytearray(self._state), len(wanted)
        for page in self._idle:
            state[page] = _FREE
            first = state.find(wanted, max(0, page - count + 1), page + count)
            if first >= 0:
                return first
        return -1


class Room:
    """The pages of one sequence, seen as slots."""

    __slots__ = ("_changes", "_device", "_first", "_name", "_page_size", "_slots", "_told", "pages")

    def __init__(self, pages: Sequence[int], page_size: int, device: torch.device) -> None:
        self._page_size, self._device = page_size, device
        self._slots: Tensor | None = None
        self._first: int | None = None
        self._told = 0  # pages that `news` need not name
        self._changes: dict[int, Room] | None = None  # see `note`
        self._name = -1
        self.pages: list[int] = []
        self.put(0, pages)

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return len(self.pages) * self._page_size

    @property
    def first(self) -> int | None:
        """Its first slot if its pages are adjacent."""
        return self._first

    @property
    def slots(self) -> Tensor:
        """[capacity] int64: the slot of each place in the sequence, on the cache's device."""
        if self._slots is None:
            starts = to_device(self.pages, self._device, torch.int64) * self._page_size
            places = torch.arange(self._page_size, device=self._device)
            self._slots = (starts[:, None] + places).flatten()
        return self._slots

    def put(self, at: int, pages: Sequence[int]) -> list[int]:
        """Put pages in the places of those from its page `at` on, or behind its last.

        Returns:
            Those whose places they took.
        """
        assert at <= len(self.pages)
        before = self.pages[at : at + len(pages)]
        self.pages[at : at + len(pages)] = pages
        self._changed(at)
        return before

    def cut(self, count: int) -> list[int]:
        """Keep the first `count` pages only. Returns the others."""
        rest = self.pages[count:]
        del self.pages[count:]
        self._changed(count)
        return rest

    def note(self, changes: dict[int, Room], name: int) -> None:
        """All its pages are known; from now on it is among `changes`, by its name, if any is new.

        So nobody has to ask all rooms.
        """
        self._changes, self._name, self._told = changes, name, len(self.pages)

    def news(self) -> list[tuple[int, int]]:
        """(place, page) of each page that may be another than when this or `note` came last."""
        begin, self._told = self._told, len(self.pages)
        return list(enumerate(self.pages[begin:], begin))

    def _changed(self, begin: int) -> None:
        self._told = min(self._told, begin)
        if self._changes is not None:
            self._changes[self._name] = self
        self._slots = None
        first = self.pages[0] if self.pages else 0
        adjacent = self.pages == list(range(first, first + len(self.pages)))
        self._first = first * self._page_size if adjacent else None


class KVCache:
    """Keys and values of all layers, all sequences.

    Args:
        layer_shapes: (kv_heads, head_dim) of each layer.
        slots: tokens that fit in all, rounded down to whole pages.
        adjacent: whether a sequence's pages should be neighbours.
    """

    def __init__(
        self,
        layer_shapes: Sequence[tuple[int, int]],
        *,
        slots: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        adjacent: bool = True,
    ) -> None:
        self.page_size, self.adjacent = page_size, adjacent
        self.pool = PagePool(slots // page_size, adjacent=adjacent)
        self.device = device
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

    def room_of(self, pages: Sequence[int]) -> Room:
        """These pages, which somebody holds, as slots."""
        return Room(pages, self.page_size, self.device)

    def take_room(self, tokens: int) -> Room:
        """Take pages for `tokens` tokens; ask `pool.can_take(pages_for(tokens))` first."""
        return self.room_of(self.pool.take(self.pages_for(tokens)))

    def give_back(self, room: Room) -> None:
        """Let go of a sequence's pages."""
        self.pool.give_back(room.pages)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` [n] to `target` [n] in every layer. Reads all before it writes."""
        for stack in self._stacks:
            stack.index_copy_(3, target, stack.index_select(3, source))
