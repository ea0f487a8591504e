"""A job made, continued, or with its input read anew; one of several who try at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from job_tools import all_rows, changed, decode, prompts, write_lines
from test_scale import lines_parsed_per_s

from trbatch import chunk_files, submission
from trbatch.config import JobSpec, SamplingParams
from trbatch.errors import InputError, JobFailed, ResumeRefused, Unreachable
from trbatch.job import JobFolder
from trbatch.manifest import Manifest
from trbatch.results import collect


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


def test_more_samples_of_a_named_job_are_decoded_where_that_is_asked_for(spec: JobSpec) -> None:
    first = JobFolder.submit(changed(spec, name="night"))
    decode(first, 0, 1, 2)
    more = changed(spec, name="night", sampling=SamplingParams(n=3))
    with pytest.raises(ResumeRefused, match="n was 1, now 3"):
        JobFolder.submit(more)
    job = JobFolder.submit(changed(more, resume="always"))
    assert {sample for _, sample in job.missing(0)} == {1, 2}
    assert job.manifest.job_seed == first.manifest.job_seed
    unnamed = JobFolder.submit(changed(spec, sampling=SamplingParams(n=3)))
    assert {sample for _, sample in unnamed.missing(0)} == {0, 1, 2}


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


# --- chunks that are missing or damaged ---


def spoil(path: Path, how: str) -> None:
    """What a power cut, a failing disk or a hand leaves of a chunk."""
    data = path.read_bytes()
    match how:
        case "gone":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "short":
            path.write_bytes(data[: len(data) // 2])
        case "zeros":  # in the middle: the footer is as it was
            path.write_bytes(data[:4] + bytes(400) + data[404:])


@pytest.mark.parametrize("how", ["gone", "empty", "short", "zeros"])
@pytest.mark.parametrize("named", [True, False])
def test_the_same_submit_mends_a_job_whose_chunk_is_missing_or_damaged(
    spec: JobSpec, how: str, named: bool
) -> None:
    rows = prompts(10) if named else [{"prompt": f"Prompt {i}."} for i in range(10)]
    write_lines(Path(spec.input), *rows)
    job = JobFolder.submit(spec)
    decode(job, 0, 2)
    spoil(Path(job.path, job.manifest.chunk_name(1)), how)
    broken = JobFolder.open(job.path)
    for use in (broken.missing_chunks, lambda: collect(broken)):
        with pytest.raises(JobFailed, match=r"00001\.parquet is (missing|damaged)") as caught:
            use()
        assert "trbatch submit" in str(caught.value.hint)
    mended = JobFolder.submit(spec)
    assert (mended.continued, mended.reread, mended.missing_chunks()) == (True, True, [1])
    decode(mended, 1)
    receipt = collect(mended)
    assert (receipt.rows_ok, receipt.complete) == (10, True)
    assert not JobFolder.submit(spec).reread


def test_a_reader_of_an_earlier_reading_is_told_so(spec: JobSpec) -> None:
    early = JobFolder.submit(spec)
    write_lines(Path(spec.input), *prompts(12))
    JobFolder.submit(spec)
    early.folder.remove(early.manifest.chunk_folder)
    with pytest.raises(JobFailed, match="was read anew meanwhile"):
        early.chunk_rows(0)


def test_chunks_that_go_while_they_are_written_make_no_job(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = chunk_files.ChunkWriter.check_repeats

    def interfered(writer: Any, *args: Any) -> None:
        check(writer, *args)
        Path(spec.out, "night", writer.folder, "00001.parquet").unlink()

    monkeypatch.setattr(chunk_files.ChunkWriter, "check_repeats", interfered)
    with pytest.raises(Unreachable, match=r"removed chunks of .*night while"):
        JobFolder.submit(changed(spec, name="night"))
    assert list(Path(spec.out).iterdir()) == []


@pytest.mark.parametrize("what", ["grown by another", "removed"])
def test_a_job_that_changes_while_its_input_is_read_anew_is_submitted_again(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    first = JobFolder.submit(spec)
    decode(first, 0, 1, 2)
    write_lines(Path(spec.input), *prompts(12))
    read_input = submission._read_input

    def overtaken(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(submission, "_read_input", read_input)
        new = read_input(*args, **options)
        if what == "removed":
            first.folder.remove("")
        else:
            write_lines(Path(spec.input), *prompts(14))
            JobFolder.submit(spec)
        return new

    monkeypatch.setattr(submission, "_read_input", overtaken)
    job = JobFolder.submit(spec)
    assert len(all_rows(job)) == job.manifest.rows == (12 if what == "removed" else 14)
    newest = Path(job.path, job.manifest.chunk_folder)
    assert newest.is_dir()
    others = [path.name for path in newest.parent.iterdir() if path != newest]
    assert all(name.startswith("0-") for name in others)


def test_what_an_interrupted_removal_has_left_takes_no_new_job_along(spec: JobSpec) -> None:
    left = Path(spec.out, "night")
    (left / "segments").mkdir(parents=True)
    (left / "_REMOVED").touch()
    job = JobFolder.submit(changed(spec, name="night"))
    assert sorted(path.name for path in Path(job.path).iterdir()) == ["chunks", "manifest.json"]


@pytest.mark.long
def test_submitting_200_000_short_prompts_is_quick(tmp_path: Path) -> None:
    """Half of what test_scale demands, since this one runs beside other tests: 25,000 rows/s, or a
    fourteenth of the rate of json.loads on a machine that is slow.
    """
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b"".join(b'{"prompt": "Write a haiku about number %d."}\n' % i for i in range(200_000))
    )
    parsed = lines_parsed_per_s(path)
    start = time.perf_counter()
    job = JobFolder.submit(JobSpec(input=str(path), out=str(tmp_path / "store"), model="m"))
    seconds = time.perf_counter() - start
    assert job.manifest.rows == 200_000
    assert 200_000 / seconds > min(25_000, parsed / 14)
