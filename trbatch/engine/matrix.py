"""What follows what: the adjacency rows that drafts come from.

Token Recycling (Luo et al., arXiv 2408.08696) keeps, for each token, the k candidates that last
followed it. One such matrix shared by a running batch loses nearly half of its accepted tokens,
because other sequences overwrite the row that this one is about to need. So each running sequence
has its own rows in front, keyed by its last 3, 2 and 1 tokens, and the task's matrix stands behind:

    own rows of the last 3 tokens → of the last 2 → of the last 1 → the task's row of the last 1

Own rows are small direct-mapped hash tables with the key stored beside the row: a collision
overwrites or misses, it never yields another key's row. All writes of a step have a defined winner,
decided by (row of the input, sample, position, node) and never by slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATES = 8  # k
ORDERS = 3  # longest context that keys an own row, tokens
OWN_ROWS = 4096  # per sequence and order; a power of two
EMPTY = -1  # no candidate
_NO_KEY = -2  # an empty place in a table: equal to no context's key
_NO_CONTEXT = -1  # the text is shorter than the context
MIX = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed 64-bit number


@dataclass(frozen=True, slots=True)
class Contexts:
    """Last tokens of n places. `slots`: [n], whose own rows; `tokens`: [n, 3], newest first.

    A text shorter than three tokens has -1 behind its first token. `tasks`: [n], whose matrix.
    """

    slots: Tensor
    tasks: Tensor
    tokens: Tensor


class Matrix:
    """Own rows of each slot and one dense matrix per task.

    Args:
        slots: sequences that run together.
        vocab_size: V.
        tasks: matrices kept at a time.
        orders: longest own context, 0 to 3; 0 has no own rows (the paper's single matrix).
    """

    def __init__(
        self,
        *,
        slots: int,
        vocab_size: int,
        tasks: int,
        device: torch.device,
        orders: int = ORDERS,
        candidates: int = CANDIDATES,
        own_rows: int = OWN_ROWS,
    ) -> None:
        assert 0 <= orders <= ORDERS and own_rows & (own_rows - 1) == 0
        self.candidates = min(candidates, vocab_size)
        self.orders, self.vocab_size, self._own = orders, vocab_size, own_rows
        k = self.candidates
        self.shared = torch.full((tasks, vocab_size, k), EMPTY, dtype=torch.int32, device=device)
        self.keys = torch.full((slots, orders, own_rows), _NO_KEY, dtype=torch.int64, device=device)
        self.rows = torch.full(
            (slots, orders, own_rows, k), EMPTY, dtype=torch.int32, device=device
        )
        # Scratch of `_winners`: the highest priority that wants each place, -1 between calls.
        self._claims = torch.full((self.keys.numel(),), -1, dtype=torch.int64, device=device)
        self._shared_claims = torch.full(
            (tasks * vocab_size,), -1, dtype=torch.int64, device=device
        )
        self._order_offset = torch.arange(orders, device=device) * own_rows
        self._order_number = torch.arange(1, orders + 1, device=device)

    def clear_slot(self, slot: int) -> None:
        """Forget a slot's own rows, before another sequence gets it."""
        self.keys[slot] = _NO_KEY

    def clear_task(self, task: int) -> None:
        """Forget a task's matrix."""
        self.shared[task] = EMPTY

    def find(self, at: Contexts) -> tuple[Tensor, Tensor]:
        """The row of each place, longest context first.

        Returns:
            [n, k] token ids, -1 where there is no candidate, and [n] where the row came from:
            1 to 3 is an own row of so many tokens, 0 the task's matrix.
        """
        rows = self.shared[at.tasks, at.tokens[:, 0]]
        longest = torch.zeros_like(at.slots)
        if self.orders:
            keys = self._context_keys(at.tokens)
            places = self._places(at.slots, keys)
            hits = self.keys.view(-1)[places] == keys
            # The longest context that hits: order 3 is the last column.
            longest = torch.where(hits, self._order_number, 0).amax(1)
            place = places.gather(1, (longest - 1).clamp_(min=0)[:, None])[:, 0]
            own = self.rows.view(-1, self.candidates)[place]
            rows = torch.where(longest[:, None] > 0, own, rows)
        return rows.long(), longest

    def write(self, at: Contexts, rows: Tensor, priority: Tensor, shared: Tensor) -> None:
        """Write rows [n, k]; where two want one place the higher priority wins.

        Args:
            at: the contexts that the rows follow.
            priority: [n] distinct within a slot, ≥ 0; negative ones are not written.
            shared: [n] the same for the task's matrix, distinct in all.
        """
        rows = rows.to(torch.int32)
        self._write_shared(at, rows, shared)
        if not self.orders:
            return
        keys = self._context_keys(at.tokens)
        places = self._places(at.slots, keys)
        wanted = torch.where(keys >= 0, priority[:, None], -1).flatten()
        keys, places = keys.flatten(), places.flatten()
        won = _winners(self._claims, places, wanted)
        self.keys.view(-1)[places[won]] = keys[won]
        source = torch.arange(rows.shape[0], device=rows.device).repeat_interleave(self.orders)
        self.rows.view(-1, self.candidates)[places[won]] = rows[source[won]]

    def _write_shared(self, at: Contexts, rows: Tensor, priority: Tensor) -> None:
        places = at.tasks * self.vocab_size + at.tokens[:, 0]
        won = _winners(self._shared_claims, places, priority)
        self.shared.view(-1, self.candidates)[places[won]] = rows[won]

    def _context_keys(self, tokens: Tensor) -> Tensor:
        """[n, 3] tokens, newest first -> [n, orders] keys; -1 where the text is too short."""
        key, keys = tokens[:, 0], [tokens[:, 0]]
        for order in range(1, self.orders):
            older = tokens[:, order]
            key = torch.where((older < 0) | (key < 0), _NO_CONTEXT, key * self.vocab_size + older)
            keys.append(key)
        return torch.stack(keys[: self.orders], dim=1)

    def _places(self, slots: Tensor, keys: Tensor) -> Tensor:
        """[n] slots, [n, orders] keys -> [n, orders] places in the flattened tables."""
        hashed = ((keys * MIX) >> 32) & (self._own - 1)
        return slots[:, None] * (self.orders * self._own) + self._order_offset + hashed


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
