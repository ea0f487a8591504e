"""When the device's memory does not suffice: fewer sequences, the same texts, seldom an error."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
import torch

from trbatch.engine.engine import Engine
from trbatch.engine.sequence import Completion
from trbatch.engine.step_plain import PlainOperations

PROMPTS = tiny.repetitive(4, length=19, seed=4) + tiny.prompts(3, seed=5)
LENGTH = 24
on_both_paths = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


def engine(*, on_device: bool, **settings: Any) -> Engine:
    values = {"max_num_seqs": 6, "tree_size": 5, **settings}
    if on_device:
        values |= {"operations": PlainOperations(), "enforce_eager": True}
    return tiny.engine(tiny.loaded("llama"), **values)


def requests() -> list[Any]:
    return [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(PROMPTS)]


def assert_texts(done: dict[Any, Completion]) -> None:
    network = tiny.network("llama")
    assert [done[i].token_ids for i in range(len(PROMPTS))] == [
        tiny.generate(network, ids, LENGTH) for ids in PROMPTS
    ]
    for one in done.values():
        decoded, counts = one.completion_tokens - 1, one.acceptance_histogram
        assert sum((i + 1) * count for i, count in enumerate(counts)) <= decoded


def no_more() -> None:
    raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 TiB")


def limit_sequences(one: Engine, most: int, *, after: bool) -> None:
    """Let each decode step of more than `most` sequences fail, before it did anything or after."""
    if one._stepper is None:
        inner = one._eager._drafter

        def checked(*args: Any) -> Any:
            if len(args[0].sizes) > most and not after:
                no_more()
            out = accept(*args)
            if len(args[0].sizes) > most:
                no_more()
            return out

        name = "learn" if after else "accept"
        accept = getattr(inner, name)
        setattr(inner, name, checked)
        return
    step = one._stepper.operations.step

    def stepped(state: Any, batch: Any, size: int, **how: Any) -> Any:
        many = int((batch.rows >= 0).sum()) > most
        if many and not after:
            no_more()
        out = step(state, batch, size, **how)
        if many:
            no_more()
        return out

    one._stepper.operations.step = stepped  # type: ignore[method-assign]


@on_both_paths
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_fewer_sequences_run_together_and_say_the_same(
    on_device: bool, after: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one = engine(on_device=on_device)
    free = one._cache.pool.free
    limit_sequences(one, 2, after=after)
    with caplog.at_level("WARNING", logger="trbatch"):
        done = tiny.decode(one, requests())
    assert_texts(done)
    said = [record.getMessage() for record in caplog.records]
    # How many were running the first time depends on how their prompts came together.
    halves = [re.search(r"with (\d+) sequences, going on with at most (\d+)", one) for one in said]
    counts = [tuple(map(int, found.groups())) for found in halves if found]
    assert counts and len(counts) == len(said), said
    assert all(fewer == many // 2 for many, fewer in counts)
    assert counts[0][0] > 2 and counts[-1][1] <= 2 and "1 TiB" in said[-1]
    assert one._cache.pool.free == free


@on_both_paths
def test_a_row_that_does_not_fit_even_alone_is_an_error_and_the_others_run_on(
    on_device: bool,
) -> None:
    one = engine(on_device=on_device)
    prompt = list(range(3, 80))
    project = one._model.project

    def limited(tokens: Any, where: Any, keep: Any = None) -> Any:
        if any(span.committed + span.length > 70 for span in where):
            no_more()
        return project(tokens, where, keep)

    one._model.project = limited  # type: ignore[method-assign]
    rows = [*requests(), tiny.request(99, prompt, max_tokens=4)]
    done = tiny.decode(one, rows)
    failed = done.pop(99)
    assert (failed.finish_reason, failed.error_code) == ("error", "out_of_memory")
    assert "1 TiB" in failed.error_message and failed.token_ids == []
    assert_texts(done)


@on_both_paths
def test_pieces_of_prompts_shrink_too(on_device: bool) -> None:
    one = engine(on_device=on_device, recycle_prompts=False)
    project, sizes = one._model.project, []

    def limited(tokens: Any, where: Any, keep: Any = None) -> Any:
        if len(tokens) > 64:
            no_more()
        sizes.append(len(tokens))
        return project(tokens, where, keep)

    one._model.project = limited  # type: ignore[method-assign]
    row = tiny.request(0, tiny.repetitive(1, length=150, seed=2)[0], max_tokens=LENGTH)
    rows = [row, *[tiny.request(i, row.prompt_token_ids[i:], max_tokens=4) for i in (3, 5, 7)]]
    done = tiny.decode(one, rows)
    assert all(completion.error_code is None for completion in done.values())
    assert done[0].token_ids == tiny.generate(
        tiny.network("llama"), list(row.prompt_token_ids), LENGTH
    )
