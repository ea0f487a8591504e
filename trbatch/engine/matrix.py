"""What follows what: the adjacency rows that drafts come from.

Token Recycling (Luo et al., arXiv 2408.08696) keeps, for each token, the k candidates that last
followed it. One such matrix shared by a running batch loses nearly half of its accepted tokens,
because other sequences overwrite the row that this one is about to need. So each running sequence
has its own rows in front, keyed by its last 3, 2 and 1 tokens; behind them stand the task's rows of
the last 2 and of the last token, and last what the model says after the token alone:

    own, 3 tokens → own, 2 → own, 1 → task, 2 → task, 1 → model's bigram

A place's candidates come from the first of these that has a row, and from the next that has another
one, but for the task's row of one token (see `Matrix.find`): where both agree they are right more
often. Rows of several tokens lie in direct-mapped hash tables with the key stored beside the row: a
collision overwrites or misses, it never yields another key's row, and what was written last stays.
All writes of a step have a defined winner, decided by (row of the input, sample, position, node)
and never by slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATES = 8  # k
ORDERS = 3  # longest context that keys an own row, tokens
OWN_ROWS = 4096  # per sequence and order; a power of two
TASK_ORDERS = 2  # longest context that keys a task's row
PAIR_ROWS = 65_536  # of a task, keyed by two tokens; a power of two
EMPTY = -1  # no candidate
# Where a row is from, the least trusted first.
MODEL, TASK, TASK_PAIR, OWN = 0, 1, 2, 3  # OWN: of one token; + 1 of two, + 2 of three
ORIGINS = OWN + ORDERS
NOWHERE = ORIGINS  # there is no such row
NO_KEY = -2  # an empty place in a table: equal to no context's key
MIX = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed 64-bit number
_NO_CONTEXT = -1  # the text is shorter than the context


@dataclass(frozen=True, slots=True)
class Contexts:
    """Last tokens of n places. `slots`: [n], whose own rows; `tokens`: [n, 3], newest first.

    A text shorter than three tokens has -1 behind its first token. `tasks`: [n], whose matrix.
    """

    slots: Tensor
    tasks: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """Two rows for each of n places, the more trusted first."""

    rows: Tensor  # [n, 2, k] int64 token ids, -1 where there is no candidate
    origins: Tensor  # [n, 2] where each is from; a first one that is missing counts as MODEL's


class Matrix:
    """Own rows of each slot, rows of each task, and the model's bigrams behind all.

    Args:
        slots: sequences that run together.
        vocab_size: V.
        tasks: matrices kept at a time.
        orders: longest own context, 0 to 3; 0 has no own rows.
        task_orders: longest context of a task's rows, 1 or 2. Orders 0 and task orders 1 are the
            paper's single matrix.
        bigrams: [V, k] what the model says after each token alone; None: nothing.
    """

    def __init__(
        self,
        *,
        slots: int,
        vocab_size: int,
        tasks: int,
        device: torch.device,
        orders: int = ORDERS,
        task_orders: int = TASK_ORDERS,
        candidates: int = CANDIDATES,
        own_rows: int = OWN_ROWS,
        pair_rows: int = PAIR_ROWS,
        bigrams: Tensor | None = None,
    ) -> None:
        assert 0 <= orders <= ORDERS and own_rows & (own_rows - 1) == 0
        assert 1 <= task_orders <= TASK_ORDERS and pair_rows & (pair_rows - 1) == 0
        self.candidates = min(candidates, vocab_size)
        self.orders, self.vocab_size, self._own = orders, vocab_size, own_rows
        pair_rows = pair_rows if task_orders == TASK_ORDERS else 0
        k = self.candidates

        def table(*shape: int) -> tuple[Tensor, Tensor]:
            keys = torch.full(shape, NO_KEY, dtype=torch.int64, device=device)
            return keys, torch.full((*shape, k), EMPTY, dtype=torch.int32, device=device)

        self.keys, self.rows = table(slots, orders, own_rows)
        self.pair_keys, self.pair_rows = table(tasks, pair_rows)
        self.shared = torch.full((tasks, vocab_size, k), EMPTY, dtype=torch.int32, device=device)
        self.bigrams = torch.full((vocab_size, k), EMPTY, dtype=torch.int32, device=device)
        if bigrams is not None:
            self.bigrams.copy_(bigrams)
        # Rows of a task that were written since they were last sent to others (`replica`).
        self.changed = torch.zeros(tasks, vocab_size, dtype=torch.bool, device=device)
        self.pair_changed = torch.zeros(tasks, pair_rows, dtype=torch.bool, device=device)
        # Scratch of whoever writes: the highest priority that wants each place, -1 between calls.
        claims = (slots * orders * own_rows, tasks * vocab_size, tasks * pair_rows)
        self.claims, self.shared_claims, self.pair_claims = (
            torch.full((count,), -1, dtype=torch.int64, device=device) for count in claims
        )
        self._order_offset = torch.arange(orders, device=device) * own_rows

    def clear_slot(self, slot: int) -> None:
        """Forget a slot's own rows, before another sequence gets it."""
        self.keys[slot].fill_(NO_KEY)  # an assignment would wait for the device

    def clear_task(self, task: int) -> None:
        """Forget a task's matrix."""
        self.shared[task].fill_(EMPTY)
        self.pair_keys[task].fill_(NO_KEY)
        self.changed[task].fill_(False)
        self.pair_changed[task].fill_(False)

    def find(self, at: Contexts) -> Found:
        """The two rows of each place: the first that is there, and the next that differs.

        Behind a row of the sequence's own or of two tokens, what the model says after the last
        token in general is right more often than what once followed it in another text. So the
        task's row of a single token is passed over there, if the model has one.
        """
        sources, there = self._sources(at)
        count = there.shape[1]
        rank = torch.arange(count, device=there.device)
        first = torch.where(there, rank, count - 1).amin(1)
        row = sources.gather(1, first[:, None, None].expand(-1, 1, sources.shape[2]))
        other = there & (rank > first[:, None]) & (sources != row).any(2)
        second = torch.where(other, rank, count).amin(1)
        missing = (second == count)[:, None]
        index = second.clamp(max=count - 1)[:, None, None].expand(-1, 1, sources.shape[2])
        behind = sources.gather(1, index).masked_fill_(missing[:, :, None], EMPTY)
        origins = torch.stack([first, second], dim=1)
        origins = torch.where(origins == count, NOWHERE, self._origins(there.device)[
            origins.clamp(max=count - 1)
        ])  # fmt: skip
        return Found(torch.cat([row, behind], dim=1).long(), origins)

    def _origins(self, device: torch.device) -> Tensor:
        """Where each of the sources of `_sources` is from."""
        own = [OWN + order for order in reversed(range(self.orders))]
        pair = [TASK_PAIR] if self.pair_keys.numel() else []
        return torch.tensor([*own, *pair, TASK, MODEL], device=device)

    def _sources(self, at: Contexts) -> tuple[Tensor, Tensor]:
        """Rows [n, S, k] of all sources, the most trusted first, and [n, S] which are there."""
        keys = self._context_keys(at.tokens, max(self.orders, TASK_ORDERS))
        rows, there = [], []
        if self.orders:
            places = self._places(at.slots, keys[:, : self.orders])
            hits = self.keys.view(-1)[places] == keys[:, : self.orders]
            rows.append(self.rows.view(-1, self.candidates)[places].flip(1))
            there.append(hits.flip(1))
        if self.pair_keys.numel():
            pairs = keys[:, 1]
            place = self._pair_places(at.tasks, pairs)
            rows.append(self.pair_rows.view(-1, self.candidates)[place][:, None])
            there.append((self.pair_keys.view(-1)[place] == pairs)[:, None])
        last = at.tokens[:, 0]
        of_task, of_model = self.shared[at.tasks, last], self.bigrams[last]
        of_task_there, of_model_there = of_task[:, :1] >= 0, of_model[:, :1] >= 0
        if there:
            nearer = torch.cat(there, dim=1).any(1, keepdim=True)
            of_task_there = of_task_there & ~(nearer & of_model_there)
        rows += [of_task[:, None], of_model[:, None]]
        there += [of_task_there, of_model_there]
        return torch.cat(rows, dim=1), torch.cat(there, dim=1)

    def write(self, at: Contexts, rows: Tensor, priority: Tensor, shared: Tensor) -> None:
        """Write rows [n, k]; where two want one place the higher priority wins.

        Args:
            at: the contexts that the rows follow.
            priority: [n] distinct within a slot, ≥ 0; negative ones are not written.
            shared: [n] the same for the task's matrix, distinct in all.
        """
        rows = rows.to(torch.int32)
        keys = self._context_keys(at.tokens, max(self.orders, TASK_ORDERS))
        places = at.tasks * self.vocab_size + at.tokens[:, 0]
        won = _winners(self.shared_claims, places, shared)
        self.shared.view(-1, self.candidates)[places[won]] = rows[won]
        self.changed.view(-1)[places[won]] = True
        if self.pair_keys.numel():
            self._write_pairs(at.tasks, keys[:, 1], rows, shared)
        if self.orders:
            self._write_own(at.slots, keys[:, : self.orders], rows, priority)

    def _write_pairs(self, tasks: Tensor, keys: Tensor, rows: Tensor, priority: Tensor) -> None:
        places = self._pair_places(tasks, keys)
        won = _winners(self.pair_claims, places, torch.where(keys >= 0, priority, -1))
        self.pair_keys.view(-1)[places[won]] = keys[won]
        self.pair_rows.view(-1, self.candidates)[places[won]] = rows[won]
        self.pair_changed.view(-1)[places[won]] = True

    def _write_own(self, slots: Tensor, keys: Tensor, rows: Tensor, priority: Tensor) -> None:
        places = self._places(slots, keys).flatten()
        wanted = torch.where(keys >= 0, priority[:, None], -1).flatten()
        won = _winners(self.claims, places, wanted)
        source = torch.arange(rows.shape[0], device=rows.device).repeat_interleave(self.orders)
        self.keys.view(-1)[places[won]] = keys.flatten()[won]
        self.rows.view(-1, self.candidates)[places[won]] = rows[source[won]]

    def _context_keys(self, tokens: Tensor, orders: int) -> Tensor:
        """[n, 3] tokens, newest first -> [n, orders] keys; -1 where the text is too short."""
        key, keys = tokens[:, 0], [tokens[:, 0]]
        for order in range(1, orders):
            older = tokens[:, order]
            key = torch.where((older < 0) | (key < 0), _NO_CONTEXT, key * self.vocab_size + older)
            keys.append(key)
        return torch.stack(keys, dim=1)

    def _places(self, slots: Tensor, keys: Tensor) -> Tensor:
        """[n] slots, [n, orders] keys -> [n, orders] places in the flattened own tables."""
        hashed = ((keys * MIX) >> 32) & (self._own - 1)
        return slots[:, None] * (self.orders * self._own) + self._order_offset + hashed

    def pair_place(self, keys: Tensor) -> Tensor:
        """[n] keys of pairs -> [n] places in a task's table of pairs."""
        return ((keys * MIX) >> 32) & (self.pair_keys.shape[1] - 1)

    def _pair_places(self, tasks: Tensor, keys: Tensor) -> Tensor:
        """[n] tasks, [n] keys -> [n] places in the flattened tables of pairs."""
        return tasks * self.pair_keys.shape[1] + self.pair_place(keys)


def _winners(claims: Tensor, places: Tensor, priority: Tensor) -> Tensor:
    """Which entries may write: at each place the one of the highest priority. [n] bool.

    A plain indexed write with repeated places has no defined winner on a GPU.
    """
    claims.scatter_reduce_(0, places, priority, "amax")
    won = (claims[places] == priority) & (priority >= 0)
    claims[places] = -1
    return won


def last_tokens(tokens: Tensor) -> Tensor:
    """[n] consecutive tokens -> [n, 3] contexts, newest first, -1 before the start."""
    padded = torch.cat([tokens.new_full((ORDERS - 1,), -1), tokens])
    return padded.unfold(0, ORDERS, 1).flip(1)
