"""Templates, system prompts and arguments of chat templates: from columns to what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from job_tools import write_lines

from trbatch import cli
from trbatch.config import DEFAULT_MODEL, JobSpec, SamplingParams
from trbatch.engine.sequence import Request
from trbatch.engine.text import EncodingFailed, prompt_text
from trbatch.errors import ResumeRefused, UsageError
from trbatch.job import JobFolder
from trbatch.manifest import settings

TEMPLATE = "Translate {{ sentence }} into {{ language }}."
ROWS = [
    {"id": "a", "sentence": "Hello", "language": "French"},
    {"id": "b", "sentence": "Bye", "language": "German", "max_tokens": 3},
]


def submit(tmp_path: Path, rows: Any = ROWS, **settings: Any) -> JobFolder:
    if isinstance(rows, pa.Table):
        path = tmp_path / "in.parquet"
        pq.write_table(rows, path)
    else:
        path = write_lines(tmp_path / "in.jsonl", *rows)
    values = {"input": str(path), "out": str(tmp_path / "store"), "model": "m", "seed": 1}
    return JobFolder.submit(JobSpec.from_dict(values | settings))


def requests(job: JobFolder) -> list[dict[str, Any]]:
    return [row.request for row in job.chunk_rows(0)]


def errors(job: JobFolder) -> list[str | None]:
    return [row.error and row.error.message for row in job.chunk_rows(0)]


def fingerprints(job: JobFolder) -> list[str]:
    return [row.fingerprint for row in job.chunk_rows(0)]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])


@pytest.mark.parametrize("as_table", [False, True])
def test_a_template_writes_each_prompt_and_its_columns_pass_through(
    tmp_path: Path, as_table: bool
) -> None:
    table = pa.Table.from_pylist([ROWS[0] | {"max_tokens": None}, ROWS[1]])
    job = submit(tmp_path, table if as_table else ROWS, template=TEMPLATE)
    assert requests(job) == [
        {"prompt": "Translate Hello into French."},
        {"prompt": "Translate Bye into German.", "sampling": {"max_tokens": 3}},
    ]
    assert list(job.passthrough_schema().types) == ["sentence", "language"]


def test_a_template_can_come_from_a_file_and_the_job_keeps_its_text(tmp_path: Path) -> None:
    file = tmp_path / "ask.j2"
    file.write_text("{% if language == 'French' %}Fr{% else %}Other{% endif %}: {{ sentence }}\n")
    job = submit(tmp_path, template=str(file))
    assert [request["prompt"] for request in requests(job)] == ["Fr: Hello", "Other: Bye"]
    assert job.spec.template == file.read_text()
    assert submit(tmp_path, template=str(file)).continued


def test_prompts_and_messages_are_columns_like_others(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "messages": [{"role": "user", "content": "m"}], "body": "b"}]
    job = submit(tmp_path, rows, template="{{ prompt }} {{ messages[0].content }} {{ body }}")
    assert requests(job) == [{"prompt": "p m b"}]
    assert list(job.passthrough_schema().types) == ["prompt", "messages", "body"]


def test_rows_that_a_template_does_not_fit_are_error_rows(tmp_path: Path) -> None:
    rows = [
        {"sentence": "Hello"},
        {"sentence": None, "language": "French"},
        {"sentence": "", "language": ""},
        {"custom_id": "c", "body": {"messages": []}},
    ]
    job = submit(tmp_path, rows, template="{{ sentence }}{{ language }}")
    missing, null, empty, line = errors(job)
    assert missing is not None and "'language' is undefined; it has sentence" in missing
    assert missing.startswith(f"{tmp_path}/in.jsonl:1: ")
    assert null is not None and "null here: sentence" in null and "or ''" in null
    assert empty is not None and "the prompt is empty" in empty
    assert line is not None and "leave --template away" in line


def test_json_in_a_prompt_is_plain_json(tmp_path: Path) -> None:
    about = {"zeal": "<b>naïve & 'quoted'</b>", "age": [1, None, True]}
    job = submit(tmp_path, [{"about": about}], template="{{ about | tojson }}")
    (request,) = requests(job)
    assert request["prompt"] == '{"zeal": "<b>naïve & \'quoted\'</b>", "age": [1, null, true]}'
    job = submit(tmp_path, [{"about": about}], template="{{ about | tojson(indent=2) }}")
    (request,) = requests(job)
    assert request["prompt"] == json.dumps(about, indent=2, ensure_ascii=False)
    rows = [{"about": 1}, {"other": 1}]
    job = submit(tmp_path, rows, template="{{ about | tojson }}", name="two")
    _, message = errors(job)
    assert message is not None and "'about' is undefined" in message


def test_a_null_of_a_table_is_null_and_not_undefined(tmp_path: Path) -> None:
    table = pa.table({"a": ["x", None], "n": [float("nan"), 1.0]})
    job = submit(tmp_path, table, template="{{ a or 'none' }}{% if n %} {{ n }}{% endif %}")
    assert [request["prompt"] for request in requests(job)] == ["x", "none 1.0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ok\n{{ a }}\n{% if a %}\n", ":3: not a valid Jinja template"),
        ("{{ a | nofilter }}", ":1: not a valid Jinja template: No filter named 'nofilter'"),
        ("no columns", "has no {{ column }}"),
    ],
)
def test_a_wrong_template_is_told_before_the_job_with_file_and_line(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "ask.j2"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        submit(tmp_path, template=str(file))
    assert str(file) in caught.value.message
    assert words in caught.value.message
    assert not (tmp_path / "store").exists()


def test_a_template_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no template file nofile\\.j2"):
        submit(tmp_path, template="nofile.j2")
    with pytest.raises(UsageError, match=r"--template:1: not a valid"):
        submit(tmp_path, template="{{ a")


@pytest.mark.parametrize("as_table", [False, True])
def test_a_column_that_no_row_has_is_told_before_the_job_with_the_nearest(
    tmp_path: Path, as_table: bool
) -> None:
    rows = pa.Table.from_pylist(ROWS) if as_table else ROWS
    with pytest.raises(UsageError) as caught:
        submit(tmp_path, rows, template="{{ language }}:\n{{ sentence }} {{ sentense | upper }}")
    kind = "parquet" if as_table else "jsonl"
    assert caught.value.message == (
        f"--template:2: {tmp_path}/in.{kind} has no column 'sentense', which the template reads: "
        "{{ sentence }} {{ sentense | upper }}"
    )
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean 'sentence'?")
    assert "{{ sentense | default('') }}" in caught.value.hint
    assert not list((tmp_path / "store").glob("*/*")), "something of the job is left"


def test_a_misspelt_column_is_wrong_usage_of_submit_and_of_its_dry_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))  # without a tokenizer
    path = write_lines(tmp_path / "in.jsonl", *ROWS)
    for more in ([], ["--dry-run"]):
        asked = ("submit", path, "--model", DEFAULT_MODEL, "--template", "{{ nosuch }}")
        result = invoke(*asked, *more)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "has no column 'nosuch'" in result.stderr
        assert "hint: there are: id, sentence, language, max_tokens." in result.stderr
    assert not list((home / "jobs").glob("*"))


def test_a_misspelt_column_is_told_with_the_file_of_its_template(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path / "cache"))  # without a tokenizer
    monkeypatch.chdir(tmp_path)
    path, file = write_lines(tmp_path / "in.jsonl", *ROWS), tmp_path / "judge.j2"
    asked = ("submit", path, "--model", DEFAULT_MODEL, "--template", file.name)
    file.write_text("Judge:\n\n{{ sentense }}")
    for more in ([], ["--dry-run"]):
        assert f"error: judge.j2:3: {path} has no column" in invoke(*asked, *more).stderr
    file.write_text(TEMPLATE)
    jobs = [submit(tmp_path, template=given) for given in (TEMPLATE, file.name, str(file))]
    assert len({job.id for job in jobs}) == 1, "the file's name is no part of the job"
    assert [job.continued for job in jobs] == [False, True, True]
    with pytest.raises(UsageError, match=r"^judge\.j2:1: .* has no column 'sentence'"):
        submit(tmp_path, [{"id": "a", "language": "French"}], template=file.name)  # read anew


@pytest.mark.parametrize(
    "template",
    [
        "{{ sentence }}{{ note | default('') }}{{ note.text or '' if note is defined }}",
        "{% if note is defined and note %}{{ note }}{% endif %}{{ sentence }}",
        "{% if language == 'Latin' %}{{ note }}{% endif %}{{ sentence }}",
        "{% for note in [1] %}{{ note }}{% endfor %}{{ sentence }}",
        "{% if language %}{% set note = 1 %}{% endif %}{{ note }}{{ sentence }}",
        "{{ [note, sentence] | select('defined') | first }}",
        "{{ sentence or note }}{{ range(2) | list }}",
    ],
)
@pytest.mark.parametrize("as_table", [False, True])
def test_a_column_that_rows_may_lack_needs_not_be_there(
    tmp_path: Path, template: str, as_table: bool
) -> None:
    rows = pa.Table.from_pylist(ROWS) if as_table else ROWS
    assert errors(submit(tmp_path, rows, template=template)) == [None, None]


def test_a_column_of_a_branch_is_refused_only_if_every_row_takes_it(tmp_path: Path) -> None:
    template = "{% if language %}{% set said = sentense %}{{ said }}{% endif %}"
    for rows in (ROWS, pa.Table.from_pylist(ROWS)):
        with pytest.raises(UsageError, match=r":1: .* has no column 'sentense'"):
            submit(tmp_path, rows, template=template)
    rows = [*ROWS, {"sentence": "Hello", "language": ""}]
    *bad, good = errors(submit(tmp_path, rows, template="{{ language and nosuch }}!"))
    assert good is None
    assert all(message is not None and "'nosuch' is undefined" in message for message in bad)


def test_a_column_that_only_late_rows_have_is_no_misspelt_one(tmp_path: Path) -> None:
    rows = [*ROWS, {"sentence": "Ciao", "language": "English", "tone": "merry"}]
    job = submit(tmp_path, rows, template="{{ sentence }} {{ tone }}", chunk_size=1)
    assert (job.manifest.rows, job.manifest.rows_failed) == (3, 2)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_are_sandboxed_and_fail_a_row_at_a_time(tmp_path: Path, template: str) -> None:
    (message,) = errors(submit(tmp_path, [{"a": 1}], template=template))
    assert message is not None
    assert "the template" in message


def test_a_system_prompt_opens_chats_and_makes_chats_of_prompts(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hi"}
    own = {"role": "system", "content": "Mine."}
    rows = [
        {"prompt": "Hi"},
        {"messages": [user]},
        {"messages": [own, user]},
        {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "Hi"}},
    ]
    job = submit(tmp_path, rows, system_prompt="Be brief.")
    ours = {"role": "system", "content": "Be brief."}
    assert requests(job)[:3] == [
        {"messages": [ours, user]}, {"messages": [ours, user]}, {"messages": [own, user]},
    ]  # fmt: skip
    message = errors(job)[3]
    assert message is not None and "use /v1/chat/completions" in message


def test_chat_makes_chats_of_prompts_and_templates(tmp_path: Path) -> None:
    job = submit(tmp_path, template=TEMPLATE, chat=True)
    assert requests(job)[0] == {
        "messages": [{"role": "user", "content": "Translate Hello into French."}]
    }


def test_arguments_of_the_chat_template_reach_it_and_a_rows_own_win(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "Hi"}]
    rows = [
        {"id": "a", "messages": user},
        {"id": "b", "messages": user, "chat_template_kwargs": {"style": "own", "more": [1]}},
        {"id": "c", "messages": user, "chat_template_kwargs": {"chat_template": "x"}},
        {"id": "d", "prompt": "Hi", "chat_template_kwargs": {"style": "own"}},
    ]
    job = submit(tmp_path, rows, chat_template_kwargs={"style": "job"})
    first, second, *bad = job.chunk_rows(0)
    assert job.request(first, 0).chat_template_kwargs == {"style": "job"}
    assert job.request(second, 0).chat_template_kwargs == {"style": "own", "more": [1]}
    assert [row.error and row.error.code for row in bad] == [
        "invalid_chat_template_kwargs", "not_a_chat",
    ]  # fmt: skip


class Templated:
    """A tokenizer's chat template that shows what it was told."""

    chat_template = "any"

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **arguments: Any) -> str:
        return json.dumps([messages, arguments])


def test_the_turn_is_opened_unless_the_last_message_goes_on() -> None:
    messages = [{"role": "assistant", "content": "Once"}]

    def told(**arguments: Any) -> Any:
        request = Request(
            key=0, sampling=SamplingParams(), messages=messages,
            chat_template_kwargs=arguments or None,
        )  # fmt: skip
        return json.loads(prompt_text(Templated(), request))[1]

    assert told() == {"add_generation_prompt": True}
    assert told(continue_final_message=True, style="x") == {
        "add_generation_prompt": False, "continue_final_message": True, "style": "x",
    }  # fmt: skip


def test_a_worker_takes_no_template_from_a_job_folder() -> None:
    request = Request(
        key=0, sampling=SamplingParams(), messages=[{"role": "user", "content": "Hi"}],
        chat_template_kwargs={"chat_template": "{{ 1 }}"},
    )  # fmt: skip
    with pytest.raises(EncodingFailed, match="may not set chat_template"):
        prompt_text(Templated(), request)


def test_a_job_that_sets_none_of_it_keeps_the_id_that_it_had_before() -> None:
    later = {"template", "system_prompt", "chat", "chat_template_kwargs", "ignore_body_fields"}
    assert later.isdisjoint(settings(JobSpec(input="in.jsonl"), "m"))
    assert later & settings(JobSpec(input="in.jsonl", chat=True), "m").keys() == {"chat"}


def test_every_setting_of_the_prompt_is_part_of_a_rows_fingerprint(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "p", "messages": None, "q": "x"}]
    settings: list[dict[str, Any]] = [
        {},
        {"chat": True},
        {"system_prompt": "s"},
        {"system_prompt": "t"},
        {"template": "{{ q }}"},
        {"template": "{{ q }}!"},
        {"chat": True, "chat_template_kwargs": {"style": 1}},
        {"chat": True, "chat_template_kwargs": {"style": 2}},
    ]
    jobs = [submit(tmp_path, rows, **one) for one in settings]
    assert len({job.id for job in jobs}) == len(jobs)
    assert len({fingerprints(job)[0] for job in jobs}) == len(jobs)
    again = submit(tmp_path, rows, **settings[-1])
    assert again.continued and again.id == jobs[-1].id


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"template": TEMPLATE}, {"template": TEMPLATE + " Now!"}, "template was "),
        ({"template": TEMPLATE}, {"template": TEMPLATE, "system_prompt": "s"}, "system_prompt was"),
        (
            {"template": TEMPLATE, "chat": True},
            {"template": TEMPLATE, "chat": True, "chat_template_kwargs": {"style": 1}},
            "chat_template_kwargs was None, now {'style': 1}",
        ),
        (
            {"template": TEMPLATE, "chat": True, "chat_template_kwargs": {"old": 1}},
            {"template": TEMPLATE, "chat": True, "chat_template_kwargs": {"new": 1}},
            "chat_template_kwargs was {'old': 1}, now {'new': 1}",
        ),
    ],
)
def test_a_named_job_refuses_other_prompts_unless_told(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], words: str
) -> None:
    job = submit(tmp_path, name="night", **before)
    with pytest.raises(ResumeRefused) as caught:
        submit(tmp_path, name="night", **after)
    assert words in caught.value.message
    changed = submit(tmp_path, name="night", resume="always", **after)
    assert changed.continued and changed.reread
    assert set(fingerprints(changed)).isdisjoint(fingerprints(job))


def test_the_options_of_the_command_line(tmp_path: Path, redis_url: str) -> None:
    path = write_lines(tmp_path / "in.jsonl", *ROWS)
    store = ["--store", tmp_path / "store", "--model", "m"]
    options = ["--template", TEMPLATE, "--system-prompt", "Be brief."]
    options += ["--chat-template-kwargs", '{"enable_thinking": false}']
    result = invoke("submit", path, *store, *options)
    assert result.exit_code == 0, result.stderr
    job = JobFolder.open(tmp_path / "store" / result.stdout.strip())
    assert requests(job)[0] == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Translate Hello into French."},
        ],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    for value, words in (("{", "not valid JSON"), ("[1]", "must be an object")):
        result = invoke("submit", path, *store, "--chat-template-kwargs", value)
        assert result.exit_code == 2
        assert words in result.stderr
