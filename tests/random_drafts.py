"""Random sequences to draft for, over random tables; what kernels and their twins make of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from trbatch.engine import best_first, drafting, verify
from trbatch.engine.ahead import Ahead
from trbatch.engine.calibration import Calibration
from trbatch.engine.coming_true import count_paths
from trbatch.engine.kernels.calibrate import calibrate
from trbatch.engine.kernels.draft import Trees, draft
from trbatch.engine.matrix import Contexts, Matrix
from trbatch.engine.spine import MATCH

SLOTS, TASKS, VOCAB = 6, 2, 12
PATH = best_first.MAX_DEPTH + 1  # nodes of the longest path
TABLES = ("keys", "rows", "pair_keys", "pair_rows", "shared", "bigrams")


@dataclass(frozen=True, slots=True)
class Case:
    """Random sequences over a random matrix."""

    matrix: Matrix
    calibration: Calibration
    last: Tensor
    slots: Tensor
    tasks: Tensor
    active: Tensor
    ahead: Ahead

    def draft(self, out: Trees, width: int = best_first.WIDEST) -> None:
        """By the kernel."""
        draft(
            self.matrix, self.calibration.chances, self.last, self.slots, self.tasks, self.active,
            self.ahead.tokens, self.ahead.matched, out, width=width,
        )  # fmt: skip

    def drafted(self, size: int, width: int = best_first.WIDEST) -> Trees:
        """By the kernel, over whatever was there before."""
        out = Trees.empty(len(self.last), size, self.last.device)
        for field in fields(out):
            getattr(out, field.name).fill_(-7)
        self.draft(out, width)
        return out

    def twin(self, size: int, width: int = best_first.WIDEST) -> tuple[drafting.Draft, Tensor]:
        """The same by the slow twin, and each node's chance [B, T]."""
        last = self.last.long()
        found = best_first.expand(
            self.matrix, self.calibration, self.slots, self.tasks.long(), last,
            Ahead(self.ahead.tokens.long(), self.ahead.matched.long()),
            width=min(size - 1, width), enough=size - 1,
        )  # fmt: skip
        chances = last.new_zeros(len(last), size, dtype=torch.float32)
        chances[:, 0] = 1.0
        if found is None:
            return drafting.roots(last), chances
        taken = best_first.take_likeliest(found, size - 1, each=True)
        for row, of, marked in zip(chances, found.chances, taken, strict=True):
            row[1 : 1 + int(marked.sum())] = of[marked]
        return best_first.build(found, taken, last), chances

    def calibrate(
        self, fresh: Tensor, trees: Any, nodes: Tensor, truths: Tensor, ranks: Tensor
    ) -> None:
        """By the kernel. trees: a `Draft`, or `Trees`."""
        calibrate(
            self.matrix, fresh, nodes, truths, trees.contexts, trees.depths, self.slots,
            self.tasks, self.active, self.ahead.tokens, self.ahead.matched, ranks,
        )  # fmt: skip

    def counted(
        self, drafted: drafting.Draft, verdict: verify.Verdict
    ) -> tuple[Tensor, list[list[int]]]:
        """[tasks, 2, PLACES] what the slow twin counts, and the ranks that it finds."""
        nothing_yet = Calibration(TASKS, self.last.device)
        ahead = Ahead(self.ahead.tokens.long(), self.ahead.matched.long())
        ranks = count_paths(
            self.matrix, nothing_yet, drafted, verdict, self.slots, self.tasks.long(), ahead
        )
        return torch.stack([nothing_yet.of_task(task) for task in range(TASKS)]).int(), ranks

    def only(self, rows: Tensor) -> Case:
        """Some of the sequences."""
        return replace(
            self, last=self.last[rows], slots=self.slots[rows], tasks=self.tasks[rows],
            active=self.active[rows],
            ahead=Ahead(self.ahead.tokens[rows], self.ahead.matched[rows]),
        )  # fmt: skip

    def become(self, other: Case) -> None:
        """Take over all that it says, in the same tensors."""
        copy_tables(other.matrix, self.matrix)
        self.calibration.chances.copy_(other.calibration.chances)
        for name in ("last", "slots", "tasks", "active"):
            getattr(self, name).copy_(getattr(other, name))
        self.ahead.tokens.copy_(other.ahead.tokens)
        self.ahead.matched.copy_(other.ahead.matched)


def random_matrix(
    generator: torch.Generator, *, rows: int, device: str, orders: int, task_orders: int, k: int
) -> Matrix:
    """Rows of 12 tokens in tables so small that they collide; some are missing or have holes."""

    def empty(where: str, bigrams: Tensor) -> Matrix:
        return Matrix(
            slots=SLOTS, vocab_size=VOCAB, tasks=TASKS, device=torch.device(where), candidates=k,
            own_rows=32, pair_rows=64, orders=orders, task_orders=task_orders, bigrams=bigrams,
        )  # fmt: skip

    def random(*shape: int, high: int = VOCAB) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    matrix = empty("cpu", torch.rand(VOCAB, VOCAB, generator=generator).topk(k).indices)
    for _ in range(3):
        at = Contexts(random(rows, high=SLOTS), random(rows, high=TASKS), random(rows, 3))
        new = torch.rand(rows, VOCAB, generator=generator).topk(k).indices
        new[torch.rand(rows, k, generator=generator) < 0.1] = -1
        new[rows // 2 :] = new[: rows - rows // 2]  # rows of different contexts that are equal
        matrix.write(at, new, torch.arange(rows), torch.arange(rows))
    matrix.bigrams[:3] = -1
    matrix.clear_slot(0)
    there = empty(device, matrix.bigrams)
    copy_tables(matrix, there)
    return there


def copy_tables(source: Matrix, target: Matrix) -> None:
    """All rows of a matrix into another of the same sizes, on whatever device."""
    for name in TABLES:
        getattr(target, name).copy_(getattr(source, name))


def case(
    seed: int,
    batch: int,
    device: str = "cpu",
    *,
    spines: bool = True,
    orders: int = 3,
    task_orders: int = 2,
    k: int = 8,
    rows: int = 150,
) -> Case:
    """Anything, with tokens and numbers as slots on the device have them."""
    generator = torch.Generator().manual_seed(seed)
    tables = {"orders": orders, "task_orders": task_orders, "k": k}
    matrix = random_matrix(generator, rows=rows, device=device, **tables)
    calibration = Calibration(TASKS, torch.device(device))
    chances = torch.rand(calibration.chances.shape, generator=generator)
    # Of several cells they are equal, of others 0.
    calibration.chances.copy_((chances * 40).floor() / 50)
    last = torch.randint(0, VOCAB, (batch, 3), generator=generator)
    last[1::3, 2] = -1
    last[2::3, 1:] = -1
    ahead = torch.randint(0, VOCAB, (batch, PATH), generator=generator)
    ahead[torch.rand(ahead.shape, generator=generator) < 0.1] = -1
    matched = torch.randint(0, 9, (batch,), generator=generator) + MATCH
    if not spines:
        ahead.fill_(-1)
        matched.zero_()
    tasks = torch.randint(0, TASKS, (batch,), generator=generator)
    return Case(
        matrix, calibration, last.int().to(device),
        torch.randperm(SLOTS, generator=generator)[:batch].to(device), tasks.int().to(device),
        torch.ones(batch, dtype=torch.bool, device=device),
        Ahead(ahead.int().to(device), matched.int().to(device)),
    )  # fmt: skip


def random_answers(drafted: drafting.Draft, seed: int) -> Tensor:
    """[B, T] what a model might choose: at most nodes a child, or what the spine expects."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, VOCAB, drafted.tokens.shape, generator=generator)
    tokens, parents = drafted.tokens.cpu(), drafted.parents.cpu()
    for row, its_tokens, its_parents in zip(chosen, tokens, parents, strict=True):
        for node in range(1, len(row)):
            if its_tokens[node] >= 0 and torch.rand((), generator=generator) < 0.8:
                row[its_parents[node]] = its_tokens[node]
    return chosen.to(drafted.tokens.device)
