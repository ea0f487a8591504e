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
    """What was accepted. D is the depth of the deepest tree."""

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
    size = chosen.shape[1]
    agrees = drafted.tokens == chosen.gather(1, drafted.parents)
    agrees[:, 0] = True
    wrong = (~agrees).to(torch.float32)[:, :, None]
    alive = (drafted.ancestors.to(torch.float32) @ wrong)[:, :, 0] == 0
    node = torch.arange(size, device=chosen.device)
    # Parents come first, so the first of the deepest has the highest score.
    last = torch.where(alive, drafted.depths * size + (size - 1 - node), -1).argmax(1)
    index = last[:, None, None].expand(-1, 1, size)
    on_path = drafted.ancestors.gather(1, index)[:, 0]
    width = int(drafted.depths.max()) + 1
    nodes = torch.where(on_path, node, size).sort(dim=1).values[:, :width]
    nodes = torch.where(nodes < size, nodes, -1)
    tokens = chosen.gather(1, nodes.clamp(min=0)).where(nodes >= 0, -1)
    return Verdict(nodes=nodes, tokens=tokens, on_path=on_path)


def accept_few(drafted: Draft, chosen: Tensor) -> Verdict:
    """The same as `accept`, node by node: for small trees in the CPU's memory."""
    tokens, parents, picks = (t.tolist() for t in (drafted.tokens, drafted.parents, chosen))
    width = int(drafted.depths.max()) + 1
    nodes, after = [], []
    on_path = torch.zeros_like(drafted.tokens, dtype=torch.bool)
    for member, (row, above, pick) in enumerate(zip(tokens, parents, picks, strict=True)):
        path = [0]
        for node in range(1, len(row)):  # parents come first
            if above[node] == path[-1] and row[node] == pick[path[-1]]:
                path.append(node)
        rest = [-1] * (width - len(path))
        nodes.append(path + rest)
        after.append([pick[node] for node in path] + rest)
        on_path[member, path] = True
    return Verdict(torch.tensor(nodes), torch.tensor(after), on_path)


def walk(
    drafted: Draft,
    members: Tensor,
    choose_at: Callable[[Tensor, Tensor], Tensor],
    chosen: Tensor,
) -> None:
    """Choose tokens only where the walk comes by, for rows that sample or process their logits.

    Args:
        members: [m] the sequences to walk.
        choose_at: (members [a], nodes [a]) -> [a] tokens.
        chosen: [B, T], filled at the visited nodes.
    """
    node = torch.zeros_like(members)
    while members.numel():
        token = choose_at(members, node)
        chosen[members, node] = token
        is_child = drafted.parents[members] == node[:, None]
        is_child[:, 0] = False
        found, at = (is_child & (drafted.tokens[members] == token[:, None])).max(dim=1)
        node, members = at[found], members[found]
