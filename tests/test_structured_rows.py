"""Real rows against real schemas: what ended by itself validates, whatever helped to decode it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
from schemas import SCHEMAS, prompt

from trbatch.config import DEFAULT_MODEL, EngineConfig
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Completion
from trbatch.models import load_model

NAMES = list(SCHEMAS)
LONGEST = 96


@pytest.fixture(scope="module")
def real(small_model: Path) -> LoadedModel:
    return load_model(DEFAULT_MODEL, device="cpu", dtype="float32")


def requests(count: int, *, free: bool = False, max_tokens: int = LONGEST) -> list[Any]:
    """Rows that take the schemas in turn; `free`: the same prompts without them."""
    rows = []
    for i in range(count):
        name = NAMES[i % len(NAMES)]
        asked = [{"role": "user", "content": prompt(name, i // len(NAMES))}]
        form = None if free else {"json": SCHEMAS[name]}
        rows.append(tiny.chat_request(i, asked, max_tokens=max_tokens, structured=form))
    return rows


def decode(model: LoadedModel, rows: Sequence[Any], **settings: Any) -> dict[Any, Completion]:
    return tiny.decode(Engine(model, EngineConfig(device="cpu", **settings)), rows)


def validated(done: dict[Any, Completion]) -> int:
    """How many rows ended by themselves; each of them must validate."""
    assert not [one.error_message for one in done.values() if one.finish_reason == "error"]
    ended = {i: one for i, one in done.items() if one.finish_reason == "stop"}
    for i, one in ended.items():
        jsonschema.validate(json.loads(one.text), SCHEMAS[NAMES[i % len(NAMES)]])
    return len(ended)


def acceptance(done: dict[Any, Completion]) -> float:
    """Tokens a decode forward, over all rows."""
    steps = sum(one.num_spec_steps for one in done.values())
    return sum(one.completion_tokens - 1 for one in done.values()) / steps


def tokens(done: dict[Any, Completion]) -> list[list[int]]:
    return [done[i].token_ids for i in range(len(done))]


def test_a_few_rows_validate_and_speculation_says_the_same(real: LoadedModel) -> None:
    rows = [row for row in requests(20, max_tokens=40) if row.key in (2, 8, 12, 16)]
    drafted = decode(real, rows, tree_size=6)
    assert validated(drafted) >= 3
    plain = decode(real, rows, speculate=False)
    assert {i: one.token_ids for i, one in drafted.items()} == {
        i: one.token_ids for i, one in plain.items()
    }
    assert acceptance(drafted) > 1.5, "what the schema forces is accepted"


@pytest.mark.long
def test_two_hundred_rows_validate_and_the_acceptance_is_told(
    real: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of docs/structured.md. Printed, so that a run shows them."""
    done = decode(real, requests(200), max_num_seqs=8)
    ended = validated(done)
    assert ended >= 180, f"only {ended} of 200 rows ended by themselves"
    free = decode(real, requests(200, free=True, max_tokens=48), max_num_seqs=8)
    with capsys.disabled():
        print(
            f"\n200 rows, 20 schemas: {ended} ended and validate, acceptance length "
            f"{acceptance(done):.2f}; the same prompts without a grammar: {acceptance(free):.2f}"
        )
    assert acceptance(done) > 1.5


@pytest.mark.long
def test_batches_of_one_and_of_eight_and_plain_decoding_say_the_same(real: LoadedModel) -> None:
    rows = requests(20, max_tokens=48)
    eight = decode(real, rows, max_num_seqs=8)
    assert tokens(decode(real, rows, max_num_seqs=1)) == tokens(eight)
    assert tokens(decode(real, rows, max_num_seqs=8, speculate=False)) == tokens(eight)
