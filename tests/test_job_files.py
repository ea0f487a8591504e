"""Job specs: read, checked line by line, weaker than flags; and what runs by them at night."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from croniter import croniter
from echo_worker import EchoEngine

from trbatch import api, cli, cli_configs, local
from trbatch.config import JobSpec, SamplingParams, WorkerConfig
from trbatch.job_files import read_job_file
from trbatch.worker import run_worker
from workers import MODEL, work, write_rows

ROOT = Path(__file__).parent.parent
DAY = datetime.date(2026, 11, 22)


def spec_file(folder: Path, text: str) -> Path:
    file = folder / "x.toml"
    file.write_text(text)
    return file


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])


def test_a_spec_sets_fields_paths_from_its_folder_and_the_day(tmp_path: Path) -> None:
    file = spec_file(
        tmp_path,
        'input = "in/{date}.jsonl"\noutput = "../out-{date}.parquet"\nstore = "s3://b/jobs"\n'
        'name = "night-{date}"\nmodel = "./weights"\ncold = true\nseed = 3\n'
        '[sampling]\nmax_tokens = 7\nstop = ["END"]\n',
    )
    assert read_job_file(file, DAY) == {
        "input": str(tmp_path / "in" / "2026-11-22.jsonl"),
        "output": str(tmp_path.parent / "out-2026-11-22.parquet"),
        "out": "s3://b/jobs",
        "name": "night-2026-11-22",
        "model": str(tmp_path / "weights"),
        "cold": True,
        "seed": 3,
        "sampling": {"max_tokens": 7, "stop": ["END"]},
    }


def test_hub_names_and_absolute_paths_stay(tmp_path: Path) -> None:
    file = spec_file(tmp_path, 'input = "/data/in.jsonl"\nmodel = "org/model"\n')
    assert read_job_file(file) == {"input": "/data/in.jsonl", "model": "org/model"}


def test_a_template_beside_the_spec_is_read_wherever_the_command_is_started(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs, elsewhere = tmp_path / "specs", tmp_path / "elsewhere"
    for folder in (specs, elsewhere):
        folder.mkdir()
        (folder / "judge.j2").write_text(f"of {folder.name}: {{{{ answer }}}}")
    write_rows(specs / "in.jsonl", [{"answer": "4"}])
    text = f'input = "in.jsonl"\nmodel = "{MODEL}"\nname = "t"\ntemplate = "judge.j2"\n'
    monkeypatch.chdir(elsewhere)
    submitted = invoke("submit", spec_file(specs, text))
    assert submitted.exit_code == 0, submitted.stderr
    assert api.Job.open("t").folder.spec.template == "of specs: {{ answer }}"
    (specs / "judge.j2").unlink()
    missing = invoke("submit", specs / "x.toml")
    assert f"there is no template file {specs}/judge.j2" in missing.stderr
    flag = invoke("submit", specs / "x.toml", "--template", "judge.j2", "--name", "u")
    assert flag.exit_code == 0, flag.stderr
    assert api.Job.open("u").folder.spec.template == "of elsewhere: {{ answer }}"


def test_a_templates_text_stays_and_a_file_with_braces_in_its_name_is_a_file(
    tmp_path: Path,
) -> None:
    file = spec_file(tmp_path, 'input = "/in.jsonl"\ntemplate = "a/{{ b }}.j2"\n')
    assert read_job_file(file)["template"] == "a/{{ b }}.j2"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "{{ b }}.j2").write_text("{{ b }}")
    assert read_job_file(file)["template"] == str(tmp_path / "a" / "{{ b }}.j2")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('input = "a"\nprioritty = "low"\n', "x.toml:2: unknown setting 'prioritty'", "'priority'"),
        ('input = "a"\n[sampling]\n\ntopk = 1\n', "x.toml:4: unknown setting 'topk'", "'top_k'"),
        ('input = "a"\nmax_tokens = 4\n', "x.toml:2: max_tokens belongs", "below [sampling]"),
        (
            'input = "a"\n[sampling]\nseed = 4\n',
            "x.toml:3: a seed is the job's",
            "above [sampling]",
        ),
        ('input = "a"\n[sampling]\ntop_p = 2\n', "x.toml:3: top_p must be", ""),
        (
            'input = "a"\n[sampling]\nseeds = 4\n',
            "x.toml:3: unknown setting 'seeds'",
            "top_k",
        ),
        (
            'input = "a"\n[sampling]\nmax_tokens = 4\nmin_tokens = 5\n',
            "x.toml:4: min_tokens must be at most max_tokens, which is 4",
            "",
        ),
        (
            'input = "a"\n[sampling]\nstructured = { regex = "(" }\n',
            "x.toml:3: structured.regex",
            "",
        ),
        (
            'input = "a"\n\n[sampling.structured]\njson = \'{"type": "objekt"}\'\n',
            "x.toml:3: structured.json",
            "",
        ),
        ('input = "a"\n[sampling]\nstop_token_ids = "7"\n', "x.toml:3: stop_token_ids", '["7'),
        ('input = "a"\nadapter = 4\n', "x.toml:2: adapter must be a text", ""),
        ('input = "a"\npriority = "urgent"\n', "x.toml:2: priority must be one of", ""),
        ('input = "a"\ndeadline = "soon"\n', "x.toml:2: 'soon' is no point in time", "07:00"),
        ('input = "a"\ndeadline = 07:00:00\n', "x.toml:2: deadline must be a text", ""),
        ('input = "a"\nname = "x-{day}"\n', "x.toml:2: {day} in name is unknown", "{date}"),
        ('input = "a"\nname = 5\n', "x.toml:2: name must be a text", 'name = "5"'),
        ('input = "a"\nchunk_size = 2.5\n', "x.toml:2: chunk_size must be a whole number", ""),
        (
            'input = "a"\nignore_body_fields = "model"\n',
            "x.toml:2: ignore_body_fields must be a list, not 'model'",
            'write ignore_body_fields = ["model"]',
        ),
        ('input = "a"\nsampling = 3\n', "x.toml:2: sampling must be a table", ""),
        ('name = "a"\n', "x.toml: a job needs an input", "input ="),
        ("input = a\n", "x.toml is not valid TOML: Invalid value (at line 1", ""),
    ],
)
def test_what_is_wrong_in_a_spec_is_told_with_file_line_and_cure(
    tmp_path: Path, text: str, message: str, hint: str
) -> None:
    result = invoke("submit", spec_file(tmp_path, text))
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert f"{tmp_path}/{message}" in result.stderr
    assert hint in result.stderr
    assert "seed," not in result.stderr, "it is refused where it would be offered"


def test_settings_that_belong_together_are_checked_together(tmp_path: Path) -> None:
    text = 'input = "/a"\n[sampling]\nmin_tokens = 300\nmax_tokens = 400\n'
    assert api.job_spec(spec_file(tmp_path, text), {}).sampling.min_tokens == 300


def test_a_spec_names_an_adapter_beside_it_and_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("weights", "lora"):
        (tmp_path / name).mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    monkeypatch.setenv("TRBATCH_MODEL", "org/default")
    text = 'input = "/a"\nmodel = "weights"\nadapter = "lora"\n'
    file = str(spec_file(tmp_path, text))
    assert parsed([file]).model == f"{tmp_path}/weights + {tmp_path}/lora"
    assert parsed([file, "--adapter", "org/b"]).model == f"{tmp_path}/weights + org/b"
    assert parsed([file, "--model", "org/m"]).model == f"org/m + {tmp_path}/lora"
    spec_file(tmp_path, 'input = "/a"\nmodel = "org/m + ./lora"\n')
    assert parsed([file]).model == f"org/m + {tmp_path}/lora"
    assert api.job_spec("in.jsonl", {"adapter": "org/b"}).model == "org/default + org/b"
    assert api.job_spec("in.jsonl", {"adapter": ""}).model == ""


def parsed(arguments: list[str]) -> JobSpec:
    above = click.Context(cli.commands, **cli.commands.context_settings)
    with cli.submit_command.make_context("submit", list(arguments), parent=above) as context:
        settings = {**context.params}
        return cli_configs.job_spec(settings.pop("input"), settings)


def test_flags_win_over_the_spec_even_with_default_values(tmp_path: Path) -> None:
    text = 'input = "a.jsonl"\ntask = "t"\nchunk_size = 8\n'
    text += "[sampling]\nmax_tokens = 9\ntop_k = 4\n"
    file = str(spec_file(tmp_path, text))
    assert parsed([file]) == JobSpec(
        input=str(tmp_path / "a.jsonl"), task="t", chunk_size=8,
        sampling=SamplingParams(max_tokens=9, top_k=4),
    )  # fmt: skip
    assert parsed([file, "--chunk-size", "256", "--max-tokens", "5", "--seed", "2"]) == JobSpec(
        input=str(tmp_path / "a.jsonl"), task="t", seed=2,
        sampling=SamplingParams(max_tokens=5, top_k=4),
    )  # fmt: skip


def test_the_python_api_reads_specs_too(tmp_path: Path) -> None:
    file = spec_file(tmp_path, 'input = "a.jsonl"\n[sampling]\nmax_tokens = 9\nn = 2\n')
    assert api.job_spec(file, {"max_tokens": 4, "task": "t"}) == JobSpec(
        input=str(tmp_path / "a.jsonl"), task="t", sampling=SamplingParams(max_tokens=4, n=2)
    )


def test_a_submitted_spec_is_a_job_and_again_the_same_one(home: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 6)
    file = spec_file(
        tmp_path,
        f'input = "in.jsonl"\nmodel = "{MODEL}"\nname = "night-{{date}}"\ntask = "night"\n'
        'output = "out.parquet"\npriority = "low"\ndeadline = "2h"\n',
    )
    name = f"night-{datetime.date.today().isoformat()}"
    first = invoke("submit", file)
    assert (first.exit_code, first.stdout) == (0, f"{name}\n"), first.stderr
    status = api.status(name)
    assert (status.task, status.priority, status.deadline is None) == ("night", "low", False)
    again = invoke("submit", file)
    assert f"same input and settings: job {name}" in again.stderr
    work()
    assert invoke("collect", name).exit_code == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 6


@pytest.mark.long
def test_run_takes_a_spec_and_writes_its_output(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = str(Path(__file__).with_name("echo_worker.py"))
    monkeypatch.setattr(local, "WORKER_COMMAND", (sys.executable, echo, "worker"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_rows(tmp_path / "in.jsonl", 3)
    file = spec_file(tmp_path, f'input = "in.jsonl"\nmodel = "{MODEL}"\noutput = "out.parquet"\n')
    result = invoke("run", file)
    assert result.exit_code == 0, result.stderr
    texts = pq.read_table(tmp_path / "out.parquet")["text"].to_pylist()
    assert texts == ["SAY 0", "SAY 1", "SAY 2"]


# --- what lies in jobs/ ---


def test_the_nightly_spec_is_one_of_tonights_jobs() -> None:
    fields = read_job_file(ROOT / "jobs" / "nightly.toml", DAY)
    spec = api.job_spec(ROOT / "jobs" / "nightly.toml", {})
    assert fields["name"] == "nightly-2026-11-22"
    assert fields["output"] == str(ROOT / "answers" / "nightly-2026-11-22.parquet")
    assert Path(spec.input).is_file()
    assert (spec.task, spec.priority, spec.deadline) == ("nightly", "low", "07:00")


def crontab() -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The environment of the crontab, and (when, what) of its entries."""
    environment, entries = {}, []
    for line in (ROOT / "jobs" / "crontab").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if equals and name.isidentifier():
            environment[name] = value
        else:
            *when, what = line.split(maxsplit=5)
            entries.append((" ".join(when), what))
    return environment, entries


def test_the_crontab_runs_what_there_is_when_it_says() -> None:
    environment, entries = crontab()
    assert {"PATH", "TRBATCH_REDIS_URL", "TRBATCH_STORE"} <= environment.keys()
    now = datetime.datetime(2026, 11, 22, 12, 30)  # a Sunday
    due = [croniter(when, now).get_next(datetime.datetime) for when, _ in entries]
    assert due == [datetime.datetime(2026, 11, 23, 1), datetime.datetime(2026, 11, 29, 12)]
    for _, what in entries:
        assert "%" not in what, "cron takes it for a line's end"
        assert subprocess.run(["bash", "-n", "-c", what], check=False).returncode == 0
    script, spec = entries[0][1].split()[3:5]
    assert os.access(ROOT / script, os.X_OK)
    assert read_job_file(ROOT / spec)["task"] == "nightly"
    above = click.Context(cli.commands, **cli.commands.context_settings)
    name, *words = entries[1][1].partition(" 2>")[0].split()[1:]
    assert cli.commands.commands[name].make_context(name, words, parent=above)


def nightly(spec: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "jobs" / "nightly.sh", spec, *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> str:
    """A `trbatch` to be found by a script."""
    file = tmp_path / "trbatch"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -m trbatch "$@"\n')
    file.chmod(0o755)
    return str(file)


def test_the_nightly_script_goes_from_spec_to_dataset_and_passes_its_code_on(
    redis_url: str, tmp_path: Path, program: str
) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": text} for text in ("hello", "refuse")])
    text = f'input = "in.jsonl"\nmodel = "{MODEL}"\noutput = "out.parquet"\n'
    file = spec_file(tmp_path, text)
    done: list[subprocess.CompletedProcess[str]] = []
    script = threading.Thread(target=lambda: done.append(nightly(file, TRBATCH=program)))
    script.start()
    while script.is_alive():
        work()
        script.join(0.2)
    assert done[0].returncode == 3, done[0].stderr
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 2
    assert "receipt" in done[0].stdout


def test_the_nightly_script_ends_with_the_code_of_what_went_wrong(
    tmp_path: Path, program: str
) -> None:
    file = spec_file(tmp_path, 'input = "missing.jsonl"\n')
    done = nightly(file, TRBATCH=program)
    assert (done.returncode, "missing.jsonl" in done.stderr) == (2, True)
    with file.open() as held:
        subprocess.run(["flock", "--nonblock", str(held.fileno())], pass_fds=[held.fileno()],
                       check=True)  # fmt: skip
        done = nightly(file, TRBATCH=program)
    assert (done.returncode, "is being run already" in done.stderr) == (1, True)


def pipeline() -> Any:
    sys.path.insert(0, str(ROOT / "jobs"))
    try:
        import generate_and_judge
    finally:
        sys.path.pop(0)
    return generate_and_judge


class Judge(EchoEngine):
    """Echoes prompts; says what it makes of questions."""

    def _echo(self, request: Any) -> Any:
        completion = super()._echo(request)
        if completion.text and "RATING:" in completion.text:
            answer = completion.text.partition("ANSWER:\n")[2].partition("\n")[0]
            completion.text = {"SAY 0": "4", "SAY 1": " 5 of 5."}.get(answer, "no idea")
        return completion


def test_the_pipeline_judges_every_answer_and_loses_no_row(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [
        {"prompt": "say 0"},
        {"id": "chat", "messages": [{"role": "user", "content": "say 1"}]},
        {"id": "bad"},
        {"prompt": "refuse"},
        {"custom_id": "line", "method": "POST", "url": "/v1/completions",
         "body": {"model": MODEL, "prompt": "say 3"}},
    ]  # fmt: skip
    prompts, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "judged.parquet"
    codes: list[int] = []
    script = pipeline()
    arguments = [str(prompts), str(output), "--model", MODEL]
    waiting = threading.Thread(target=lambda: codes.append(script.main(arguments)))
    waiting.start()
    while waiting.is_alive():
        run_worker(WorkerConfig(burst=True, publish_s=0.05), load=lambda model: Judge())
        waiting.join(0.1)
    assert codes == [3], capsys.readouterr().err
    found = pq.read_table(output)
    assert found["custom_id"].to_pylist() == ["1", "chat", "bad", "4", "line"]
    assert found["text"].to_pylist() == ["SAY 0", "SAY 1", None, None, "SAY 3"]
    assert found["score"].to_pylist() == [4, 5, None, None, None]
    assert found["verdict"].to_pylist() == ["4", " 5 of 5.", None, None, "no idea"]
    assert "5 rows, 2 with a score, 4.50 on average" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "score"),
    [("4", 4), ("Rating: 3.", 3), ("5/5", 5), ("10", None), ("4.5", None), ("", None), (None, None),
     ("7 or 2", 2)],
)  # fmt: skip
def test_a_score_is_a_number_that_stands_alone(verdict: str | None, score: int | None) -> None:
    assert pipeline().score_of(verdict) == score


@pytest.mark.long
def test_the_pipeline_runs_with_the_small_real_model(
    home: Path, small_model: Path, tmp_path: Path
) -> None:
    rows = [{"id": f"q{i}", "prompt": f"Question: what is {i} plus {i}? Answer:"} for i in range(4)]
    prompts, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "judged.parquet"
    codes: list[int] = []
    script = pipeline()
    arguments = [str(prompts), str(output), "--model", str(small_model), "--max-tokens", "12"]
    waiting = threading.Thread(target=lambda: codes.append(script.main(arguments)))
    waiting.start()
    with local.WorkerProcess(["--model", str(small_model), "--device", "cpu"], "", print):
        waiting.join(180)
    assert codes == [0]
    found = pq.read_table(output)
    assert found["custom_id"].to_pylist() == [f"q{i}" for i in range(4)]
    assert all(found["verdict"].to_pylist())
