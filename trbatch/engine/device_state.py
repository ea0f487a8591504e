"""What a step on the device has to know of each running sequence, and what it tells in return.

Steps are launched before the host has seen what the one before gave, so whatever moves from step to
step lies on the device: the host writes a slot when a sequence takes it, the steps go on from there
by themselves, and a sequence that ends switches its own slot off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.matrix import ORDERS
from trbatch.engine.transfer import send

GOES_ON, STOPPED, FULL = 0, 1, 2  # how a row's step ended; FULL: no token is left
MOST_TURNS = 1 << 46  # a turn is part of a priority of 63 bits (`kernels.learn`)
REPORT_NUMBERS = 3  # of a row's report, before its tokens
NO_RANK = -2
_SOURCE = 3  # row of `Slots.whole`
_ALIGNED = 16  # slots


@dataclass(frozen=True, slots=True)
class Noise:
    """How a sequence samples. `begin`: tokens of its prompt; see `noise.place_key`."""

    begin: int = 0
    temperature: float = 0.0
    min_p: float = 0.0
    seed: int = 0
    sample: int = 0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Slots:
    """S slots, each for one sequence. A row of a batch names its slot, -1 for a padding row."""

    # Numbers of a slot that have one type lie in one piece: a slot is written with few copies.
    # Their columns W ≥ S are as many as keep each row aligned, for which kernels are compiled.
    whole: Tensor  # [9, W] int32: lengths, left, read, source, matched, tasks, begins, …
    real: Tensor  # [3, W] float32: temperatures, min_ps, top_ps
    wide: Tensor  # [2, W] int64: turns, seeds
    last: Tensor  # [S, 3] int32 the last committed tokens, newest first, -1 before the start
    stops: Tensor  # [S, M] int32 ids that end the text, -1 behind them
    active: Tensor  # [S] bool
    pages: Tensor  # [S, P] int32 of the K/V cache, -1 behind them
    texts: Tensor  # [S, L] int32 the committed tokens; what is behind them means nothing

    @classmethod
    def empty(
        cls, count: int, *, stops: int, pages: int, longest: int, device: torch.device
    ) -> Slots:
        """Slots that nobody has.

        Args:
            count: S.
            stops: M, most ids that end a text.
            pages: P, most pages of a sequence.
            longest: L, most tokens of a text.
        """

        def full(*shape: int, value: int = -1, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        width = -(-count // _ALIGNED) * _ALIGNED
        whole = full(9, width, value=0)
        whole[_SOURCE] = -1
        return cls(
            whole=whole,
            real=full(3, width, value=0, dtype=torch.float32),
            wide=full(2, width, value=0, dtype=torch.int64),
            last=full(count, ORDERS),
            stops=full(count, stops),
            active=full(count, value=0, dtype=torch.bool),
            pages=full(count, pages),
            texts=full(count, longest),
        )

    def put(
        self,
        slot: int,
        tokens: Sequence[int],
        *,
        left: int,
        stops: Sequence[int],
        pages: Sequence[int],
        task: int,
        turn: int,
        noise: Noise | None = None,
    ) -> None:
        """Give a slot to a sequence: it runs from the step on that is launched next. Never waits.

        The slow and plain way, one sequence and one copy after the other; see `kernels.admit`.

        Args:
            tokens: committed ones, the next root last.
            noise: None takes the likeliest tokens.
        """
        noise = noise or Noise()
        self.check(tokens, left=left, stops=stops, pages=pages, turn=turn)
        newest = [*tokens[: -ORDERS - 1 : -1], *[-1] * ORDERS][:ORDERS]
        whole = (len(tokens), left, 0, -1, 0, task, noise.begin, noise.top_k, noise.sample)
        send(whole, self.whole[:, slot])
        send((noise.temperature, noise.min_p, noise.top_p), self.real[:, slot])
        send((turn, noise.seed), self.wide[:, slot])
        for table, values in ((self.last, newest), (self.stops, stops), (self.pages, pages)):
            send([*values, *[-1] * (table.shape[1] - len(values))], table[slot])
        send(tokens, self.texts[slot, : len(tokens)])
        self.active[slot].fill_(True)

    def check(
        self,
        tokens: Sequence[int],
        *,
        left: int,
        stops: Sequence[int],
        pages: Sequence[int],
        turn: int,
    ) -> None:
        """Whether a slot can hold such a sequence; see `put`."""
        assert left > 0, "a sequence that may say nothing more has ended"
        assert 0 <= turn < MOST_TURNS, f"turn {turn}"
        for table, values in ((self.texts, tokens), (self.stops, stops), (self.pages, pages)):
            width = table.shape[1]
            assert len(values) <= width, f"{len(values)} values, room for {width}"

    @property
    def lengths(self) -> Tensor:
        """[S] committed tokens, the last one (the next root) included."""
        return self.whole[0, : len(self.active)]

    @property
    def left(self) -> Tensor:
        """[S] tokens that may still come; of an active slot > 0."""
        return self.whole[1, : len(self.active)]

    @property
    def read(self) -> Tensor:
        """[S] how many of its tokens its spine has followed (`kernels.spine`)."""
        return self.whole[2, : len(self.active)]

    @property
    def source(self) -> Tensor:
        """[S] place in the text whose token should come next, -1: none."""
        return self.whole[_SOURCE, : len(self.active)]

    @property
    def matched(self) -> Tensor:
        """[S] tokens before that place that agree with the text's last ones."""
        return self.whole[4, : len(self.active)]

    @property
    def tasks(self) -> Tensor:
        """[S] whose matrix it teaches."""
        return self.whole[5, : len(self.active)]

    @property
    def begins(self) -> Tensor:
        """[S] tokens of its prompt."""
        return self.whole[6, : len(self.active)]

    @property
    def top_ks(self) -> Tensor:
        """[S] top-k, 0 for all."""
        return self.whole[7, : len(self.active)]

    @property
    def samples(self) -> Tensor:
        """[S] which sample of its row it is."""
        return self.whole[8, : len(self.active)]

    @property
    def temperatures(self) -> Tensor:
        """[S] 0 takes the likeliest."""
        return self.real[0, : len(self.active)]

    @property
    def min_ps(self) -> Tensor:
        """[S] min-p, 0 for none."""
        return self.real[1, : len(self.active)]

    @property
    def top_ps(self) -> Tensor:
        """[S] top-p, 1 for all."""
        return self.real[2, : len(self.active)]

    @property
    def turns(self) -> Tensor:
        """[S] who comes before whom, by (row of the input, sample).

        From 0 up to MOST_TURNS, and of sequences that run together no two the same.
        """
        return self.wide[0, : len(self.active)]

    @property
    def seeds(self) -> Tensor:
        """[S] of its row."""
        return self.wide[1, : len(self.active)]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a step gave B rows whose trees have T nodes and at most D levels below the root.

    A row that did not run (padding, or its slot is not active) has 0, -1 and False everywhere.
    """

    # [B, 3 + 2 (D+1)] int32 all that the host is told, in one piece for one copy.
    report: Tensor
    nodes: Tensor  # [B, D+1] int32 accepted nodes after which a token was taken, -1 behind
    # [B, T] bool all agreeing nodes, also those that an end of the text cut off: rows learn from
    # them as well. The root's says whether the row ran.
    on_path: Tensor
    sources: Tensor  # [B, D] int32 cache slots to move keys and values from, -1: nothing moves
    targets: Tensor  # [B, D] int32 where to

    @classmethod
    def nothing(cls, batch: int, size: int, deepest: int, device: torch.device) -> Accepted:
        """Of a step in which no row ran.

        Args:
            size: T.
            deepest: D.
        """

        def missing(width: int) -> Tensor:
            return torch.full((batch, width), -1, dtype=torch.int32, device=device)

        report = missing(REPORT_NUMBERS + 2 * (deepest + 1))
        report[:, :REPORT_NUMBERS] = 0
        report[:, REPORT_NUMBERS + deepest + 1 :] = NO_RANK
        on_path = torch.zeros(batch, size, dtype=torch.bool, device=device)
        return cls(report, missing(deepest + 1), on_path, missing(deepest), missing(deepest))

    @property
    def count(self) -> Tensor:
        """[B] tokens taken."""
        return self.report[:, 0]

    @property
    def finished(self) -> Tensor:
        """[B] GOES_ON, STOPPED or FULL."""
        return self.report[:, 1]

    @property
    def drafted(self) -> Tensor:
        """[B] how many of the tokens taken had been drafted."""
        return self.report[:, 2]

    @property
    def tokens(self) -> Tensor:
        """[B, D+1] the tokens taken, -1 behind them."""
        return self.report[:, REPORT_NUMBERS : REPORT_NUMBERS + self.nodes.shape[1]]

    @property
    def ranks(self) -> Tensor:
        """[B, D+1] the rank of each of them in the row that should have predicted it: -1 if that
        had it not, `NO_RANK` where nobody looked."""
        return self.report[:, REPORT_NUMBERS + self.nodes.shape[1] :]
