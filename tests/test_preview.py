"""`trbatch submit --dry-run`: counted without torch, measured or not told, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from job_tools import decode, write_lines

from trbatch import cli, cli_preview, earlier_jobs
from trbatch.config import JobSpec, SamplingParams
from trbatch.engine.sequence import Request
from trbatch.engine.text import encode
from trbatch.errors import InputError, ResumeRefused
from trbatch.job import JobFolder
from trbatch.preview import Preview, preview
from trbatch.tokenizing import PromptCounter

CHAT_TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if style %}in {{ style }} {% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A model folder without weights, of 20 positions, whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "words"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "max_position_embeddings": 20}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def spec_of(tmp_path: Path, rows: list[Any], **settings: Any) -> JobSpec:
    path = write_lines(tmp_path / "in.jsonl", *rows)
    values = {"input": str(path), "out": str(tmp_path / "store"), "model": "m"}
    return JobSpec.from_dict(values | settings)


def seen(tmp_path: Path, rows: list[Any], **settings: Any) -> Preview:
    return preview(spec_of(tmp_path, rows, **settings))


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


def test_prompts_are_rendered_counted_and_shown(tmp_path: Path, words: Path) -> None:
    rows = [
        {"id": "a", "prompt": "one two three"},
        {"id": "b", "messages": [{"role": "user", "content": "Hi there"}], "n": 2},
        "no JSON",
        {"id": "d", "messages": [{"role": "tool", "content": "x"}]},
        {"id": "e", "prompt": "word " * 20},
        {"id": "f", "prompt": "x", "max_tokens": 7},
    ]
    found = seen(tmp_path, rows, model=str(words), chat_template_kwargs={"style": "verse"})
    assert found.rows == 6
    assert found.errors == {"invalid_json": 1, "chat_template_failed": 1, "prompt_too_long": 1}
    places = [message.partition(": ")[0] for message in found.bad_rows]
    assert places == [f"{tmp_path}/in.jsonl:{line}" for line in (3, 4, 5)]
    assert [(one.id, one.text, one.tokens) for one in found.prompts] == [
        ("a", "one two three", 3),
        ("b", "<user> Hi there in verse <assistant>", 6),
        ("f", "x", 1),
    ]
    assert (found.prompt_tokens, found.longest_prompt) == (10, ("b", 6))
    assert (found.samples, found.new_tokens_at_most) == (4, 3 * 256 + 7)
    assert not (tmp_path / "store").exists()


def test_only_three_prompts_and_five_bad_rows_are_shown(
    tmp_path: Path, no_transformers: None
) -> None:
    found = seen(tmp_path, [{"prompt": "p"}] * 5 + ["bad"] * 7)
    assert (len(found.prompts), len(found.bad_rows), found.rows_bad) == (3, 5, 7)


def test_counts_are_a_workers_own(small_model: Path) -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "Où est la gare?\n\n  Thanks — 3.14"}]
    requests = [
        Request(key=0, sampling=SamplingParams(), **asked)
        for asked in ({"prompt": " Hello  world"}, {"messages": chat}, {"prompt": "你好"})
    ]
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    worker = [len(encode(tokenizer, request, len(tokenizer))) for request in requests]
    assert [one.tokens for one in PromptCounter(str(small_model)).count(requests)] == worker


def test_without_transformers_nothing_is_counted_and_the_extra_is_named(
    tmp_path: Path, no_transformers: None
) -> None:
    path = write_lines(tmp_path / "in.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    arguments = ("submit", path, "--dry-run", "--store", tmp_path / "store", "--model", "m")
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert "not counted: tokens are counted by the package transformers" in result.stdout
    assert "pip install 'trbatch[tokenizers]'" in result.stdout
    assert '{"role":"user","content":"Hi"}' in result.stdout
    assert json.loads(invoke(*arguments, "--json").stdout)["prompt_tokens"] is None


@pytest.mark.long
def test_tokens_are_counted_where_there_is_no_torch(tmp_path: Path, words: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", {"prompt": "one two"})
    code = (
        "import sys; sys.modules['torch'] = None\n"  # as if it were not installed
        "from trbatch.cli import commands; commands()"
    )
    arguments = ["submit", str(path), "--dry-run", "--json", "--model", str(words)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--store", str(tmp_path / "store")],
        capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert json.loads(done.stdout)["prompt_tokens"] == 2
    assert done.stderr == ""


def test_time_is_told_by_earlier_jobs_of_the_model_alone(
    tmp_path: Path, no_transformers: None
) -> None:
    rows = [{"id": f"r{i}", "prompt": "p"} for i in range(10)]
    assert seen(tmp_path, rows).pace is None
    other = JobFolder.submit(spec_of(tmp_path, rows, model="other", name="other"))
    decode(other, 0)
    assert seen(tmp_path, rows).seconds is None
    job = JobFolder.submit(spec_of(tmp_path, rows, name="before"))
    decode(job, 0)  # of 9 tokens a row, in 2.5 s
    found = seen(tmp_path, rows, sampling={"max_tokens": 20})
    assert found.pace is not None
    assert found.pace.jobs == 1
    assert found.pace.tokens_per_sample == 9
    assert found.pace.tokens_per_s == pytest.approx(90 / 2.5, rel=0.01)
    assert found.seconds == pytest.approx(2.5, rel=0.01)
    assert found.seconds_at_most == pytest.approx(200 / 36, rel=0.01)
    path = tmp_path / "in.jsonl"
    told = invoke("submit", path, "--dry-run", "--store", tmp_path / "store", "--model", "m")
    assert "36 tokens/s and 9 tokens a sample of the last job of this model" in told.stdout


def test_of_many_jobs_the_newest_tell_the_time_whatever_they_are_called(
    tmp_path: Path, no_transformers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier_jobs, "_MOST_READ", 2)
    for age, name in enumerate(("zz", "a", "b", "c")):
        rows = [{"id": f"{name}{i}", "prompt": "p"} for i in range(4)]
        job = JobFolder.submit(spec_of(tmp_path, rows, name=name))
        decode(job, 0, completion_tokens=10 * (age + 1))
        os.utime(Path(job.path) / "manifest.json", (1e9 - age, 1e9 - age))
    pace = earlier_jobs.earlier_pace(str(tmp_path / "store"), "m", "", job.spec.task)
    assert pace is not None
    assert (pace.jobs, pace.tokens_per_sample) == (2, 15)
    paths = earlier_jobs.newest_first(str(tmp_path / "store"))
    assert [Path(path).name for path in paths] == ["zz", "a", "b", "c"]


def test_of_a_job_that_is_there_only_what_it_lacks_counts(
    tmp_path: Path, no_transformers: None
) -> None:
    rows = [{"id": f"r{i}", "prompt": "p"} for i in range(6)]
    job = JobFolder.submit(spec_of(tmp_path, rows, name="night", chunk_size=3))
    decode(job, 0)
    grown = [*rows, {"id": "new", "prompt": "q"}]
    found = seen(tmp_path, grown, name="night", chunk_size=3)
    assert found.continues
    assert (found.samples, found.samples_done) == (4, 3)
    with pytest.raises(ResumeRefused, match="system_prompt was None"):
        seen(tmp_path, rows, name="night", system_prompt="Be brief.")


def test_reading_a_large_file_is_seen(
    tmp_path: Path, no_transformers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_preview, "_LINES_APART_S", 0.0)
    path = write_lines(tmp_path / "in.jsonl", *({"prompt": "p"} for _ in range(3)))
    arguments = ("submit", path, "--dry-run", "--model", "m", "--chunk-size", "2", "--json")
    result = invoke(*arguments, "--store", tmp_path / "store")
    assert result.stderr == "2 rows read …\n3 rows read …\n"
    assert json.loads(result.stdout)["rows"] == 3


def test_what_submit_refuses_is_refused(tmp_path: Path, no_transformers: None) -> None:
    with pytest.raises(InputError, match="lines 1 and 2 have the same id"):
        seen(tmp_path, [{"id": "a", "prompt": "p"}, {"id": "a", "prompt": "q"}])
    result = invoke("submit", tmp_path / "none.jsonl", "--dry-run", "--model", "m")
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("before", "now", "code", "said"),
    [
        (None, ["--deadline", "2020-01-01"], 2, "the deadline has passed already"),
        (None, ["--deadline", "soon"], 2, "no point in time"),
        (None, ["--resume", "always"], 7, "there is no job 'j'"),
        ([], ["--n", "2"], 7, "n was 1, now 2"),
        ([], ["--resume", "never"], 7, "is there already"),
        (["changed"], [], 7, "1 of its rows have no id"),
        ([], ["--deadline", "2020-01-01"], 0, ""),  # as `submit`, which continues it
    ],
)
def test_what_submit_refuses_a_dry_run_refuses_in_the_same_words(
    home: Path, tmp_path: Path, no_transformers: None,
    before: list[str] | None, now: list[str], code: int, said: str,
) -> None:  # fmt: skip
    path = write_lines(tmp_path / "in.jsonl", {"prompt": "p"})
    command = ("submit", path, "--store", tmp_path / "s", "--model", "m", "--name", "j")
    if before is not None:
        assert invoke(*command).exit_code == 0
    if before:
        write_lines(path, {"prompt": before[0]})
    dry, real = invoke(*command, *now, "--dry-run"), invoke(*command, *now)
    assert (dry.exit_code, real.exit_code) == (code, code), dry.stderr + real.stderr
    assert said in dry.stderr
    if code:
        assert dry.stderr == real.stderr


def test_the_exit_code_tells_of_bad_rows_and_nothing_reaches_the_terminal_raw(
    tmp_path: Path, no_transformers: None
) -> None:
    path = write_lines(tmp_path / "in.jsonl", {"prompt": "\u001b[2Jx\nsecond line"}, "bad")
    result = invoke("submit", path, "--dry-run", "--store", tmp_path / "s", "--model", "m")
    assert result.exit_code == 3
    assert "\u001b" not in result.stdout
    assert "second line" in result.stdout.splitlines()
    told = invoke("submit", path, "--dry-run", "--store", tmp_path / "s", "--model", "m", "--json")
    assert told.exit_code == 3
    data = json.loads(told.stdout)
    assert (data["errors"], data["rows_bad"]) == ({"invalid_json": 1}, 1)
