"""What segments say of the work on their rows, and that it survives compaction."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from echo_worker import EchoEngine
from job_tools import decode, result
from tiny import loaded, request

from trbatch import segments
from trbatch.compaction import compact
from trbatch.config import EngineConfig, JobSpec
from trbatch.engine.engine import Engine
from trbatch.job import JobFolder
from trbatch.results import SCHEMA, collect
from trbatch.trace import Trace, joined, step_kind
from workers import submit, work


class Counting(EchoEngine):
    """Counts its steps by their kind, as an engine does."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: Counter[tuple[int, int]] = Counter()

    def step(self) -> list[Any]:
        done = super().step()
        self.steps[step_kind(len(done), 3.2)] += 1
        return done


def test_a_worker_writes_its_steps_and_when_it_worked(home: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, rows=22)
    engine = work(Counting(), name="gpu-7")
    trace = JobFolder.open(job.path).ledger.trace()
    assert trace.steps == engine.steps
    assert sum(trace.steps.values()) == 6  # of 4 rows each, and the last of 2
    (worker,) = trace.spans
    assert worker.startswith("gpu-7")
    assert trace.worker_s[worker] > 0
    rows = pq.read_table(job.collect().output).to_pylist()
    begin, end = trace.busy[0][0], trace.busy[-1][1]
    assert all(begin <= row["finished_at"] <= end for row in rows)


def short_rows(job: JobFolder, ends: list[float]) -> list[dict[str, Any]]:
    """The first rows of a job, each decoded alone in a tenth of a second up to these times."""
    rows = job.chunk_rows(0)[: len(ends)]
    return [
        result(job, row, finished_at=end, prefill_s=0.02, decode_s=0.08)
        for row, end in zip(rows, ends, strict=True)
    ]


def test_rows_much_shorter_than_a_segment_fill_its_span(home: Path, tmp_path: Path) -> None:
    job = JobFolder.open(submit(tmp_path).path)
    now = time.time()
    job.publish("w", short_rows(job, [now - 4, now - 3, now - 2, now - 1]))
    (footer,) = job.ledger.footers()
    assert footer.span == pytest.approx((now - 4.1, now - 1))
    assert job.progress().busy_s == pytest.approx(3.1)
    assert job.progress().tokens_per_s == pytest.approx(4 * 9 / 3.1)
    assert footer.longest_s == pytest.approx(0.1)


def test_spans_of_one_writer_do_not_overlap_though_its_rows_do(home: Path, tmp_path: Path) -> None:
    job = JobFolder.open(submit(tmp_path).path)
    now = time.time()
    first, *others = short_rows(job, [now - 3, now - 2, now - 1])
    job.publish("w", [first, others[0]])
    job.publish("w", [others[1] | {"decode_s": 50.0}])
    spans = [footer.span for footer in job.ledger.footers()]
    assert spans == [pytest.approx((now - 3.1, now - 2)), pytest.approx((now - 2, now - 1))]


def test_steps_with_rows_of_two_jobs_count_for_both(home: Path, tmp_path: Path) -> None:
    one, two = submit(tmp_path, name="one", rows=2), submit(tmp_path, name="two", rows=2)
    engine = work(Counting())
    assert engine.steps.total() == 1
    for job in (one, two):
        assert JobFolder.open(job.path).ledger.trace().steps == engine.steps


def test_the_engine_tells_which_trees_it_chose_for_which_batch() -> None:
    config = EngineConfig(device="cpu", max_num_seqs=3, max_model_len=64, tree_size=4)
    engine = Engine(loaded("llama"), config)
    for number in range(3):
        engine.add(request(number, [5, 6, 7, 8 + number], max_tokens=6))
    while engine.unfinished:
        engine.step()
    steps = engine.steps
    assert {batch for batch, _ in steps} <= {1, 2, 4}
    assert all(1 <= size <= 4 for _, size in steps)
    assert sum(steps.values()) == sum(engine.stats()["tree_sizes"].values())
    assert (4, 4) in steps


def test_compaction_keeps_workers_times_and_steps(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JobFolder.submit(spec)
    for worker in ("a", "b"):
        for chunk in (0, 1) if worker == "a" else (2,):
            rows = [result(job, row, sample) for row, sample in job.missing(chunk)]
            job.publish(worker, rows, steps={(4, 8): 5, (1, 2): 1})
    before = job.ledger.trace()
    assert before.steps == {(4, 8): 15, (1, 2): 3}
    assert set(before.spans) == {"a", "b"}
    compact(job)
    after = JobFolder.open(job.path).ledger.trace()
    assert after == before
    monkeypatch.setattr("trbatch.compaction.SEGMENT_ROWS", 3)
    compact(JobFolder.open(job.path))
    assert JobFolder.open(job.path).ledger.trace() == before


def test_a_segment_of_an_earlier_version_still_counts(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = JobFolder.submit(spec)
    decode(job, 0, 1, 2, worker="old one")
    (name, *_) = job.ledger.names()
    file = Path(job.path) / "segments" / name
    table = pq.read_table(file).drop_columns(["finished_at"])
    metadata = dict(table.schema.metadata)
    del metadata[segments._TRACE]
    pq.write_table(table.replace_schema_metadata(metadata), file)
    again = JobFolder.open(job.path)
    assert set(again.ledger.trace().spans) == {"old-one", "old one"}
    assert again.progress().complete
    found = pq.read_table(collect(again, str(tmp_path / "out.parquet")).output)
    assert [name for name in found.column_names if name in SCHEMA.names] == SCHEMA.names
    assert found.num_rows == 10


def test_traces_add_up_and_survive_their_footer() -> None:
    trace = Trace.of("a", (1.0, 2.0), {(2, 3): 1}, 0.5)
    trace.add(Trace.of("a", (2.0, 4.0), {(2, 3): 2}, 2.5))
    trace.add(Trace.of("b", (3.0, 5.0), {}, 1.0))
    assert trace.spans == {"a": [(1.0, 4.0)], "b": [(3.0, 5.0)]}
    assert trace.worker_s == {"a": 3.0, "b": 2.0}
    assert trace.busy == [(1.0, 5.0)]
    assert (trace.steps, trace.longest_s) == ({(2, 3): 3}, 2.5)
    assert Trace.from_json(trace.to_json()) == trace


@pytest.mark.parametrize(("batch", "counts_as"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (33, 64)])
def test_batches_count_by_powers_of_two(batch: int, counts_as: int) -> None:
    assert step_kind(batch, 2.6) == (counts_as, 3)


def test_spans_join_over_small_gaps() -> None:
    assert joined([(5, 6), (0, 1), (1.5, 2)], gap_s=1.0) == [(0, 2), (5, 6)]
