"""Submit, work, collect: the real queue server, the real small model, every row compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trbatch
from trbatch import api
from trbatch.config import DEFAULT_MODEL, EngineConfig, WorkerConfig
from trbatch.results import SCHEMA

ROOT = Path(__file__).parent.parent
MAX_TOKENS = 20
# A tree of fixed size, so that few costs have to be timed and runs can be compared.
ENGINE = EngineConfig(device="cpu", max_num_seqs=3, max_model_len=256, tree_size=6)

Generate = Callable[..., tuple[str, int]]
Row = dict[str, Any]

QUESTION = [{"role": "user", "content": "Name the four seasons, then name them once more."}]
STORY = "Once upon a time, in a small village by the sea,"
LIST = "1 one, 2 two, 3 three, 4 four, 5 five,"


@pytest.fixture(scope="module")
def generate(small_model: Path) -> Generate:
    """What transformers alone says to a prompt or messages: text and number of tokens."""
    network = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(small_model)

    def run(prompt: str | Sequence[Row], max_tokens: int = MAX_TOKENS) -> tuple[str, int]:
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        with torch.inference_mode():
            out = network.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        tokens = out[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)

    return run


def work() -> int:
    """Be a worker in this process until the queue is empty."""
    return api.work(WorkerConfig(burst=True, publish_s=0.1, engine=ENGINE))


def work_in_a_process_of_its_own() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trbatch", "worker", "--burst", "--device", "cpu"]
    sizes = {"max-num-seqs": 3, "max-model-len": 256, "tree-size": 6}
    command += [f"--{name}={value}" for name, value in sizes.items()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def assert_figures(row: Row) -> None:
    """What every decoded row has to say about itself."""
    tokens, steps = row["completion_tokens"], row["num_spec_steps"]
    assert sum((i + 1) * n for i, n in enumerate(row["acceptance_histogram"])) == tokens - 1
    assert row["mean_acceptance_length"] == pytest.approx((tokens - 1) / steps)
    assert 0 <= row["num_accepted_draft_tokens"] <= row["num_draft_tokens"] <= 5 * steps
    assert row["tokens_per_s"] > 0 and row["speedup"] > 0
    assert row["error_code"] is None and row["error_message"] is None
    assert (row["model"], row["sample_index"]) == (DEFAULT_MODEL, 0)


def test_jsonl_rows_come_back_as_transformers_would_write_them(
    home: Path, tmp_path: Path, generate: Generate
) -> None:
    rows: list[Row] = [
        {"id": "story", "prompt": STORY, "topic": "tale"},
        {"id": "chat", "messages": QUESTION, "topic": "nature"},
        {"id": "empty", "prompt": "", "topic": "nothing"},
        {"id": "long", "prompt": "again and again " * 200},
        {"id": "short", "prompt": LIST, "max_tokens": 7},
        {"id": "stopped", "prompt": STORY, "stop": " the"},
    ]
    lines = [json.dumps(row) for row in rows]
    lines.insert(2, "this is no JSON")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))

    job = trbatch.submit(path, max_tokens=MAX_TOKENS, chunk_size=2)
    worker = work_in_a_process_of_its_own()
    assert worker.returncode == 0, worker.stderr
    assert "small default model" in worker.stderr
    status = job.wait(timeout=5)
    assert (status.progress.rows_ok, status.progress.rows_failed) == (4, 3)
    receipt = job.collect(tmp_path / "out.parquet")
    assert receipt.complete and receipt.exit_code == 3
    assert str(receipt).startswith("complete: 7 rows in = 4 ok + 3 failed")

    table = pq.read_table(tmp_path / "out.parquet")
    assert [name for name in table.column_names if name != "topic"] == SCHEMA.names
    found = {row["custom_id"]: row for row in table.to_pylist()}
    assert list(found) == ["story", "chat", "3", "empty", "long", "short", "stopped"]
    story, tokens = generate(STORY)
    expected = {
        "story": (story, tokens),
        "chat": generate(QUESTION),
        "short": generate(LIST, max_tokens=7),
    }
    for name, wanted in expected.items():
        assert (found[name]["text"], found[name]["completion_tokens"]) == wanted
        assert_figures(found[name])
    assert " the" in story, "choose another stop string"
    assert found["stopped"]["text"] == story.partition(" the")[0]
    assert found["stopped"]["finish_reason"] == "stop"
    assert found["short"]["finish_reason"] == "length"
    errors = {"3": "invalid_json", "empty": "empty_prompt", "long": "prompt_too_long"}
    for name, code in errors.items():
        assert (found[name]["finish_reason"], found[name]["error_code"]) == ("error", code)
        assert found[name]["text"] is None
    assert f"{path}:3:" in found["3"]["error_message"]
    assert [found[name]["topic"] for name in ("chat", "empty", "long")] == [
        "nature", "nothing", None,
    ]  # fmt: skip


@pytest.mark.long
def test_parquet_rows_come_back_in_order_with_their_columns(
    home: Path, tmp_path: Path, generate: Generate
) -> None:
    prompts = [STORY, LIST, "", "The capital of France is", "Zwölf Boxkämpfer jagen", LIST + " 6"]
    table = pa.table(
        {
            "question": prompts,
            "key": [f"row {i}" for i in range(len(prompts))],
            "weight": pa.array([0.5 * i for i in range(len(prompts))], pa.float32()),
        }
    )
    pq.write_table(table, tmp_path / "prompts.parquet", row_group_size=2)
    job = trbatch.submit(
        tmp_path / "prompts.parquet", prompt_column="question", id_column="key", chunk_size=4,
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    assert work() == 0
    assert job.wait(timeout=5).state == "completed"
    receipt = job.collect(tmp_path / "out.parquet")
    assert (receipt.rows_ok, receipt.rows_failed, receipt.complete) == (5, 1, True)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["custom_id"] for row in rows] == table["key"].to_pylist()
    assert [row["weight"] for row in rows] == table["weight"].to_pylist()
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt:
            assert (row["finish_reason"], row["text"]) == ("error", None)
            continue
        assert (row["text"], row["completion_tokens"]) == generate(prompt)
        assert_figures(row)


def decoded(path: Path, name: str, **settings: Any) -> tuple[list[str], int]:
    """The texts of a job over the file, and how many forwards they took."""
    job = trbatch.submit(path, name=name, max_tokens=MAX_TOKENS, **settings)
    assert work() == 0
    rows = pq.read_table(job.collect().output).to_pylist()
    return [row["text"] for row in rows], sum(row["num_spec_steps"] for row in rows)


@pytest.mark.long
def test_a_second_run_of_a_task_starts_from_the_matrix_of_the_first(
    home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts-2024-05-01.jsonl"
    rows = [{"prompt": STORY}, {"messages": QUESTION}, {"prompt": "The capital of France is"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, first_forwards = decoded(path, "first")
    (matrix,) = (home / "jobs" / "matrices").glob("*/*.safetensors")
    learned = load_file(matrix)["rows"]
    assert learned.shape[0] == 49152 and (learned >= 0).any()
    # Tomorrow's file of the same name but for its date is the same task.
    again = path.rename(tmp_path / "prompts-2024-05-02.jsonl")
    second, second_forwards = decoded(again, "second")
    assert second == first, "drafts have changed the text"
    assert list((home / "jobs" / "matrices").glob("*/*.safetensors")) == [matrix]
    assert second_forwards < 0.9 * first_forwards, f"{second_forwards} after {first_forwards}"
    cold, cold_forwards = decoded(again, "cold", cold=True)
    assert cold == first
    assert cold_forwards > second_forwards
