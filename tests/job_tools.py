"""What tests of job folders share: prompts in files, and rows decoded without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trbatch.config import JobSpec
from trbatch.engine.sequence import Completion
from trbatch.job import ChunkRow, JobFolder
from trbatch.results import result_row

Result = dict[str, Any]


def write_lines(path: Path, *rows: Any) -> Path:
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def prompts(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": f"Prompt {i}."} | fields for i in range(count)]


def changed(spec: JobSpec, **values: Any) -> JobSpec:
    return JobSpec.from_dict(
        {name: getattr(spec, name) for name in spec.__dataclass_fields__} | values
    )


def result(job: JobFolder, row: ChunkRow, sample: int = 0, **values: Any) -> Result:
    """The row of a completion of 9 tokens in 4 forwards and 2 seconds."""
    completion = Completion(
        key=0,
        finish_reason="stop",
        text=f"answer to {row.custom_id}",
        token_ids=list(range(9)),
        prompt_tokens=3,
        sample_index=sample,
        prefill_s=0.5,
        decode_s=2.0,
        baseline_decode_s=5.0,
        num_spec_steps=4,
        num_draft_tokens=16,
        num_accepted_draft_tokens=4,
        acceptance_histogram=[1, 2, 1],
    )
    made = result_row(completion, row, model="m", task="t", worker="w", attempts=1)
    return made | values


def decode(job: JobFolder, *indexes: int, worker: str = "w", **values: Any) -> None:
    """Publish what these chunks lack, one segment a chunk."""
    for index in indexes:
        missing = job.missing(index)
        job.publish(worker, [result(job, row, sample, **values) for row, sample in missing])


def all_rows(job: JobFolder) -> list[ChunkRow]:
    return [row for index in range(job.manifest.chunks) for row in job.chunk_rows(index)]
