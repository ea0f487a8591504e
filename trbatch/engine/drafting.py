"""From rows to a draft tree, and from a verified tree back to rows.

The breadth-first search of Token Recycling (arXiv 2408.08696, section 3.2), one tree level at a
time, and its update: every node's candidates are recycled, rejected branches too, the accepted path
last so that it wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.matrix import ORDERS, Contexts, Matrix, last_tokens
from trbatch.engine.tree import Tree


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted trees of B sequences. `tokens`: [B, T], -1 where there was no candidate.

    `contexts`: [B, T, 3], each node's last tokens along its own path, newest first.
    """

    tree: Tree
    tokens: Tensor
    contexts: Tensor


def draft(matrix: Matrix, tree: Tree, slots: Tensor, tasks: Tensor, last: Tensor) -> Draft:
    """Build the trees of B sequences.

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
        at = Contexts(
            slots=slots.repeat_interleave(count),
            tasks=tasks.repeat_interleave(count),
            # A node without a candidate has no row of its own: any valid id serves, since its
            # children cannot be accepted.
            tokens=_valid(contexts[:, level.internal].reshape(-1, ORDERS)),
        )
        rows = matrix.find(at).view(batch, count, -1)
        contexts[:, level.children, 0] = rows[:, level.parent_at, level.ranks]
        contexts[:, level.children, 1:] = contexts[:, level.parents, : ORDERS - 1]
    return Draft(tree=tree, tokens=contexts[:, :, 0], contexts=contexts)


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


def learn_prompt(
    matrix: Matrix,
    tokens: Tensor,
    first: int,
    candidates: Tensor,
    slot: int,
    task: int,
) -> None:
    """Recycle the candidates of a prefilled piece of prompt; later places win.

    Args:
        tokens: [n] the prompt up to the end of the piece.
        first: where the piece begins.
        candidates: [n - first, k] of the piece's places.
    """
    contexts = last_tokens(tokens)[first:]
    count = contexts.shape[0]
    at = Contexts(
        slots=contexts.new_full((count,), slot),
        tasks=contexts.new_full((count,), task),
        tokens=contexts,
    )
    order = torch.arange(count, device=tokens.device)
    matrix.write(at, candidates, order, order)


def _whole_path(drafted: Draft) -> Tensor:
    """[B, T] whether a node and all its ancestors have a token."""
    present = drafted.tokens >= 0
    ancestors = drafted.tree.on(present.device).ancestors
    missing = (~present).to(torch.float32) @ ancestors.to(torch.float32).T
    return missing == 0


def _valid(tokens: Tensor) -> Tensor:
    """Contexts whose newest token can index a matrix."""
    newest = tokens[:, :1].clamp(min=0)
    return torch.cat([newest, tokens[:, 1:]], dim=1)
