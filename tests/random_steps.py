"""Random steps of a batch: what slots hold, what was drafted, what the model says to it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trbatch.engine import verify
from trbatch.engine.device_state import MOST_TURNS, Slots
from trbatch.engine.drafting import Draft

VOCAB, K, TASKS, PAGE = 13, 3, 2, 4
STOPS, PAGES, DEEPEST = 3, 40, 7  # M, P, D
LONGEST = 200  # L
SPARE = 3  # slots that no row names


@dataclass(frozen=True)
class Step:
    """What a step finds: slots, their rows, what was drafted and what the model says to it."""

    slots: Slots
    rows: Tensor  # [B]
    drafted: Draft
    chosen: Tensor  # [B, T]
    candidates: Tensor  # [B, T, K]


def random_slots(rng: random.Random, count: int, lengths: list[int]) -> Slots:
    """Sequences on pages in any order; some slots have ended or nobody has them."""
    slots = Slots.empty(
        count, stops=STOPS, pages=PAGES, longest=LONGEST, device=torch.device("cpu")
    )
    pages = rng.sample(range(count * PAGES), count * PAGES)
    turns = rng.sample([*range(50), *range(MOST_TURNS - 50, MOST_TURNS)], count)
    for slot in range(count):
        if rng.random() < 0.1:
            continue
        slots.put(
            slot,
            [rng.randrange(VOCAB) for _ in range(rng.choice(lengths))],
            left=rng.choice([1, 2, 3, 5, 100]),
            stops=rng.sample(range(VOCAB), rng.randrange(STOPS + 1)),
            pages=pages[slot * PAGES : (slot + 1) * PAGES],
            task=rng.randrange(TASKS),
            turn=turns[slot],
        )
        if rng.random() < 0.15:
            slots.active[slot] = False
    return slots


def random_tree(rng: random.Random, size: int, last: list[int]) -> tuple[list[Any], ...]:
    """Tokens, parents, depths, contexts of a tree; siblings differ, some nodes are missing."""
    tokens, parents, depths, contexts = [last[0]], [0], [0], [last]
    taken: dict[int, set[int]] = {}
    for node in range(1, size):
        inner = [n for n in range(node) if depths[n] < DEEPEST and len(taken.get(n, ())) < VOCAB]
        parent = rng.choice(inner[-6:])
        free = sorted(set(range(VOCAB)) - taken.setdefault(parent, set()))
        token = rng.choice(free) if rng.random() < 0.93 else -1
        taken[parent].add(token if token >= 0 else -node)
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        contexts.append([token, *contexts[parent][:2]])
    return tokens, parents, depths, contexts


def random_step(rng: random.Random, slots: Slots, rows: list[int], size: int) -> Step:
    """Trees that the model often agrees with."""
    columns, picks = [], []
    for slot in rows:
        last = slots.last[slot].tolist() if slot >= 0 and slots.lengths[slot] else [0, -1, -1]
        tokens, parents, depths, contexts = random_tree(rng, size, last)
        columns.append((tokens, parents, depths, contexts))
        children = [[tokens[c] for c in range(1, size) if parents[c] == n] for n in range(size)]
        right = [[token for token in below if token >= 0] for below in children]
        picks.append([
            rng.choice(below) if below and rng.random() < 0.85
            else rng.choice([*range(VOCAB), verify.NOT_CHOSEN])
            for below in right
        ])  # fmt: skip
    tokens, parents, depths, contexts = (torch.tensor(c) for c in zip(*columns, strict=True))
    ancestors = torch.eye(size, dtype=torch.bool).repeat(len(rows), 1, 1)
    for node in range(1, size):
        ancestors[:, node] |= ancestors[torch.arange(len(rows)), parents[:, node]]
    drafted = Draft(tokens, parents, depths, ancestors, contexts, [size] * len(rows))
    candidates = torch.tensor(
        [[[rng.randrange(VOCAB) for _ in range(K)] for _ in range(size)] for _ in rows]
    )
    return Step(slots, torch.tensor(rows), drafted, torch.tensor(picks), candidates)


def a_step(seed: int, batch: int, size: int) -> Step:
    """Any step of up to `batch` sequences, the other rows padding."""
    rng = random.Random(seed)
    slots = random_slots(rng, batch + SPARE, [1, 2, 3, 17, 40])
    rows = [slot if rng.random() < 0.9 else -1 for slot in rng.sample(range(batch + 3), batch)]
    return random_step(rng, slots, rows, size)
