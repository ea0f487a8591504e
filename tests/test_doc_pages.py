"""Every page whose examples run, run: from a clean clone, with an empty home, in order."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import doc_pages
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if doc_pages.steps(page.read_text())
]


@pytest.fixture
def session(small_model: Path) -> Iterator[doc_pages.Session]:
    home = Path(tempfile.mkdtemp(prefix="trd-", dir="/tmp"))
    found = doc_pages.Session(home, cache=small_model.parent.parent)
    yield found
    found.close()
    shutil.rmtree(home)


def test_readme_and_guides_are_pages_that_run() -> None:
    guides = "quickstart writing-jobs workers nightly tuning troubleshooting api".split()
    assert {"README.md", *(f"docs/{name}.md" for name in guides)} <= set(PAGES)


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_its_commands_print(page: str, session: doc_pages.Session) -> None:
    wrong = doc_pages.disagreements(ROOT / page, session)
    assert not wrong, "\n\n".join(wrong)


def lowest_versions() -> str:
    """The oldest of what the client says that it works with, as constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = [
        re.fullmatch(r"([a-z0-9]+)>=([\d.]+)(?:,<\d+)?", one) for one in project["dependencies"]
    ]
    assert all(lowest), "a dependency without a lower bound"
    return "".join(f"{one[1]}=={one[2]}\n" for one in lowest if one)


@pytest.mark.long
@pytest.mark.parametrize("versions", ["pinned", "lowest"])
def test_the_client_installs_into_an_empty_environment_without_torch(
    home: Path, tmp_path: Path, versions: str
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    doc_pages.clean_clone(tmp_path / "clone")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "Say hello."}\n')
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    constraints = tmp_path / "clone" / "constraints.txt"
    if versions == "lowest":
        constraints.write_text(lowest_versions())
    run(binaries / "python", *pip, "--constraint", constraints, tmp_path / "clone")
    assert run(binaries / "trbatch", "submit", rows, "--name", "first") == "first\n"
    assert "0/1 rows" in run(binaries / "trbatch", "status", "first")
    assert "trbatch worker" in run(binaries / "trbatch", "status")
    worker = subprocess.run(
        [binaries / "trbatch", "worker", "--burst"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert worker.returncode == 2 and "needs torch and transformers" in worker.stderr
    assert "1 queued, 0 running, 0 failed" in run(binaries / "trbatch", "status", "first")
    run(binaries / "trbatch", "cancel", "first")
    assert run(binaries / "trbatch", "report", "first", "-o", "first.html")
    installed = run(binaries / "python", "-m", "pip", "list", "--format=freeze")
    assert "rq==" in installed and "torch" not in installed
