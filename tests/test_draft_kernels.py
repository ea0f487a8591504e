"""The kernels that draft, and count what came true, and their slow twins.

Where there is no GPU they run in Triton's interpreter; where there is one, compiled on it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from trbatch.engine import best_first, candidates, drafting, verify
from trbatch.engine.ahead import Ahead
from trbatch.engine.calibration import PLACES, Calibration, places_of
from trbatch.engine.matrix import Contexts, Matrix
from trbatch.engine.spine import MATCH

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU that torch can use nor TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from trbatch.engine.gpu_attention import pack_bits  # noqa: E402
from trbatch.engine.kernels.calibrate import calibrate  # noqa: E402
from trbatch.engine.kernels.draft import Trees, draft  # noqa: E402

interpreted = pytest.param(
    "cpu", marks=pytest.mark.skipif(GPU, reason="on a machine with a GPU they are compiled")
)
compiled = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU here")]
)
on_every_device = pytest.mark.parametrize("device", [interpreted, compiled])

SLOTS, TASKS, VOCAB = 6, 2, 12


@dataclass(frozen=True, slots=True)
class Case:
    """Random sequences over a random matrix."""

    matrix: Matrix
    calibration: Calibration
    last: Tensor
    slots: Tensor
    tasks: Tensor
    ahead: Ahead

    def drafted(self, size: int, active: list[int] | None = None) -> Trees:
        """What the kernel makes of it."""
        batch, device = self.last.shape[0], self.last.device
        out = Trees.empty(batch, size, device)
        for name in Trees.__slots__:
            getattr(out, name).fill_(-7)  # whatever was there before
        draft(
            self.matrix, self.calibration.chances, self.last, self.slots, self.tasks,
            torch.tensor(active or [1] * batch, device=device), self.ahead.tokens,
            self.ahead.matched, out,
        )  # fmt: skip
        return out

    def twin(self, size: int) -> tuple[drafting.Draft, Tensor]:
        """The same by the slow twin, and each node's chance [B, T]."""
        found = best_first.expand(
            self.matrix, self.calibration, self.slots, self.tasks, self.last, self.ahead,
            width=min(size - 1, best_first.WIDEST), enough=size - 1,
        )  # fmt: skip
        chances = self.last.new_zeros(self.last.shape[0], size, dtype=torch.float32)
        chances[:, 0] = 1.0
        if found is None:
            return drafting.roots(self.last), chances
        taken = best_first.take_likeliest(found, size - 1, each=True)
        for row, of, marked in zip(chances, found.chances, taken, strict=True):
            row[1 : 1 + int(marked.sum())] = of[marked]
        return best_first.build(found, taken, self.last), chances


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
    """Rows of 12 tokens in tables so small that they collide; some are missing or have holes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, high: int = VOCAB) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    matrix = Matrix(
        slots=SLOTS, vocab_size=VOCAB, tasks=TASKS, device=torch.device("cpu"), candidates=k,
        own_rows=32, pair_rows=64, orders=orders, task_orders=task_orders,
        bigrams=torch.rand(VOCAB, VOCAB, generator=generator).topk(k).indices,
    )  # fmt: skip
    for _ in range(3):
        at = Contexts(random(rows, high=SLOTS), random(rows, high=TASKS), random(rows, 3))
        new = torch.rand(rows, VOCAB, generator=generator).topk(k).indices
        new[torch.rand(rows, k, generator=generator) < 0.1] = -1
        new[rows // 2 :] = new[: rows - rows // 2]  # rows of different contexts that are equal
        matrix.write(at, new, torch.arange(rows), torch.arange(rows))
    matrix.bigrams[:3] = -1
    matrix.clear_slot(0)
    calibration = Calibration(TASKS, torch.device("cpu"))
    chances = calibration.chances  # of several cells that are equal, of others that are 0
    chances.copy_((torch.rand(chances.shape, generator=generator) * 40).floor() / 50)
    last = random(batch, 3)
    last[1::3, 2] = -1
    last[2::3, 1:] = -1
    ahead = random(batch, best_first.MAX_DEPTH + 1)
    ahead[torch.rand(ahead.shape, generator=generator) < 0.1] = -1
    matched = random(batch, high=9) + MATCH
    if not spines:
        ahead.fill_(-1)
        matched.zero_()
    for name in ("keys", "rows", "pair_keys", "pair_rows", "shared", "bigrams"):
        setattr(matrix, name, getattr(matrix, name).to(device))
    if device != "cpu":
        moved = Calibration(TASKS, torch.device(device))
        moved.chances.copy_(chances)
        calibration = moved
    slots = torch.randperm(SLOTS, generator=generator)[:batch]
    return Case(
        matrix, calibration, last.to(device), slots.to(device),
        random(batch, high=TASKS).to(device), Ahead(ahead.to(device), matched.to(device)),
    )  # fmt: skip


def check(found: Trees, wanted: drafting.Draft, chances: Tensor) -> None:
    """All of every tree, and what stands where there is no node."""
    width, size = wanted.tokens.shape[1], found.tokens.shape[1]
    assert found.sizes.tolist() == wanted.sizes
    for name, absent in (("tokens", -1), ("parents", 0), ("depths", 0), ("contexts", -1)):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert torch.equal(mine[:, :width], theirs), name
        assert (mine[:, width:] == absent).all(), name
    assert torch.equal(found.chances, chances)
    seen = torch.eye(size, dtype=torch.bool, device=chances.device)
    seen[:, 0] = True
    seen = seen.repeat(len(wanted.sizes), 1, 1)
    seen[:, :width, :width] = wanted.ancestors
    assert torch.equal(found.ancestors, pack_bits(seen))


@on_every_device
@pytest.mark.parametrize("spines", [True, False], ids=["spines", "none"])
@pytest.mark.parametrize("size", [2, 4, 9, 33, 81])
def test_trees_equal_those_of_the_twin(size: int, spines: bool, device: str) -> None:
    for seed in range(3 if size < 33 else 1):
        given = case(10 * size + seed, 1 + (size + seed) % 5, device, spines=spines)
        check(given.drafted(size), *given.twin(size))


@on_every_device
@pytest.mark.parametrize(
    "tables",
    [
        {"orders": 0, "task_orders": 1},  # the paper's one matrix
        {"orders": 1, "k": 4},
        {"orders": 2, "k": 5},
        {"rows": 12},  # most rows are missing
    ],
    ids=str,
)
def test_trees_equal_those_of_the_twin_whatever_tables_there_are(tables, device: str) -> None:
    for seed in range(2):
        given = case(seed, 5, device, **tables)
        check(given.drafted(12), *given.twin(12))


@on_every_device
def test_what_is_not_known_is_not_drafted(device: str) -> None:
    """Nothing to draft from at all; a chain alone."""
    given = case(1, 3, device, spines=False)
    given.matrix.keys.fill_(-2)
    given.matrix.pair_keys.fill_(-2)
    given.matrix.shared.fill_(-1)
    given.matrix.bigrams.fill_(-1)
    check(given.drafted(9), *given.twin(9))
    assert given.drafted(9).sizes.tolist() == [1, 1, 1]
    given.ahead.tokens.fill_(3)
    given.ahead.matched.fill_(5)
    given.calibration.chances.fill_(0.5)
    found = given.drafted(33)
    check(found, *given.twin(33))
    assert found.sizes.tolist() == [1 + best_first.MAX_DEPTH] * 3


@on_every_device
def test_a_sequence_that_is_not_active_gets_its_root_alone(device: str) -> None:
    given = case(4, 5, device)
    everyone, some = given.drafted(9), given.drafted(9, active=[1, 0, 1, 0, 0])
    assert some.sizes.tolist() == [everyone.sizes[0], 1, everyone.sizes[2], 1, 1]
    for name in ("tokens", "parents", "ancestors", "chances"):
        assert torch.equal(getattr(some, name)[[0, 2]], getattr(everyone, name)[[0, 2]])
    for idle in (1, 3, 4):
        assert some.tokens[idle].tolist() == [int(given.last[idle, 0])] + [-1] * 8
        assert some.chances[idle].tolist() == [1.0] + [0.0] * 8
        assert some.ancestors[idle, :, 0].tolist() == [1 | 1 << node for node in range(9)]


@on_every_device
def test_of_equal_chances_the_first_is_taken(device: str) -> None:
    given = case(5, 5, device)
    given.calibration.chances.fill_(0.25)
    check(given.drafted(33), *given.twin(33))


def counted_by_twin(given: Case, drafted: drafting.Draft, verdict: verify.Verdict) -> Tensor:
    """[tasks, 2, PLACES] what the drafter would count."""
    there, nodes = verdict.nodes >= 0, verdict.nodes.clamp(min=0)
    depths = drafted.depths.gather(1, nodes)
    expected = given.ahead.tokens[:, : nodes.shape[1]].where(
        given.ahead.on_spine(verdict.tokens), -1
    )
    contexts = drafted.contexts.gather(1, nodes[:, :, None].expand(-1, -1, 3))
    found = candidates.of_rows(
        drafting.find_rows(given.matrix, given.slots, given.tasks, contexts),
        expected.flatten(), (given.ahead.matched[:, None] + depths).flatten(),
    )  # fmt: skip
    places = places_of(given.tasks[:, None], depths).flatten()[:, None] + found.cells
    counted = there.flatten()[:, None] & (found.tokens >= 0)
    true = counted & (found.tokens == verdict.tokens.flatten()[:, None])
    length = TASKS * PLACES
    return torch.stack(
        [places[which].bincount(minlength=length).view(TASKS, PLACES) for which in (true, counted)],
        dim=1,
    ).int()


def random_answers(given: Case, drafted: drafting.Draft, seed: int) -> Tensor:
    """[B, T] what a model might choose: at most nodes a child, or what the spine expects."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, VOCAB, drafted.tokens.shape, generator=generator)
    for row, tokens, parents in zip(
        chosen, drafted.tokens.cpu(), drafted.parents.cpu(), strict=True
    ):
        for node in range(1, len(row)):
            if tokens[node] >= 0 and torch.rand((), generator=generator) < 0.5:
                row[parents[node]] = tokens[node]
    return chosen.to(drafted.tokens.device)


@on_every_device
@pytest.mark.parametrize("spines", [True, False], ids=["spines", "none"])
def test_what_came_true_is_counted_as_by_the_twin(spines: bool, device: str) -> None:
    fresh = torch.zeros(TASKS, 2, PLACES, dtype=torch.int32, device=device)
    wanted = torch.zeros_like(fresh)
    for seed in range(6):
        given = case(seed, 1 + seed % 5, device, spines=spines)
        drafted, _ = given.twin(33)
        if spines and seed % 2:
            given.ahead.tokens[:, :4] = drafted.tokens[:, 1:2]  # a spine that may come true
        verdict = verify.accept(drafted, random_answers(given, drafted, seed))
        calibrate(
            given.matrix, fresh, verdict.nodes, verdict.tokens, drafted.contexts, drafted.depths,
            given.slots, given.tasks, torch.ones_like(given.slots), given.ahead.tokens,
            given.ahead.matched,
        )  # fmt: skip
        wanted += counted_by_twin(given, drafted, verdict)
    assert wanted[:, 0].sum() > 20
    assert torch.equal(fresh, wanted)


@on_every_device
def test_only_active_sequences_are_counted(device: str) -> None:
    given = case(2, 2, device)
    fresh = torch.zeros(TASKS, 2, PLACES, dtype=torch.int32, device=device)
    nodes = torch.tensor([[0, -1], [0, -1]], device=device)
    truths = torch.tensor([[3, -1], [3, -1]], device=device)
    depths = torch.zeros(2, 1, dtype=torch.long, device=device)
    for active in ([0, 0], [0, 1]):
        calibrate(
            given.matrix, fresh, nodes, truths, given.last[:, None].contiguous(), depths,
            given.slots, given.tasks, torch.tensor(active, device=device), given.ahead.tokens,
            given.ahead.matched,
        )  # fmt: skip
        assert bool(fresh.any()) == any(active)
    assert fresh[1 - int(given.tasks[1])].sum() == 0


def test_counts_of_one_step_are_absorbed_as_if_counted_here() -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = (Calibration(TASKS, torch.device("cpu")) for _ in range(2))
    for _ in range(6):
        places = torch.randint(0, TASKS * PLACES, (5000,), generator=generator)
        true = torch.rand(5000, generator=generator) < 0.3
        fresh = torch.stack(
            [p.bincount(minlength=TASKS * PLACES) for p in (places[true], places)]
        ).view(2, TASKS, PLACES)
        fresh = fresh.transpose(0, 1).int().contiguous()
        here.count(places, true)
        there.absorb(fresh, range(TASKS))
        assert not fresh.any(), "they would be counted again"
        assert torch.equal(here.chances, there.chances)
        assert all(torch.equal(here.of_task(t), there.of_task(t)) for t in range(TASKS))


def test_steps_absorbed_together_age_the_chances_as_single_ones() -> None:
    calibration = Calibration(1, torch.device("cpu"))
    before = calibration.chances.clone()
    fresh = torch.zeros(1, 2, PLACES, dtype=torch.int32)
    for _ in range(2):  # the first refresh was at step 0, the next is 4 steps later
        fresh[0, :, 7] = 50
        calibration.absorb(fresh, [0], steps=4)
    assert calibration.chances[7] > before[7] + 0.2
