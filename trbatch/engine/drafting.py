"""From rows to a draft tree, and from a verified tree back to rows.

The search of Token Recycling (arXiv 2408.08696, section 3.2) one tree level at a time, and its
update: every node's candidates are recycled, rejected branches too, the accepted path last so that
it wins. Here the tree has a fixed shape, the paper's; `best_first` picks its nodes by probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.ahead import put_first
from trbatch.engine.host_rows import HostRows
from trbatch.engine.matrix import ORDERS, Contexts, Found, Matrix, last_tokens
from trbatch.engine.tree import Tree


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted trees of B sequences, padded to T nodes; node 0 is the root, parents come first.

    A node that is not there, because there was no candidate or as padding, has token -1.
    """

    tokens: Tensor  # [B, T] int64
    parents: Tensor  # [B, T] index of each node's parent; the root's is 0
    depths: Tensor  # [B, T] edges from the root
    ancestors: Tensor  # [B, T, T] bool: row i is true at i and at each node on its way to the root
    contexts: Tensor  # [B, T, 3] each node's last tokens along its own path, newest first
    sizes: list[int]  # nodes of each sequence that are verified, the root included

    @property
    def offsets(self) -> list[int]:
        """Where each sequence's nodes begin when all are laid one after the other."""
        starts = [0]
        for size in self.sizes[:-1]:
            starts.append(starts[-1] + size)
        return starts


def roots(last: Tensor) -> Draft:
    """No draft at all: plain decoding. `last`: [B, 3] last committed tokens, newest first."""
    batch = last.shape[0]
    zero = last.new_zeros(batch, 1)
    return Draft(
        tokens=last[:, :1],
        parents=zero,
        depths=zero,
        ancestors=torch.ones(batch, 1, 1, dtype=torch.bool, device=last.device),
        contexts=last[:, None],
        sizes=[1] * batch,
    )


def from_template(matrix: Matrix, tree: Tree, slots: Tensor, tasks: Tensor, last: Tensor) -> Draft:
    """Fill one fixed tree for each of B sequences.

    Args:
        slots: [B] whose own rows.
        tasks: [B] whose matrix.
        last: [B, 3] last committed tokens, newest first.
    """
    shape = tree.on(last.device)
    batch = last.shape[0]
    contexts = last.new_full((batch, tree.size, ORDERS), -1)
    contexts[:, 0] = last
    for level in shape.levels:
        count = level.internal.shape[0]
        found = find_rows(matrix, slots, tasks, contexts[:, level.internal])
        rows = found.rows[:, 0].view(batch, count, -1)
        contexts[:, level.children, 0] = rows[:, level.parent_at, level.ranks]
        contexts[:, level.children, 1:] = contexts[:, level.parents, : ORDERS - 1]
    return Draft(
        tokens=contexts[:, :, 0],
        parents=shape.parents.expand(batch, -1),
        depths=shape.depths.expand(batch, -1),
        ancestors=shape.ancestors.expand(batch, -1, -1),
        contexts=contexts,
        sizes=[tree.size] * batch,
    )


def find_rows(matrix: Matrix, slots: Tensor, tasks: Tensor, contexts: Tensor) -> Found:
    """Rows of n places in each of B sequences, B·n in all.

    Args:
        contexts: [B, n, 3]. A place without a token has no row of its own: it gets some valid
            one, which is harmless because its children cannot be accepted.
    """
    count = contexts.shape[1]
    return matrix.find(
        Contexts(
            slots=slots.repeat_interleave(count),
            tasks=tasks.repeat_interleave(count),
            tokens=_valid(contexts.reshape(-1, ORDERS)),
        )
    )


def learn(
    matrix: Matrix,
    drafted: Draft,
    candidates: Tensor,
    on_path: Tensor,
    slots: Tensor,
    tasks: Tensor,
    turn: Tensor,
) -> None:
    """Recycle every node's candidates.

    Args:
        candidates: [B, T, k] likeliest next tokens at each node, likeliest first.
        on_path: [B, T] nodes whose tokens were accepted (the root included).
        turn: [B] a sequence's place among the batch by (row of the input, sample).
    """
    batch, size = drafted.tokens.shape
    node = torch.arange(size, device=turn.device)
    # All nodes first, in their order; the accepted path over them.
    own = (node + size * on_path).where(_whole_path(drafted), -1)
    # The task's matrix takes them sequence after sequence, all nodes of all before any path.
    shared = torch.where(own < 0, -1, own % size + size * (turn[:, None] + batch * on_path))
    at = Contexts(
        slots=slots.repeat_interleave(size),
        tasks=tasks.repeat_interleave(size),
        tokens=_valid(drafted.contexts.reshape(-1, ORDERS)),
    )
    matrix.write(at, candidates.flatten(0, 1), own.flatten(), shared.flatten())


def learn_few(
    rows: HostRows,
    drafted: Draft,
    candidates: Tensor,
    on_path: Tensor,
    slots: Tensor,
    tasks: Tensor,
    turn: Sequence[int],
) -> None:
    """The same as `learn`, node by node: for small trees in the CPU's memory."""
    new = candidates.to(torch.int32).numpy()
    tokens, parents, paths = (t.tolist() for t in (drafted.tokens, drafted.parents, on_path))
    contexts, slot_of, task_of = drafted.contexts.tolist(), slots.tolist(), tasks.tolist()
    in_turn = sorted(range(len(tokens)), key=lambda member: turn[member])
    for accepted in (False, True):  # the accepted paths over all other nodes
        for member in in_turn:
            whole = [True] * len(tokens[member])
            for node, token in enumerate(tokens[member]):
                whole[node] = token >= 0 and whole[parents[member][node]]
                if whole[node] and paths[member][node] == accepted:
                    row = new[member, node]
                    context = contexts[member][node]
                    rows.write_own(slot_of[member], context, row)
                    rows.write_shared(task_of[member], context, row)


def learn_prompt(
    matrix: Matrix,
    tokens: Tensor,
    first: int,
    candidates: Tensor | int,
    slot: int,
    task: int,
) -> None:
    """Recycle a prefilled piece of prompt; later places win.

    Where the prompt itself says what followed, that token goes first, before the model's own
    candidates: texts repeat their prompts (prompt lookup in Token Recycling's rows).

    Args:
        tokens: [n] the prompt up to the end of the piece, and the token after it if there is one.
        first: where the piece begins.
        candidates: [m, k] of the piece's m places; m alone where they were not computed: the rows
            that are there already stand in, and a place without a next token is left alone.
    """
    computed = isinstance(candidates, Tensor)
    count = candidates.shape[0] if isinstance(candidates, Tensor) else candidates
    known = tokens[first + 1 : first + 1 + count]
    count = count if computed else known.shape[0]
    contexts = last_tokens(tokens)[first : first + count]
    at = Contexts(
        slots=contexts.new_full((count,), slot),
        tasks=contexts.new_full((count,), task),
        tokens=contexts,
    )
    rows = candidates.clone() if isinstance(candidates, Tensor) else matrix.find(at).rows[:, 0]
    rows[: known.shape[0]] = put_first(known, rows[: known.shape[0]])
    order = torch.arange(count, device=tokens.device)
    matrix.write(at, rows, order, order)


def padded(flat: Tensor, sizes: Sequence[int], width: int, fill: int) -> Tensor:
    """Lay [N, …] values of B sequences, one after the other, out as [B, width, …]."""
    if all(size == width for size in sizes):
        return flat.view(len(sizes), width, *flat.shape[1:])
    out = flat.new_full((len(sizes), width, *flat.shape[1:]), fill)
    start = 0
    for index, size in enumerate(sizes):
        out[index, :size] = flat[start : start + size]
        start += size
    return out


def _whole_path(drafted: Draft) -> Tensor:
    """[B, T] whether a node and all its ancestors have a token."""
    missing = (drafted.tokens < 0).to(torch.float32)
    return (drafted.ancestors.to(torch.float32) @ missing[:, :, None])[:, :, 0] == 0


def _valid(tokens: Tensor) -> Tensor:
    """Contexts whose newest token can index a matrix."""
    newest = tokens[:, :1].clamp(min=0)
    return torch.cat([newest, tokens[:, 1:]], dim=1)
