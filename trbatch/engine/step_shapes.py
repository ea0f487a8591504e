"""Which shape makes a step: so many rows, padded up to a bucket, and so many tokens a row."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from trbatch.engine.captured import Replay
from trbatch.engine.device_state import Accepted
from trbatch.engine.sampling import Kind
from trbatch.engine.transfer import send

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # rows
# Steps of a number of rows that a larger shape makes as well, before they get one of their own:
# capturing it takes about as long as so many steps lose by padding.
WORTH_A_SHAPE = 64
_AT_MOST = 2  # times as many rows


def bucket_of(rows: int, capacity: int) -> int:
    """Rows that a step of `rows` sequences is padded to."""
    at = bisect_left(BUCKETS, rows)
    return min(BUCKETS[at] if at < len(BUCKETS) else rows, max(capacity, rows))


class Key(NamedTuple):
    """What shapes differ in."""

    rows: int
    size: int  # tokens a row
    kind: Kind  # how tokens are chosen, at most


@dataclass(slots=True)
class Shape:
    """A step of one shape, and its inputs."""

    inputs: Tensor  # [2, B]
    replay: Replay[Accepted]

    def fill(self, rows: ListLike[int], reads: ListLike[int]) -> None:
        """Say whose step it is, padding behind. See `device_step.Batch`."""
        padding = self.inputs.shape[1] - len(rows)
        numbers = [[*rows, *[-1] * padding], [*reads, *[0] * padding]]
        send(numbers, self.inputs)


class StepShapes:
    """The shapes of an engine's steps, made when they are needed.

    Args:
        make: one of this key; takes long where it captures.
        lending: whether a shape of more rows makes the first steps of fewer.
        least: tokens a row of the steps for which it does. Plain steps that others are compared
            with are too seldom to ever get a shape of their own, and have to take what they take.
    """

    def __init__(self, make: Callable[[Key], Shape], *, lending: bool, least: int) -> None:
        self._make, self._lending, self._least = make, lending, least
        self.made: dict[Key, Shape] = {}
        self.lent: Counter[Key] = Counter()  # steps that a larger shape made for this one

    def get(self, key: Key) -> Shape:
        """This very shape."""
        if key not in self.made:
            self.made[key] = self._make(key)
        return self.made[key]

    def key_for(self, own: Key) -> Key:
        """Which shape makes a step of the shape `own`: that, or for the first few a larger one."""
        lends = self._lending and own.size >= self._least
        if own in self.made or not lends or self.lent[own] >= WORTH_A_SHAPE:
            return own
        rows = range(own.rows + 1, _AT_MOST * own.rows + 1)
        larger = [key for key in self.made if key.rows in rows and key[1:] == own[1:]]
        return min(larger, default=own)

    def take(self, own: Key) -> tuple[Shape, bool]:
        """The shape that makes the next step of the shape `own`, and whether it is another."""
        key = self.key_for(own)
        self.lent[own] += key != own
        return self.get(key), key != own
