"""What the Dockerfile's steps install, in an empty environment and from what the build sees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PINNED = "--constraint constraints.txt"


def install_line(stage: str) -> str:
    """The arguments of `pip install` in a stage."""
    text = (ROOT / "docker/Dockerfile").read_text().partition(f" AS {stage}\n")[2]
    found = re.search(r"pip install (.+?) &&", text.partition("\nFROM ")[0])
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the build sees, copied as its COPY lines do."""
    folder = tmp_path_factory.mktemp("src")
    for line in (ROOT / "docker/Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for name in sources:
                into = folder / target / (name if len(sources) > 1 else "")
                into.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / name).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / name, into, ignore=ignored)
                else:
                    shutil.copy(ROOT / name, into)
    return folder


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        ["/usr/bin/env", "-i", "PATH=/usr/bin:/bin", "HOME=/nonexistent", *command],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_the_client_image_has_trbatch_and_its_profiles_and_no_torch(
    context: Path, tmp_path: Path
) -> None:
    line = install_line("client")
    assert line == f"{PINNED} '.[hub,s3,structured,tokenizers]'"
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    pip = f"{venv}/bin/pip install --quiet --disable-pip-version-check {line}"
    done = subprocess.run(["sh", "-c", pip], cwd=context, capture_output=True, text=True,
                          check=False, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    program = venv / "bin" / "trbatch"
    assert "Token Recycling" in run(program, "--help", cwd=tmp_path)
    names = run(venv / "bin" / "python", "-c",
                "from trbatch.profiles import shipped\nprint(*shipped().values())",
                cwd=tmp_path).split()  # fmt: skip
    assert [Path(name).stem for name in names] == ["a100", "cpu", "h100", "h200", "l4"]
    assert all(str(venv) in name for name in names)
    installed = run(venv / "bin" / "pip", "list", "--format=freeze", cwd=tmp_path).lower()
    assert all(f"{name}==" in installed for name in ("s3fs", "huggingface_hub", "llguidance"))
    assert not re.search(r"^(torch|triton)==", installed, re.MULTILINE)
    from tiny_files import write_model  # it imports torch

    write_model(tmp_path / "tiny")
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"prompt": "Hello."}\n')
    home = f"TRBATCH_HOME={tmp_path}/home"
    job = run(home, program, "submit", rows, "--model", "org/model", "--regex", "a+", cwd=tmp_path)
    try:
        assert "queued" in run(home, program, "status", job.strip(), cwd=tmp_path)
        dry = ("submit", rows, "--model", tmp_path / "tiny", "--dry-run", "--json")
        assert json.loads(run(home, program, *dry, cwd=tmp_path))["prompt_tokens"] > 0
    finally:
        run(home, program, "server", "stop", cwd=tmp_path)
