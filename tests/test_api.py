"""The verbs in Python, with the real queue server and an engine that echoes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from echo_worker import EchoEngine, load_echo

import trbatch
from trbatch import api, direct, local
from trbatch.config import JobSpec, SamplingParams, WorkerConfig
from trbatch.errors import InputError, JobFailed, ResumeRefused, TimedOut, UsageError
from trbatch.worker import run_worker


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"id": f"r{i}", "prompt": f"say {i} times", "label": i} for i in range(10)]
    return write_rows(tmp_path / "prompts.jsonl", rows)


def work() -> int:
    return run_worker(WorkerConfig(burst=True, publish_s=0.05), load=load_echo_engine)


def load_echo_engine(model: Any) -> EchoEngine:
    return load_echo(WorkerConfig(), model)


def test_public_names_are_what_they_say_even_when_every_module_is_loaded() -> None:
    assert trbatch.submit is api.submit
    assert trbatch.collect is api.collect
    assert trbatch.wait is api.wait
    assert trbatch.status is api.status
    assert trbatch.generate is api.generate
    assert trbatch.JobSpec is JobSpec
    assert set(trbatch.__all__) <= set(dir(trbatch))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trbatch.nothing  # noqa: B018


def test_a_job_goes_from_submit_to_a_dataset_in_input_order(
    home: Path, prompts: Path, tmp_path: Path
) -> None:
    job = trbatch.submit(prompts, model="org/echo", chunk_size=3, max_tokens=7)
    assert job.folder.manifest.spec.sampling.max_tokens == 7
    assert job.status().state == "queued"
    assert work() == 0
    status = trbatch.wait(job, timeout=10)
    assert (status.state, status.progress.rows_ok) == ("completed", 10)
    receipt = trbatch.collect(job, tmp_path / "out.parquet")
    assert receipt.complete
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["text"].to_pylist() == [f"SAY {i} TIMES" for i in range(10)]
    assert table["label"].to_pylist() == list(range(10))


def test_the_same_submit_again_continues_and_enqueues_nothing_twice(
    home: Path, prompts: Path
) -> None:
    first = trbatch.submit(prompts, model="org/echo", chunk_size=4)
    second = trbatch.submit(prompts, model="org/echo", chunk_size=4)
    assert second.path == first.path
    assert second.status().chunks.queued == 3
    work()
    assert trbatch.submit(prompts, model="org/echo", chunk_size=4).resume() == 0


def test_resume_enqueues_what_the_segments_lack(home: Path, prompts: Path) -> None:
    job = trbatch.submit(prompts, model="org/echo", chunk_size=5)
    work()
    for segment in sorted(Path(job.path, "segments").iterdir()):
        segment.unlink()
    again = api.Job.open(job.id)
    status = again.status()
    assert status.state == "failed"
    with pytest.raises(JobFailed, match="lacks 10 of 10 rows"):
        again.wait(timeout=5)
    assert api.resume(job.id) == 2
    work()
    assert trbatch.status(job.id).state == "completed"


def test_waiting_gives_up_after_the_timeout_and_reports_meanwhile(
    home: Path, prompts: Path
) -> None:
    job = trbatch.submit(prompts, model="org/echo")
    seen: list[api.JobStatus] = []
    with pytest.raises(TimedOut, match="0 of 10 rows"):
        job.wait(timeout=0.6, report=seen.append)
    assert seen
    assert {status.state for status in seen} == {"queued"}
    assert json.loads(json.dumps(seen[0].to_dict()))["chunks"]["queued"] == 1


def test_other_settings_under_the_same_name_are_refused(home: Path, prompts: Path) -> None:
    trbatch.submit(prompts, model="org/echo", name="nightly")
    with pytest.raises(ResumeRefused, match="nightly"):
        trbatch.submit(prompts, model="org/echo", name="nightly", temperature=1.0)


def test_an_unknown_setting_is_refused_before_anything_is_written(
    home: Path, prompts: Path
) -> None:
    with pytest.raises(UsageError, match="max_tokenz"):
        trbatch.submit(prompts, max_tokenz=5)
    assert not (home / "jobs").exists()


def test_a_misspelt_sampling_field_is_told_the_right_one(home: Path, prompts: Path) -> None:
    for given in (prompts, JobSpec(input=str(prompts))):
        with pytest.raises(UsageError, match="max_token'") as caught:
            trbatch.submit(given, max_token=3)
        assert "'max_tokens'" in (caught.value.hint or "")


def test_sampling_fields_may_stand_beside_a_whole_spec(home: Path, prompts: Path) -> None:
    spec = JobSpec(input=str(prompts), seed=3, sampling=SamplingParams(top_k=4, max_tokens=9))
    assert api.job_spec(spec, {"max_tokens": 3, "seed": 5}) == JobSpec(
        input=str(prompts), seed=5, sampling=SamplingParams(top_k=4, max_tokens=3)
    )
    assert api.job_spec(spec, {}) == spec
    job = trbatch.submit(spec, model="org/echo", max_tokens=3)
    assert job.folder.manifest.spec.sampling == SamplingParams(top_k=4, max_tokens=3)


def test_a_repeated_id_enqueues_nothing(home: Path, tmp_path: Path) -> None:
    rows = [{"id": "same", "prompt": "a"}, {"id": "same", "prompt": "b"}]
    with pytest.raises(InputError, match="same"):
        trbatch.submit(write_rows(tmp_path / "p.jsonl", rows), model="org/echo")
    assert list((home / "jobs").glob("*/manifest.json")) == []


def test_the_seed_of_submit_is_the_jobs_and_a_spec_may_be_given_whole(
    home: Path, prompts: Path
) -> None:
    by_fields = api.job_spec(prompts, {"seed": 5, "temperature": 0.5, "sampling": {"top_k": 3}})
    assert by_fields.seed == 5
    assert by_fields.sampling == SamplingParams(temperature=0.5, top_k=3)
    job = trbatch.submit(JobSpec(input=str(prompts), model="org/echo", seed=9))
    assert job.folder.manifest.job_seed == 9


def test_an_output_named_at_submit_means_the_same_file_from_any_folder(
    home: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = trbatch.submit(prompts, model="org/echo", output="out.parquet")
    work()
    monkeypatch.chdir(home)
    assert job.collect().complete
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 10


def test_an_unknown_job_is_named(home: Path) -> None:
    with pytest.raises(InputError, match="no-such-job"):
        trbatch.status("no-such-job")


def test_generate_returns_completions_in_order_with_the_seeds_of_a_job(
    home: Path, tmp_path: Path
) -> None:
    texts = ["one", "two words", "and three words", "x", "y", "z"]
    completions = direct.generate_with(EchoEngine(), texts, SamplingParams(n=2), seed=7)
    assert [c.key for c in completions] == [(i, s) for i in range(6) for s in (0, 1)]
    assert [c.text for c in completions[::2]] == [text.upper() for text in texts]
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    job = trbatch.submit(rows, model="org/echo", seed=7)
    assert [c.seed for c in completions[::2]] == [row.seed for row in job.folder.chunk_rows(0)]


def test_generate_takes_messages() -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert direct.generate_with(EchoEngine(), [messages], SamplingParams())[0].text == "HELLO"


def test_a_bad_prompt_of_generate_costs_no_other() -> None:
    half = "half a \ud83d"
    done = direct.generate_with(EchoEngine(), ["fine", "", half, "x"], SamplingParams(n=2))
    assert [c.key for c in done] == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (3, 1)]
    assert [c.text for c in done] == ["FINE", "FINE", "", "", "X", "X"]
    assert [c.error_code for c in done[2:4]] == ["empty_prompt", "invalid_characters"]
    assert "prompt 2" in (done[2].error_message or "")


def test_settings_of_generate_are_checked_before_a_model_is_loaded() -> None:
    with pytest.raises(UsageError, match="max_tokns"):
        api.generate(["a"], max_tokns=3, model="/nowhere")
    with pytest.raises(UsageError, match="max_tokens"):
        api.generate(["a"], SamplingParams(max_tokens=4), max_tokens=0, model="/nowhere")


def test_a_password_reaches_the_worker_by_its_environment_and_not_by_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    show = "import os, sys; print(sys.argv[1:], os.environ['TRBATCH_REDIS_URL'])"
    monkeypatch.setattr(local, "WORKER_COMMAND", (sys.executable, "-c", show))
    lines: list[str] = []
    with local.WorkerProcess(["--burst"], "redis://u:secret@host:1", lines.append):
        pass
    assert lines == ["['--burst'] redis://u:secret@host:1"]


def test_leaving_a_worker_that_ignores_sigterm_kills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)"
    monkeypatch.setattr(local, "WORKER_COMMAND", (sys.executable, "-u", "-c", deaf))
    monkeypatch.setattr(local, "LEAVE_S", 0.1)
    monkeypatch.setattr(local, "HAND_BACK_S", 0.1)
    lines: list[str] = []
    with local.WorkerProcess([], "", lines.append) as worker:
        while not lines:
            time.sleep(0.02)
    assert worker.poll() == -9


@pytest.mark.parametrize(
    ("prompts", "message", "cure"),
    [
        ("hello", "prompts must be a list of prompts, not 'hello'", "generate([prompt])"),
        ({"role": "user", "content": "Hi"}, "prompts must be a list", "generate([[message]])"),
        ([{"role": "user", "content": "Hi"}], "prompt 1 is a message", "generate([messages])"),
        (["a", 5], "prompt 2 is neither a text nor a list of messages: 5", '"role": "user"'),
        (["a", ["b"]], "prompt 2 is neither a text nor a list of messages", '"role": "user"'),
    ],
)
def test_what_is_no_list_of_prompts_is_told_before_a_model_is_loaded(
    prompts: Any, message: str, cure: str
) -> None:
    with pytest.raises(InputError) as caught:
        api.generate(prompts, model="/nowhere")
    assert message in caught.value.message
    assert cure in (caught.value.hint or "")
