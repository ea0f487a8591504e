"""Accept or reject: the longest path of a drafted tree that agrees with the model's own choices.

At a node the model's own next token is chosen (argmax, or sampled with the row's noise for that
position), and the walk follows the child that equals it. Drafts are deterministic, so what comes
out is exactly what the model alone would have said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trbatch.engine.drafting import Draft

NOT_CHOSEN = -2  # equals no drafted token, not even the absent one


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was accepted. D is the tree's depth."""

    nodes: Tensor  # [B, D+1] accepted nodes from the root on, -1 behind the end
    tokens: Tensor  # [B, D+1] the model's token after each of them, -1 behind the end
    on_path: Tensor  # [B, T] bool


def accept(drafted: Draft, chosen: Tensor) -> Verdict:
    """Follow the agreeing children from the root.

    A node is alive iff token(v) = chosen(parent(v)) for v itself and each ancestor but the root;
    the deepest alive node ends the path (of equals the first).

    Args:
        chosen: [B, T] the model's own next token at each node; `NOT_CHOSEN` where nobody asked.
    """
    shape = drafted.tree.on(chosen.device)
    agrees = drafted.tokens == chosen[:, shape.parents]
    agrees[:, 0] = True
    broken = (~agrees).to(torch.float32) @ shape.ancestors.to(torch.float32).T
    size = drafted.tree.size
    score = shape.depths * size + torch.arange(size - 1, -1, -1, device=chosen.device)
    last = torch.where(broken == 0, score, -1).argmax(1)
    nodes = shape.paths[last]
    tokens = chosen.gather(1, nodes.clamp(min=0)).where(nodes >= 0, -1)
    return Verdict(nodes=nodes, tokens=tokens, on_path=shape.ancestors[last])


def walk(
    drafted: Draft,
    members: Tensor,
    choose_at: Callable[[Tensor, Tensor, int], Tensor],
    chosen: Tensor,
) -> None:
    """Choose tokens only where the walk comes by, for rows that sample or process their logits.

    Args:
        members: [m] the sequences to walk.
        choose_at: (members [a], nodes [a], depth) -> [a] tokens.
        chosen: [B, T], filled at the visited nodes.
    """
    children = drafted.tree.on(chosen.device).children
    node, depth = torch.zeros_like(members), 0
    while members.numel():
        token = choose_at(members, node, depth)
        chosen[members, node] = token
        below = children[node]
        drafts = drafted.tokens[members[:, None], below.clamp(min=0)]
        match = (below >= 0) & (drafts == token[:, None])
        found, at = match.max(dim=1)
        node = below.gather(1, at[:, None])[:, 0][found]
        members, depth = members[found], depth + 1
