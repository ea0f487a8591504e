"""Engines whose steps run on the device and are read one late: the same texts, in whatever batch.

Where there is no GPU the steps are the slow twins, and the kernels in Triton's interpreter; where
there is one, captured graphs too.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from trbatch.engine import eager
from trbatch.engine.device_state import MOST_TURNS
from trbatch.engine.sequence import Completion
from trbatch.engine.step_plain import PlainOperations
from trbatch.engine.step_shapes import BUCKETS, bucket_of

ON_GPU = tiny.DEVICE != "cpu"
PROMPTS = tiny.repetitive(5, seed=4) + tiny.prompts(4, seed=5)
LENGTH = 24
FEW, SHORT = 3, 6  # prompts and tokens for the interpreter, which takes a second a step


def kernels() -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton here")
    from trbatch.engine.step_kernels import KernelOperations

    return KernelOperations()


def paths(*marks: Any) -> Any:
    """For tests of both forms of a step; `marks`: of the kernels in the interpreter."""
    quick = pytest.param(kernels, id="kernels", marks=() if ON_GPU else marks)
    return pytest.mark.parametrize("operations", [pytest.param(PlainOperations, id="plain"), quick])


on_every_path_slowly = paths(pytest.mark.long)


def engine(operations: Any, kind: str = "llama", **settings: Any) -> Any:
    made = operations()
    if not made.captures:
        settings["enforce_eager"] = True
    elif not ON_GPU:
        made.captures = False  # the interpreter has no graphs
    return tiny.engine(tiny.loaded(kind), operations=made, **settings)


def interpreted(operations: Any) -> bool:
    """Whether a step takes seconds."""
    return operations is kernels and not ON_GPU


def amount(operations: Any) -> tuple[int, int]:
    """How many prompts to decode, and how many tokens of each."""
    return (FEW, SHORT) if interpreted(operations) else (len(PROMPTS), LENGTH)


def requests(operations: Any = PlainOperations, **sampling: Any) -> list[Any]:
    count, length = amount(operations)
    return [
        tiny.request(i, ids, **{"max_tokens": length, **sampling})
        for i, ids in enumerate(PROMPTS[:count])
    ]


def expected(operations: Any = PlainOperations, kind: str = "llama") -> list[list[int]]:
    network, (count, length) = tiny.network(kind), amount(operations)
    return [tiny.generate(network, ids, length) for ids in PROMPTS[:count]]


def texts(done: dict[Any, Completion]) -> list[list[int]]:
    return [done[i].token_ids for i in range(len(done))]


@on_every_path_slowly
@pytest.mark.parametrize("size", [1, 3])
def test_texts_are_those_of_generate(operations: Any, size: int) -> None:
    done = tiny.decode(engine(operations, tree_size=size), requests(operations))
    assert texts(done) == expected(operations)
    accepted = sum(one.num_accepted_draft_tokens for one in done.values())
    assert (accepted > 0) == (size > 1)
    for one in done.values():
        decoded = one.completion_tokens - 1
        counts = one.acceptance_histogram
        assert sum(counts) == one.num_spec_steps
        assert sum((i + 1) * count for i, count in enumerate(counts)) == decoded
        assert one.decode_s > 0 and one.prefill_s > 0


@on_every_path_slowly
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_neox"])
def test_other_architectures_say_what_generate_says(operations: Any, kind: str) -> None:
    one = engine(operations, kind, tree_size=3 if interpreted(operations) else 6, max_num_seqs=8)
    assert texts(tiny.decode(one, requests(operations))) == expected(operations, kind)


@on_every_path_slowly
def test_the_budget_chooses_sizes_by_itself(
    operations: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    one = engine(operations, tree_size=0, max_tree_size=3, max_num_seqs=2)
    assert texts(tiny.decode(one, requests(operations))) == expected(operations)
    assert sum(one.stats()["tree_sizes"].values()) >= one.stats()["forwards"]


def test_long_prompts_come_in_pieces() -> None:
    done = tiny.decode(engine(PlainOperations, tree_size=9, prefill_chunk=7), requests())
    assert texts(done) == expected()


def test_each_step_is_started_before_the_last_is_read() -> None:
    one = engine(PlainOperations, tree_size=9)
    for request in requests():
        one.add(request)
    late = 0
    while one.unfinished:
        one.step()
        running = one._scheduler.running
        late += any(sequence.in_flight for sequence in running)
        assert all(sequence.in_flight <= 2 for sequence in running)
    assert late > LENGTH // 4


def test_rows_that_the_host_chooses_for_run_beside_the_others() -> None:
    """Rows with a logits processor, which the device cannot run, say what a host's engine says."""

    def never_22(_: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[22] = -torch.inf
        return logits

    mixed = [
        tiny.request(0, PROMPTS[0], max_tokens=LENGTH),
        tiny.request(1, PROMPTS[1], max_tokens=LENGTH, temperature=0.8, seed=5),
        tiny.request(2, PROMPTS[2], max_tokens=LENGTH, logits_processors=(never_22,)),
        tiny.request(4, PROMPTS[4], max_tokens=LENGTH, temperature=0.8, top_p=0.9, seed=6),
        tiny.request(3, PROMPTS[3], max_tokens=LENGTH),
    ]
    wanted = tiny.decode(tiny.engine(tiny.loaded("llama"), speculate=False), mixed)
    found = tiny.decode(engine(PlainOperations, tree_size=9), mixed)
    assert texts(found) == texts(wanted)
    assert texts(found)[0] == expected()[0]


def test_what_rows_for_the_host_take_is_not_what_the_others_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their steps are the host's own, which take longer than the device's: here an hour each."""
    clock = SimpleNamespace(perf_counter=partial(next, count(step=3600)))
    monkeypatch.setattr(eager, "time", clock)
    one = engine(PlainOperations, tree_size=0, max_tree_size=6, max_num_seqs=8)
    sizes: list[int] = []
    next_size = one._lagged.next_size
    one._lagged.next_size = lambda members: sizes.append(next_size(members)) or sizes[-1]
    rows = requests(max_tokens=60)[:4]
    rows += [replace(row, key=4 + row.key, logits_processors=(_as_it_is,)) for row in rows]
    done = tiny.decode(one, rows)
    for key in range(4):
        given = done[key].completion_tokens / done[key].num_spec_steps
        speedup = done[key].baseline_decode_s / done[key].decode_s
        assert speedup < 2 * given, "plain steps take longer than those with drafts"
    for key in range(4, 8):
        assert done[key].decode_s >= 3600 * done[key].num_spec_steps
        assert done[key].baseline_decode_s > 3600
    assert one.budget._steps == len(sizes), "else plain steps would not be made in a row"
    made = one.steps
    assert sum(made.values()) == sum(one.stats()["tree_sizes"].values())
    assert sum(made.values()) == len(sizes) + max(done[key].num_spec_steps for key in range(4, 8))


def _as_it_is(_: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits


def test_a_text_ends_at_stop_ids_stop_strings_and_max_tokens() -> None:
    words = expected()
    stop_id, stop_word = words[0][7], f" {words[1][9]} "
    ends: list[dict[str, Any]] = [
        {"stop_token_ids": [stop_id]}, {"stop": [stop_word]}, {"max_tokens": 5}, {"max_tokens": 1},
    ]  # fmt: skip
    ending = [
        tiny.request(i, PROMPTS[i], **{"max_tokens": LENGTH, **end}) for i, end in enumerate(ends)
    ]
    found = tiny.decode(engine(PlainOperations, tree_size=9), ending)
    plain = tiny.decode(tiny.engine(tiny.loaded("llama"), speculate=False), ending)
    for key in range(4):
        assert found[key].token_ids == plain[key].token_ids
        assert found[key].text == plain[key].text
        assert found[key].finish_reason == plain[key].finish_reason
    assert [found[key].finish_reason for key in range(4)] == ["stop", "stop", "length", "length"]


def test_dropped_requests_leave_the_others_alone() -> None:
    one = engine(PlainOperations, tree_size=9, max_num_seqs=3)
    for request in requests():
        one.add(request)
    done: dict[Any, Completion] = {}
    for _ in range(4):
        done |= {completion.key: completion for completion in one.step()}
    one.abort([0, 1, 7])
    while one.unfinished:
        done |= {completion.key: completion for completion in one.step()}
    assert set(done) == set(range(len(PROMPTS))) - {0, 1, 7}
    wanted = expected()
    assert all(done[key].token_ids == wanted[key] for key in done)


def test_two_samples_of_one_row_and_rows_of_one_number_run_together() -> None:
    same = [tiny.request(i, PROMPTS[0], max_tokens=LENGTH) for i in range(6)]
    for request in same:
        object.__setattr__(request, "order", 3)
    done = tiny.decode(engine(PlainOperations, tree_size=9, max_num_seqs=6), same)
    assert all(text == expected()[0] for text in texts(done))


def test_any_number_of_rows_of_one_number_run_together() -> None:
    """Those of many small jobs of one task: each is the first of its input."""
    count = 24
    one = engine(PlainOperations, tree_size=5, max_num_seqs=count)
    rows = [
        replace(tiny.request(i, PROMPTS[i % len(PROMPTS)], max_tokens=8), order=0)
        for i in range(count)
    ]
    for row in rows:
        one.add(row)
    while len(one._scheduler.decoding()) < count:
        one.step()
    turns = one._stepper.state.slots.turns.tolist()
    assert len(set(turns)) == count
    done = tiny.decode(one, [])
    whole = expected()
    assert texts(done) == [whole[i % len(PROMPTS)][:8] for i in range(count)]


def test_turns_go_by_row_and_sample_and_are_never_too_many() -> None:
    one, most = engine(PlainOperations, max_num_seqs=4), 1 << 45
    numbers = [(0, 0), (0, 0), (0, 1), (1, 0)], [(7, 3), (7, 1024 + 3), (most, 0), (most, 5000)]
    for group in numbers:
        found = [one._stepper._turn_of(row(slot, *group[slot])) for slot in range(4)]
        assert len(set(found)) == 4 and 0 <= min(found) <= max(found) < MOST_TURNS
        if max(order for order, _ in group) < most:
            assert found == sorted(found)


def row(slot: int, order: int, sample: int) -> Any:
    return SimpleNamespace(slot=slot, turn=(order, sample))


@on_every_path_slowly
def test_sampled_texts_are_those_of_the_host(operations: Any) -> None:
    """With drafts and without; rows that take the likeliest run beside them."""
    count, length = amount(operations)
    chosen = [
        tiny.request(
            i, PROMPTS[i], max_tokens=length, temperature=(0.0, 0.7, 1.5)[i % 3],
            min_p=0.05 * (i % 2), seed=1000 * i, sample_index=i,
        )
        for i in range(count)
    ]  # fmt: skip
    wanted = texts(tiny.decode(tiny.engine(tiny.loaded("llama"), speculate=False), chosen))
    for size in (1, 4):
        one = engine(operations, tree_size=size)
        found = tiny.decode(one, chosen)
        assert texts(found) == wanted
        assert one._lagged.done_at > 0, "nothing was decoded on the device"
        accepted = sum(done.num_accepted_draft_tokens for done in found.values())
        assert accepted > 0 or size == 1 or operations is kernels


@on_every_path_slowly
def test_texts_by_top_k_and_top_p_are_those_of_the_host(operations: Any) -> None:
    """Beside a row that takes the likeliest. In the interpreter a step of these takes seconds."""
    slow = interpreted(operations)
    count, length = (2, 3) if slow else amount(operations)
    chosen = [
        tiny.request(
            i, PROMPTS[i], max_tokens=length, temperature=(0.9, 0.0, 1.5)[i % 3],
            top_k=(0, 20, 5)[i // 2 % 3], top_p=(0.8, 1.0, 0.95)[i % 3], seed=i,
        )
        for i in range(count)
    ]  # fmt: skip
    wanted = texts(tiny.decode(tiny.engine(tiny.loaded("llama"), speculate=False), chosen))
    for size in (3,) if slow else (1, 4):
        one = engine(operations, tree_size=size)
        assert texts(tiny.decode(one, chosen)) == wanted
        assert one._lagged.done_at > 0, "nothing was decoded on the device"


@pytest.mark.parametrize("rows", [1, 3, 33, 100, 512, 600])
def test_a_bucket_holds_its_rows(rows: int) -> None:
    assert bucket_of(rows, 1024) >= rows
    assert bucket_of(rows, rows) == rows, "never more than can run"
    assert bucket_of(rows, 1024) in (*BUCKETS, rows)


def test_matrices_learn_the_same_from_both_forms_of_a_step() -> None:
    """What is left in the rows decides the next night's drafts.

    All rows begin and end together: when a row takes another's place depends on how quick a GPU
    is, and so does what they draft then.
    """
    pytest.importorskip("triton")
    left = []
    chosen, wanted = requests(kernels)[:FEW], expected(kernels)[:FEW]
    for operations in (PlainOperations, kernels):
        one = engine(operations, tree_size=3, max_num_seqs=FEW)
        assert texts(tiny.decode(one, chosen)) == wanted
        left.append(one._matrix)
    plain, compiled = left
    for name in ("shared", "pair_keys", "changed", "pair_changed"):
        assert torch.equal(getattr(plain, name), getattr(compiled, name)), name
    written = plain.pair_keys >= 0  # elsewhere lies what timing steps once wrote
    assert written.any()
    assert torch.equal(plain.pair_rows[written], compiled.pair_rows[written])


def test_paths_of_ranks_are_counted_on_the_device() -> None:
    """The learned tree of a task needs them, whatever tree drafts."""
    chosen = [tiny.request(i, ids, max_tokens=LENGTH, seed=32 * i) for i, ids in enumerate(PROMPTS)]
    host = tiny.engine(tiny.loaded("llama"), tree_size=9, max_num_seqs=1)
    device = engine(PlainOperations, tree_size=9, max_num_seqs=1)
    for one in (host, device):
        tiny.decode(one, chosen)
    found, wanted = (one._paths[0].to_tensors() for one in (device, host))
    assert wanted["path_counts"][-1] > LENGTH
    # A text's last step is counted up to its end here, and to the end of its path there.
    assert found["path_counts"][-1] == pytest.approx(float(wanted["path_counts"][-1]), rel=0.1)
    # Other trees, since chances are looked at again at other steps: so it finds other ranks.
    sums = [float(one["path_counts"][:-1].sum()) for one in (found, wanted)]
    assert sums[0] == pytest.approx(sums[1], rel=0.2)
    assert len(found["paths"]) == pytest.approx(len(wanted["paths"]), rel=0.3)
    other = engine(PlainOperations, tree_size=9)
    tiny.decode(other, [tiny.request(0, PROMPTS[0], max_tokens=LENGTH, seed=1)])
    assert other._paths[0].places == 0, "a few rows are enough"
