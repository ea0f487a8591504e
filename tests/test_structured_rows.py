"""Real rows against real schemas: what ended by itself validates, whatever helped to decode it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest
import tiny
from job_tools import write_lines
from schemas import SCHEMAS, prompt

from trbatch import api
from trbatch.config import DEFAULT_MODEL, EngineConfig, WorkerConfig
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Completion
from trbatch.models import load_model
from trbatch.worker import run_worker

NAMES = list(SCHEMAS)
LONGEST = 96
# As other tests have it, so that its step costs are known.
ENGINE = EngineConfig(device="cpu", max_num_seqs=3, max_model_len=256, tree_size=6)


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


def validated(rows: list[dict[str, Any]]) -> int:
    """How many rows of a dataset ended by themselves; each of them must validate."""
    ended = [row for row in rows if row["finish_reason"] == "stop"]
    for row in ended:
        schema = SCHEMAS[NAMES[int(row["custom_id"]) % len(NAMES)]]
        jsonschema.validate(json.loads(row["text"]), schema)
    return len(ended)


def acceptance(rows: list[tuple[int, int]]) -> float:
    """Tokens a decode forward, of rows of so many tokens and decode forwards."""
    return sum(tokens - 1 for tokens, _ in rows) / sum(steps for _, steps in rows)


def tokens(done: dict[Any, Completion]) -> list[list[int]]:
    return [done[i].token_ids for i in range(len(done))]


def test_rows_of_a_job_come_out_in_their_forms(
    small_model: Path, redis_url: str, tmp_path: Path
) -> None:
    """Through the queue into Parquet; a row's own form over the job's, in three spellings."""
    grade, score = "a grade", "a score"
    asked = [{"role": "user", "content": prompt(grade)}]
    schema = {"name": "score", "schema": SCHEMAS[score]}
    rows: list[dict[str, Any]] = [
        {"id": "job's", "prompt": "Is water wet? Answer:"},
        {"id": "own", "messages": asked, "structured": {"json": SCHEMAS[grade]}},
        {"custom_id": "openai", "url": "/v1/completions", "body": {
            "prompt": prompt(score),
            "response_format": {"type": "json_schema", "json_schema": schema},
        }},
        {"id": "bad", "prompt": "x", "structured": {"json": {"type": "objekt"}}},
        {"id": "free", "prompt": "Once upon a time", "structured": {}},
    ]  # fmt: skip
    job = api.submit(
        write_lines(tmp_path / "in.jsonl", *rows), out=str(tmp_path / "store"), max_tokens=12,
        structured={"choice": ["yes", "no"]},
    )  # fmt: skip
    assert api.work(WorkerConfig(burst=True, publish_s=0.1, engine=ENGINE)) == 0
    job.wait(60)
    receipt = job.collect(tmp_path / "out.parquet")
    assert receipt.exit_code == 3, "one row is an error row"
    found = {row["custom_id"]: row for row in pq.read_table(receipt.output).to_pylist()}
    assert found["job's"]["text"] in ("yes", "no")
    for name, kind in (("own", grade), ("openai", score)):
        assert found[name]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(found[name]["text"]), SCHEMAS[kind])
    assert found["free"]["text"] not in ("yes", "no")
    assert found["bad"]["error_message"].endswith(
        "in.jsonl:4: structured.json: Invalid type: objekt"
    )


@pytest.mark.long
def test_two_hundred_rows_of_a_job_validate_and_the_acceptance_is_told(
    real: LoadedModel, redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of docs/performance.md. Printed, so that a run shows them."""
    asked = [
        {"id": str(i), "messages": request.messages, "structured": request.sampling.structured}
        for i, request in enumerate(requests(200))
    ]
    job = api.submit(
        write_lines(tmp_path / "in.jsonl", *asked), out=str(tmp_path / "store"), max_tokens=LONGEST
    )
    engine = Engine(real, EngineConfig(device="cpu", max_num_seqs=16))
    assert run_worker(WorkerConfig(burst=True), load=lambda _: engine) == 0
    receipt = job.collect(tmp_path / "out.parquet")
    assert receipt.exit_code == 0 and receipt.rows_ok == 200
    rows = pq.read_table(receipt.output).to_pylist()
    ended = validated(rows)
    assert ended >= 180, f"only {ended} of 200 rows ended by themselves"
    with_it = acceptance([(row["completion_tokens"], row["num_spec_steps"]) for row in rows])
    free = decode(real, requests(30, free=True, max_tokens=40), max_num_seqs=16)
    without = acceptance([(one.completion_tokens, one.num_spec_steps) for one in free.values()])
    stats = engine.stats()
    mask_ms = 1e3 * stats["grammar_mask_s"] / stats["grammar_masks"]
    with capsys.disabled():
        print(
            f"\n200 rows, 20 schemas: {ended} ended and validate, acceptance length "
            f"{with_it:.2f}; prompts without a grammar: {without:.2f}; "
            f"{stats['grammar_masks']} masks of {mask_ms:.2f} ms, "
            f"{stats['grammar_mask_s'] / stats['busy_s']:.1%} of {stats['busy_s']:.0f} s, "
            f"{stats['grammar_compile_s']:.2f} s to compile"
        )
    assert with_it > 1.5


@pytest.mark.long
def test_batches_of_one_and_of_eight_and_plain_decoding_say_the_same(real: LoadedModel) -> None:
    rows = requests(10, max_tokens=48)
    eight = decode(real, rows, max_num_seqs=8)
    assert tokens(decode(real, rows, max_num_seqs=1)) == tokens(eight)
    assert tokens(decode(real, rows, max_num_seqs=8, speculate=False)) == tokens(eight)
