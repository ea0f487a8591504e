"""A job folder: made, continued, refused; what it says is missing, and how far it is."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trbatch.config import JobSpec, SamplingParams
from trbatch.engine.sequence import Completion, TaskKey
from trbatch.errors import InputError, ResumeRefused, Unreachable, UsageError
from trbatch.figures import covered_seconds
from trbatch.job import ChunkRow, JobFolder
from trbatch.manifest import Manifest
from trbatch.naming import default_task, slug
from trbatch.results import collect, result_row
from trbatch.storage import folder

Result = dict[str, Any]


def write_lines(path: Path, *rows: Any) -> Path:
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def prompts(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": f"Prompt {i}."} | fields for i in range(count)]


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A job of 10 rows in chunks of 4."""
    path = write_lines(tmp_path / "in.jsonl", *prompts(10))
    return JobSpec(input=str(path), out=str(tmp_path / "store"), model="m", chunk_size=4)


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


def test_the_same_command_again_continues_without_reading(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = JobFolder.submit(spec)
    decode(first, 1)
    monkeypatch.setattr("trbatch.submission.read_batches", None)
    again = JobFolder.submit(spec)
    assert (again.continued, again.id, again.manifest) == (True, first.id, first.manifest)
    assert again.missing_chunks() == [0, 2]


def test_a_touched_but_unchanged_input_is_the_same_input(spec: JobSpec) -> None:
    first = JobFolder.submit(spec)
    path = Path(spec.input)
    path.write_bytes(path.read_bytes())
    assert JobFolder.submit(spec).manifest == first.manifest


def test_another_setting_is_another_job(spec: JobSpec) -> None:
    first = JobFolder.submit(spec)
    other = JobFolder.submit(changed(spec, sampling=SamplingParams(max_tokens=7)))
    assert not other.continued
    assert other.id != first.id
    assert first.id.startswith("in-")


def test_another_setting_under_the_same_name_is_refused(spec: JobSpec) -> None:
    JobFolder.submit(changed(spec, name="night"))
    other = changed(spec, name="night", sampling=SamplingParams(max_tokens=7))
    with pytest.raises(ResumeRefused, match="max_tokens was 256, now 7") as caught:
        JobFolder.submit(other)
    assert caught.value.exit_code == 7


def test_resume_always_takes_a_job_over_with_new_settings(spec: JobSpec) -> None:
    decode(JobFolder.submit(changed(spec, name="night")), 0, 1, 2)
    sampling = SamplingParams(max_tokens=7)
    job = JobFolder.submit(changed(spec, name="night", sampling=sampling, resume="always"))
    assert job.manifest.generation == 1
    assert job.missing_chunks() == [0, 1, 2]


def test_resume_always_insists_on_a_job(spec: JobSpec) -> None:
    with pytest.raises(ResumeRefused, match="no job"):
        JobFolder.submit(changed(spec, resume="always"))


def test_resume_never_makes_a_new_job_each_time(spec: JobSpec) -> None:
    jobs = [JobFolder.submit(changed(spec, resume="never")) for _ in range(3)]
    assert len({job.id for job in jobs}) == 3
    assert len({job.manifest.job_seed for job in jobs}) == 3


def test_resume_never_refuses_a_name_that_is_taken(spec: JobSpec) -> None:
    named = changed(spec, name="night", resume="never")
    JobFolder.submit(named)
    with pytest.raises(ResumeRefused, match="'night' is there already"):
        JobFolder.submit(named)


def test_a_changed_input_keeps_done_rows_by_key(spec: JobSpec) -> None:
    first = JobFolder.submit(spec)
    decode(first, 0, 1, 2)
    rows = prompts(10)
    rows[2]["prompt"] = "Changed."
    del rows[5]
    write_lines(Path(spec.input), {"id": "new", "prompt": "First now."}, *rows)
    job = JobFolder.submit(spec)
    assert (job.id, job.manifest.generation) == (first.id, 1)
    assert job.manifest.job_seed == first.manifest.job_seed
    missing = [row.custom_id for i in job.missing_chunks() for row, _ in job.missing(i)]
    assert missing == ["new", "r2"]
    assert (job.progress().rows, job.progress().rows_ok) == (10, 8)


def test_a_changed_input_without_ids_is_refused(spec: JobSpec) -> None:
    path = write_lines(Path(spec.input), {"prompt": "a"}, {"prompt": "b"})
    first = JobFolder.submit(spec)
    write_lines(path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    with pytest.raises(ResumeRefused, match="3 of its rows have no id"):
        JobFolder.submit(spec)
    assert JobFolder.open(first.path).manifest == first.manifest
    assert len(list(Path(first.path, "chunks").iterdir())) == 1


def test_a_bad_line_does_not_keep_an_input_with_ids_from_growing(spec: JobSpec) -> None:
    write_lines(Path(spec.input), *prompts(3), "not json")
    JobFolder.submit(spec)
    write_lines(Path(spec.input), *prompts(3), "not json", {"id": "new", "prompt": "x"})
    assert JobFolder.submit(spec).manifest.rows == 5


def test_a_repeated_id_names_both_lines_and_keeps_nothing(spec: JobSpec) -> None:
    write_lines(Path(spec.input), *prompts(7), "", {"id": "r2", "prompt": "Again."})
    with pytest.raises(InputError, match="lines 3 and 9 have the same id 'r2'"):
        JobFolder.submit(spec)
    assert list(Path(spec.out).iterdir()) == [], "not even an empty folder"


def test_a_refused_change_of_the_input_leaves_the_job_as_it_was(spec: JobSpec) -> None:
    job = JobFolder.submit(spec)
    write_lines(Path(spec.input), {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"})
    with pytest.raises(InputError, match="same id"):
        JobFolder.submit(spec)
    assert len(all_rows(JobFolder.open(job.path))) == 10


def test_a_bad_line_gives_way_when_its_number_is_an_id(spec: JobSpec) -> None:
    write_lines(
        Path(spec.input),
        *({"id": i, "prompt": "a"} for i in range(5)),
        "not json",
        {"id": 6, "prompt": "b"},
        {"id": 7, "prompt": "c"},
    )
    names = [row.custom_id for row in all_rows(JobFolder.submit(spec))]
    assert names == ["0", "1", "2", "3", "4", "6 (line 6)", "6", "7"]


def test_a_hash_collision_is_no_repeated_id(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = frozenset(hash(f"r{i}") for i in range(10))
    monkeypatch.setattr("trbatch.ids.RepeatCheck.repeated", lambda self: everything)
    assert JobFolder.submit(spec).manifest.rows == 10


def test_no_chunk_is_left_when_the_input_is_unreadable(spec: JobSpec) -> None:
    Path(spec.input).unlink()
    with pytest.raises(InputError, match="no such file"):
        JobFolder.submit(spec)
    assert not Path(spec.out).exists()


def test_two_submits_at_once_end_in_one_job(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from trbatch import submission

    read_input = submission._read_input

    def overtaken(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(submission, "_read_input", read_input)
        JobFolder.submit(spec)
        return read_input(*args, **options)

    monkeypatch.setattr(submission, "_read_input", overtaken)
    job = JobFolder.submit(spec)
    assert job.continued
    assert len(list(Path(job.path, "chunks").iterdir())) == 1
    assert len(all_rows(job)) == 10


@pytest.mark.parametrize("seed", [None, 5])
def test_a_submit_that_is_overtaken_at_the_last_moment_continues_the_first_job(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    spec = changed(spec, seed=seed)
    to_json = Manifest.to_json
    made: list[JobFolder] = []

    def overtaken(manifest: Manifest) -> bytes:
        monkeypatch.setattr(Manifest, "to_json", to_json)
        made.append(JobFolder.submit(spec))
        return to_json(manifest)

    monkeypatch.setattr(Manifest, "to_json", overtaken)
    job = JobFolder.submit(spec)
    (first,) = made
    assert (job.continued, first.continued) == (True, False)
    assert job.manifest == first.manifest
    assert len(list(Path(job.path, "chunks").iterdir())) == 1
    assert len(all_rows(job)) == 10


def test_an_overtaken_submit_is_refused_or_renamed_as_if_it_had_come_later(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_json = Manifest.to_json

    def overtaken_by(other: JobSpec) -> None:
        def overtaken(manifest: Manifest) -> bytes:
            monkeypatch.setattr(Manifest, "to_json", to_json)
            JobFolder.submit(other)
            return to_json(manifest)

        monkeypatch.setattr(Manifest, "to_json", overtaken)

    overtaken_by(changed(spec, name="taken", task="other"))
    with pytest.raises(ResumeRefused, match="other settings"):
        JobFolder.submit(changed(spec, name="taken"))
    never = changed(spec, resume="never")
    overtaken_by(never)
    assert JobFolder.submit(never).id.endswith("-2")


def test_of_many_that_create_a_file_one_does(tmp_path: Path) -> None:
    ready = threading.Barrier(8)

    def create(number: int) -> bool:
        ready.wait()
        return folder(tmp_path).create("below/file", b"%d" % number)

    with ThreadPoolExecutor(8) as threads:
        created = list(threads.map(create, range(8)))
    assert created.count(True) == 1
    assert folder(tmp_path).read("below/file") == b"%d" % created.index(True)
    assert len(list((tmp_path / "below").iterdir())) == 1


def test_without_hard_links_a_file_is_created_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    assert folder(tmp_path).create("file", b"first")
    assert not folder(tmp_path).create("file", b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


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
    assert progress.seconds_left == pytest.approx(6 * 2.5 / 4)
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
    assert watcher.done() == job.done()


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


@pytest.mark.parametrize("name", ["../up", "a/b", "matrices", ".hidden", "", "a b"])
def test_a_job_name_that_is_no_folder_name_is_refused(spec: JobSpec, name: str) -> None:
    if name == "":
        assert JobFolder.submit(changed(spec, name=name)).id.startswith("in-")
        return
    with pytest.raises(UsageError, match="cannot be named"):
        JobFolder.submit(changed(spec, name=name))


def test_a_local_model_is_named_by_its_absolute_path(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert JobFolder.submit(changed(spec, model="tiny")).manifest.model == str(tmp_path / "tiny")
    assert JobFolder.submit(changed(spec, model="big")).manifest.model == "big"


@pytest.mark.parametrize(
    "model", ["./nothere", "/not/here", "~/nothere", "~nobody/x", "..", "w.gguf", "./empty"]
)
def test_a_local_model_that_is_not_there_is_refused_when_the_job_is_made(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="there is no") as caught:
        JobFolder.submit(changed(spec, model=model))
    assert "config.json" in (caught.value.hint or "")
    assert not Path(spec.out).exists()


def test_a_folder_or_file_called_like_a_hub_name_does_not_hide_it(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2-135m-instruct").mkdir()
    (tmp_path / "gpt2").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m-instruct", "gpt2"):
        assert JobFolder.submit(changed(spec, model=name)).manifest.model == name


def test_matrices_lie_beside_the_jobs(spec: JobSpec, tmp_path: Path) -> None:
    assert JobFolder.submit(spec).matrices == tmp_path / "store" / "matrices"


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("night-2026-08-02.jsonl", "proj-night"),
        ("night_20260802T0315.jsonl.gz", "proj-night"),
        ("2026-08-02-reviews.parquet", "proj-reviews"),
        ("2026-08.jsonl", "proj"),
        ("top10-v2.jsonl", "proj-top10-v2"),
        ("data/deep/q.jsonl", "proj-q"),
    ],
)
def test_a_task_is_named_after_project_and_file_without_dates(
    tmp_path: Path, path: str, task: str
) -> None:
    project = tmp_path / "proj"
    (project / "data" / "deep").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    assert default_task(str(project / path)) == task


@pytest.mark.parametrize("text", ["a b/c", "é", "..", "-x-", "a" * 200, "x--..y"])
def test_a_slug_is_a_safe_name_and_its_own_slug(text: str) -> None:
    assert slug(slug(text)) == slug(text)
    assert not set(slug(text)) & set("/ \\:")
    assert 0 < len(slug(text)) <= 80


def test_a_job_can_live_in_an_object_store(spec: JobSpec) -> None:
    out = f"memory://jobs-{time.time_ns()}"
    job = JobFolder.submit(changed(spec, out=out))
    assert job.path.startswith(out)
    assert job.matrices is None
    decode(job, 0, 2)
    again = JobFolder.submit(changed(spec, out=out))
    assert again.continued
    assert again.missing_chunks() == [1]
    assert again.progress().rows_ok == 6


def test_a_reader_never_meets_half_a_file(tmp_path: Path) -> None:
    job = folder(tmp_path)

    def fail_half_way() -> None:
        with job.writing("a/b") as file:
            file.write(b"half")
            file.flush()
            assert job.names("a") == []
            raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        fail_half_way()
    assert list((tmp_path / "a").iterdir()) == []


def test_a_storage_that_cannot_be_written_is_unreachable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unreachable, match="cannot write"):
        folder(tmp_path / "file").write("below", b"x")


def test_a_place_where_no_folder_can_be_made_is_unreachable(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def makes_none(*_: Any, **__: Any) -> None:  # as below /proc, whoever asks
        raise FileNotFoundError(2, "No such file or directory")

    job = JobFolder.submit(spec)
    monkeypatch.setattr("os.makedirs", makes_none)
    with pytest.raises(Unreachable, match="cannot write"):
        JobFolder.submit(changed(spec, name="other"))
    with pytest.raises(Unreachable, match="cannot write"):
        collect(job, "/nowhere/out.parquet")


def test_a_file_that_is_missing_while_another_is_written_is_not_blamed_on_that(
    tmp_path: Path,
) -> None:
    store = folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="other"), store.writing("file") as file:
        file.write(store.read("other"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_submitting_200_000_short_prompts_is_quick(tmp_path: Path) -> None:
    """The promise is 50,000 rows/s; half of it here, for machines that are busy."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b"".join(b'{"prompt": "Write a haiku about number %d."}\n' % i for i in range(200_000))
    )
    start = time.perf_counter()
    job = JobFolder.submit(JobSpec(input=str(path), out=str(tmp_path / "store"), model="m"))
    seconds = time.perf_counter() - start
    assert job.manifest.rows == 200_000
    assert 200_000 / seconds > 25_000
