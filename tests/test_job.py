"""JobFolder: what is asked, what is done, what is missing; and how far it is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from job_tools import all_rows, changed, decode, prompts, result, write_lines

from trbatch.config import JobSpec, SamplingParams
from trbatch.engine.sequence import TaskKey
from trbatch.errors import InputError, UsageError
from trbatch.figures import covered_seconds
from trbatch.job import JobFolder


def test_chunks_hold_every_row_in_order(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    assert [len(job.chunk_rows(i)) for i in range(job.manifest.chunks)] == [4, 4, 2]
    rows = all_rows(job)
    assert [row.custom_id for row in rows] == [f"r{i}" for i in range(10)]
    assert [row.prompt_index for row in rows] == list(range(10))
    assert [row.line for row in rows] == list(range(1, 11))
    assert rows[3].request == {"prompt": "Prompt 3."}
    assert len({row.fingerprint for row in rows}) == 10
    assert len({row.seed for row in rows}) == 10


def test_a_bad_row_is_kept_with_its_error_and_needs_no_worker(spec: JobSpec) -> None:
    write_lines(Path(spec.input), *prompts(3), "not json", {"id": "x", "prompt": ""})
    job = JobFolder.submit(spec)
    rows = all_rows(job)
    assert [row.error and row.error.code for row in rows[2:]] == [
        None,
        "invalid_json",
        "empty_prompt",
    ]
    assert job.missing_chunks() == [0]
    assert [row.custom_id for row, _ in job.missing(0)] == ["r0", "r1", "r2"]
    assert job.progress().rows_failed == job.manifest.rows_failed == 2


def test_fingerprints_cover_everything_that_decides_a_text(spec: JobSpec) -> None:
    def fingerprint(row: dict[str, Any], **values: Any) -> str:
        write_lines(Path(spec.input), {"id": "a"} | row)
        settings = {"seed": 1, "resume": "never"} | values
        return all_rows(JobFolder.submit(changed(spec, **settings)))[0].fingerprint

    plain = {"prompt": "Hi"}
    messages = {"messages": [{"role": "user", "content": "Hi"}]}
    variants = [
        fingerprint(plain),
        fingerprint(messages),
        fingerprint({"prompt": "Ho"}),
        fingerprint(plain | {"temperature": 1.0}),
        fingerprint(plain | {"seed": 3}),
        fingerprint(plain, model="other"),
        fingerprint(plain, revision="v2"),
        fingerprint(plain, seed=2),
        fingerprint(plain, sampling=SamplingParams(stop=("x",))),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint(plain) == variants[0]
    assert fingerprint(plain | {"note": "passes through"}) == variants[0]
    assert fingerprint(plain | {"n": 4}) == variants[0]
    assert fingerprint(plain | {"temperature": 0.0}) == variants[0]
    assert fingerprint(plain | {"max_tokens": 3.0}) == fingerprint(plain | {"max_tokens": 3})


def test_a_row_seed_depends_on_job_seed_and_id_unless_given(spec: JobSpec) -> None:
    path = Path(spec.input)

    def seeds(*rows: dict[str, Any], **values: Any) -> list[int]:
        write_lines(path, *rows)
        settings = {"seed": 1, "resume": "never"} | values
        return [row.seed for row in all_rows(JobFolder.submit(changed(spec, **settings)))]

    a, b = {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}
    first = seeds(a, b)
    assert seeds(b, a) == first[::-1]
    assert seeds(a, b, seed=2) != first
    assert seeds(a | {"seed": 5}, b) == [5, first[1]]
    assert seeds(a | {"seed": 5}, b, sampling=SamplingParams(seed=9)) == [5, 9]
    assert seeds(a | {"seed": 5.0}, b) == [5, first[1]]


def test_each_sample_is_missing_until_its_own_key_is_there(spec: JobSpec) -> None:
    write_lines(Path(spec.input), {"id": "a", "prompt": "x", "n": 3}, {"id": "b", "prompt": "y"})
    job = JobFolder.submit(spec)
    assert [(row.custom_id, sample) for row, sample in job.missing(0)] == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 0),
    ]
    row = job.chunk_rows(0)[0]
    job.publish("w", [result(job, row, 1)])
    assert [(row.custom_id, sample) for row, sample in job.missing(0)] == [
        ("a", 0),
        ("a", 2),
        ("b", 0),
    ]
    assert job.missing(0, frozenset())[1][1] == 1


def test_a_row_of_too_many_samples_fails_alone(spec: JobSpec) -> None:
    write_lines(Path(spec.input), {"prompt": "x", "n": 3_000_000_000}, {"prompt": "y", "n": 1024})
    job = JobFolder.submit(spec)
    assert [row.error and row.error.code for row in all_rows(job)] == ["invalid_sampling", None]
    assert job.manifest.samples == 1025


def test_a_cancelled_row_is_missing_and_a_failed_one_is_done(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    rows = job.chunk_rows(0)
    job.publish("w", [result(job, rows[0], finish_reason="cancelled")])
    job.publish("w", [result(job, rows[1], finish_reason="error", text=None)])
    assert [row.custom_id for row, _ in job.missing(0)] == ["r0", "r2", "r3"]
    assert job.progress().rows_cancelled == 1


def test_a_request_is_what_the_engine_takes(spec: JobSpec) -> None:
    write_lines(Path(spec.input), {"id": "a", "prompt": "x", "max_tokens": 3})
    job = JobFolder.submit(changed(spec, task="t"))
    assert job.task_key == TaskKey("t", job.matrices)
    row = job.chunk_rows(0)[0]
    request = job.request(row, 0)
    assert (request.key, request.seed, request.task) == (row.key(0), row.seed, job.task_key)
    assert (request.prompt, request.messages, request.sampling.max_tokens) == ("x", None, 3)


def test_segments_of_one_worker_name_never_overwrite_each_other(spec: JobSpec) -> None:
    path = JobFolder.submit(spec).path
    folders = [JobFolder.open(path), JobFolder.open(path)]
    row = folders[0].chunk_rows(0)[0]
    names = {one.publish("gpu/0", [result(one, row)]) for one in folders for _ in range(20)}
    assert len(names) == 40
    assert len(folders[0].ledger.names()) == 40
    assert all(name.startswith("gpu-0-") for name in names)


def test_segments_are_ordered_by_time_whoever_wrote_them(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    rows = job.chunk_rows(0)
    names = [job.publish(worker, [result(job, rows[0])]) for worker in ("z", "a", "m")]
    assert job.ledger.names() == names


def test_an_unknown_result_column_is_our_mistake(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    with pytest.raises(AssertionError, match="no such result columns: \\['txet'\\]"):
        job.publish("w", [result(job, job.chunk_rows(0)[0]) | {"txet": "x"}])


def test_progress_sums_footers(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    assert (job.progress().rows, job.progress().rows_done) == (10, 0)
    assert job.progress().tokens_per_s is job.progress().seconds_left is None
    decode(job, 0)
    time.sleep(0.01)
    progress = job.progress()
    assert (progress.rows_ok, progress.rows_done, progress.complete) == (4, 4, False)
    assert (progress.prompt_tokens, progress.completion_tokens) == (12, 36)
    assert progress.mean_acceptance_length == (9 - 1) / 4
    assert progress.draft_acceptance_rate == 0.25
    assert progress.speedup == 2.5
    assert progress.busy_s == pytest.approx(2.5)  # one row's prefill and decode: they ran at once
    assert progress.tokens_per_s == pytest.approx(36 / 2.5)
    # Of 1.6 rows a second that take 2 s each, 3.2 are in flight; the slowest took 2.5 s.
    assert progress.seconds_left == pytest.approx((6 - 3.2) * 2.5 / 4 + 2.5)
    decode(job, 1, 2)
    assert job.progress().complete
    assert json.dumps(job.progress().to_dict())


def test_duplicates_do_not_make_a_job_look_complete(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    rows = job.chunk_rows(0) + job.chunk_rows(1)
    for _ in range(2):
        job.publish("zombie", [result(job, row) for row in rows])
    progress = job.progress()
    assert (progress.rows_ok, progress.rows_done, progress.complete) == (8, 8, False)


def test_progress_is_seen_by_a_folder_opened_before(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    watcher = JobFolder.open(job.path)
    assert watcher.progress().rows_done == 0
    decode(job, 0, 1, 2)
    assert watcher.progress().complete
    assert watcher.missing_chunks() == job.missing_chunks() == []


def test_where_comparing_keys_takes_long_it_is_done_now_and_then(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    JobFolder.submit(spec)
    write_lines(Path(spec.input), *prompts(12))
    job = JobFolder.submit(spec)
    assert job.progress().rows_done == 0
    monkeypatch.setattr("trbatch.job.QUICK_COUNT_S", -1.0)
    job._count_took = 1e6
    decode(job, 0, 1)
    assert job.progress().rows_done == 0
    assert job.progress(exact=True).rows_done == 8
    job._count_took = 0.0
    decode(job, 2)
    assert job.progress().complete


def test_busy_time_counts_once_what_two_workers_share() -> None:
    assert covered_seconds([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_a_folder_that_is_no_job_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a job folder"):
        JobFolder.open(tmp_path)


def test_a_damaged_or_newer_manifest_is_told_so(spec: JobSpec) -> None:
    path = Path(JobFolder.submit(spec).path, "manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UsageError, match="has format 99"):
        JobFolder.open(path.parent)
    path.write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        JobFolder.open(path.parent)


def test_a_job_is_found_by_id_or_by_path(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    assert JobFolder.find(job.id, spec.out).path == job.path
    assert JobFolder.find(job.path).id == job.id
    with pytest.raises(InputError, match="no job 'nope'"):
        JobFolder.find("nope", spec.out)


def test_matrices_lie_beside_the_jobs(spec: JobSpec, tmp_path: Path) -> None:
    assert JobFolder.submit(spec).matrices == tmp_path / "store" / "matrices"


def test_a_job_can_live_in_an_object_store(spec: JobSpec) -> None:
    out = f"memory://jobs-{time.time_ns()}"
    job = JobFolder.submit(changed(spec, out=out))
    assert job.path.startswith(out)
    assert job.matrices == f"{out}/matrices"
    decode(job, 0, 2)
    again = JobFolder.submit(changed(spec, out=out))
    assert again.continued
    assert again.missing_chunks() == [1]
    assert again.progress().rows_ok == 6
