"""What the pages say is what the program has: commands, columns, codes, names, links."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doc_commands
import doc_pages
import pytest

import trbatch
from trbatch.cli_help import ENVIRONMENT
from trbatch.deaths import STOPPED
from trbatch.error_codes import FROM_DECODING, FROM_THE_INPUT
from trbatch.errors import EXIT_CODES, TrbatchError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [*sorted((ROOT / "jobs").glob("*.md")), *sorted((ROOT / "workers").rglob("*.md"))]
PAGES += sorted((ROOT / "docker").rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def maker() -> Any:
    """docs/make_reference.py, which is no module of the package."""
    place = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_every_command_on_a_page_is_one_that_the_command_line_takes(name: str) -> None:
    found = list(doc_commands.of_page((ROOT / name).read_text()))
    wrong = [doc_commands.problem(line, whole=whole) for line, whole in found]
    assert not [problem for problem in wrong if problem]


@pytest.mark.parametrize(
    ("line", "whole", "said"),
    [
        ("trbatch submit p.jsonl --temprature 1", True, "No such option"),
        ("trbatch submit", True, "input is missing"),
        ("trbatch submit", False, ""),
        ("trbatch run p.jsonl --format csv", True, "'csv' is none of"),
        ("trbatch collekt JOB", False, "no command 'collekt'"),
        ("trbatch wait JOB too many", True, "too many arguments"),
        ("trbatch retry JOB --failed [--code C]", False, ""),
        ("trbatch worker --gpus 0", False, "No such option"),
    ],
)
def test_commands_that_no_command_line_takes_are_found(line: str, whole: bool, said: str) -> None:
    problem = doc_commands.problem(line, whole=whole)
    assert said in problem and bool(said) == bool(problem)


def test_commands_are_found_wherever_a_shell_would_run_them() -> None:
    script = "A=b trbatch wait $(trbatch submit p.jsonl) && \\\n  .venv/bin/trbatch collect x > f"
    assert list(doc_commands.in_script(script)) == [
        "trbatch submit p.jsonl", "trbatch wait SUBSTITUTED", "trbatch collect x",
    ]  # fmt: skip


# Blocks of these languages are run by test_doc_pages.py and test_sh_blocks.py; others are shown.
RUN = {"console", "python", "sh"}
SHOWN = {"", "text", "json", "toml", "mermaid", "promql"}


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_run_or_is_no_program(name: str) -> None:
    used = {block.language for block in doc_pages.blocks((ROOT / name).read_text())}
    assert used <= RUN | SHOWN
    if (ROOT / name).parent not in (ROOT, ROOT / "docs"):
        assert not used & RUN, "blocks are run of the README and the guides alone: move them there"


@pytest.mark.parametrize("name", NAMES)
def test_a_program_is_one_before_it_is_run(name: str) -> None:
    for block in doc_pages.blocks((ROOT / name).read_text()):
        if block.language == "sh":
            script = "\n".join(block.lines)
            done = subprocess.run(
                ["bash", "-n"], input=script, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{name}:{block.line}: {done.stderr}"
        if block.language == "python":
            compile("\n".join(block.lines), f"{name}:{block.line}", "exec")


@pytest.mark.parametrize("page", ["reference.md", "api.md"])
def test_generated_pages_are_what_the_program_makes_of_them(page: str) -> None:
    made = maker().PAGES[page]()
    assert (ROOT / "docs" / page).read_text() == made, "out of date: make reference"


def test_every_public_name_is_on_the_python_page() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in trbatch.__all__ if f"### `trbatch.{name}`" not in text]
    assert not missing, "docs/make_reference.py does not show these"
    for name in trbatch.__all__:
        assert getattr(trbatch, name).__doc__, name


def test_every_setting_on_the_python_page_says_what_it_is() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    part = text[text.index("### `trbatch.JobSpec`") : text.index("## Errors")]
    blank = re.findall(r"^\| `(\w+)` \|.*\|  \|$", part, re.MULTILINE)
    assert set(blank) <= {"input", "sampling"}


def anchors(page: Path) -> set[str]:
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in found}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{name}: {target}"


def codes_in_the_source() -> Iterator[str]:
    """The error codes that the package gives rows, as they are written in it."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "trbatch").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    makers = {"BadRow", "RowError", "RowEnd", "bad", "_error", "failed"}
    # Exceptions that carry an error row's code, of which there may be more one day.
    makers |= {
        node.name
        for node in nodes
        if isinstance(node, ast.ClassDef) and "RowError(code," in ast.unparse(node)
    }
    for node in nodes:
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = [one.value for one in node.keywords if one.arg == "error_code"]
            given += node.args if called in makers else []
            values = [one.value for one in given if isinstance(one, ast.Constant)]
            texts = [one for one in values if isinstance(one, str)]
            yield from (one for one in texts if re.fullmatch(r"[a-z]+(_[a-z]+)*", one))


def test_every_error_code_of_a_row_is_in_the_table() -> None:
    known = [code for code, _, _ in (*FROM_THE_INPUT, *FROM_DECODING)]
    assert len(known) == len(set(known))
    used = set(codes_in_the_source()) - {"error"}  # a finish reason
    assert used - set(known) == set(), "add a line for each to trbatch/error_codes.py"
    assert set(known) - used <= {"deadline"}, "nobody gives these"


def exit_codes(kind: type[TrbatchError]) -> set[int]:
    return {kind.exit_code}.union(*(exit_codes(below) for below in kind.__subclasses__()))


def test_every_exit_code_is_explained_here_and_in_the_readme() -> None:
    explained = {int(code) for code, _ in EXIT_CODES}
    assert explained == exit_codes(TrbatchError) | {0, 3, *STOPPED}
    line = re.search(r"^Exit codes: .*?\n\n", (ROOT / "README.md").read_text(), re.M | re.S)
    assert line is not None
    assert {int(number) for number in re.findall(r"\d+", line[0])} == explained


def test_every_variable_that_users_may_set_is_explained() -> None:
    told = {name for names, _ in ENVIRONMENT for name in names.split(", ")}
    pattern = re.compile(r"environ(?:\.get)?[\[(]\"(TRBATCH_\w+|REDIS_URL)\"")
    texts = [file.read_text() for file in (ROOT / "trbatch").rglob("*.py")]
    read = {name for text in texts for name in pattern.findall(text)}
    private = {"TRBATCH_FLIGHT"}  # how a worker finds its supervisor
    assert read
    assert read - told <= private, "add a line to ENVIRONMENT in trbatch/cli_help.py"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("24 ok, 0 failed", "24 ok, 0 failed", True),
        ("24 ok, 0 failed", "23 ok, 1 failed", False),
        ("tokens/s  106.2", "tokens/s  1,064.9", True),
        ("tokens/s  106.2", "tokens/s  -", False),
        ("job prompts-1a2b3c4d", "job prompts-00ff00ff", True),
        ("at 06:32:13 of 2026-11-25", "at 23:59:59 of 2030-01-01", True),
        ("in …/jobs/first", "in /home/a/jobs/first", True),
        ("1,770 generated", "2,001 generated", True),
        ("177 generated", "178 generated", False),
        ("a\n…\nb", "a\nx\ny\nb", True),
        ("a\n…\nb", "a\nb", True),
        ("a\nb", "a\nx\nb", False),
    ],
)
def test_what_a_page_may_leave_open(shown: str, printed: str, same: bool) -> None:
    pattern = doc_pages.pattern_of(shown.splitlines())
    assert (re.fullmatch(pattern, f"{printed}\n") is not None) is same


PAGE = """
```console
$ cat > numbers <<'END'
> 1
> 2
> END
$ wc -l < numbers
2
$ false
$ echo $?
1
```

```python
print("hello")
```

```text
hello
```
"""


def test_a_page_that_lies_is_found_and_one_that_does_not_is_not(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    (tmp_path / "right").mkdir()
    session = doc_pages.Session(tmp_path / "right", tmp_path, clone=False)
    assert doc_pages.disagreements(page, session) == []
    lies = PAGE.replace("\n2\n$ false\n$ echo", "\n3\n$ false\n$ true\n$ echo")
    page.write_text(lies)
    (tmp_path / "wrong").mkdir()
    session = doc_pages.Session(tmp_path / "wrong", tmp_path, clone=False)
    wrong = doc_pages.disagreements(page, session)
    assert [re.findall(r":(\d+): ", one)[0] for one in wrong] == ["7", "9", "11"]
