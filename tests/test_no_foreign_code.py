"""No code but ours is run: not out of Redis, not out of models, not out of jobs."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from trbatch import models, worker
from trbatch.config import JobSpec, WorkerConfig
from trbatch.errors import ModelError
from trbatch.queue_names import ModelKey

PACKAGE = Path(models.__file__).parent
# Modules and functions that turn data into code, and the option that lets a shell do it.
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.name)
def test_no_file_of_the_package_turns_data_into_code(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names):
                assert not {name.name.partition(".")[0] for name in names} & FORBIDDEN
            case ast.ImportFrom(module=str(module)):
                assert module.partition(".")[0] not in FORBIDDEN
            case ast.Call(func=ast.Name(name)):
                assert name not in CALLS, f"line {node.lineno}"
            case ast.Call(func=ast.Attribute(value=ast.Name("torch"), attr=name)):
                assert name != "load", f"line {node.lineno}"
            case ast.keyword(arg="shell") if file.name == "hooks.py":
                assert "--on-complete" in file.read_text(), "what the user typed, and nothing else"
            case ast.keyword(arg="shell" | "allow_pickle"):
                raise AssertionError(f"{node.arg} in line {node.lineno}")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights."""
    network: Any = tiny.network("llama")
    network.config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_not_opened_whatever_their_file_is_called(
    folder: Path, tmp_path: Path, name: str
) -> None:
    marker = tmp_path / "marker"
    torch.save({"lm_head.weight": Bomb(marker)}, folder / name)
    with pytest.raises(ModelError):
        models.load_model(str(folder), device="cpu")
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ModelError):
        models.load_model(str(folder), device="cpu")
    assert not marker.exists()


def test_a_models_own_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        models.load_model(str(folder), device="cpu")
    assert not marker.exists()


def test_a_job_cannot_ask_a_worker_to_run_a_models_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job's folder says of it is not even looked at."""
    asked: list[bool] = []

    def load(*_: Any, trust_remote_code: bool, **__: Any) -> Any:
        asked.append(trust_remote_code)
        raise ModelError("enough")

    monkeypatch.setattr("trbatch.models.load_model", load)
    assert JobSpec(input="x", trust_remote_code=True).trust_remote_code
    for trusts in (False, True):
        with pytest.raises(ModelError):
            worker.load_engine(WorkerConfig(trust_remote_code=trusts), ModelKey("m"))
    assert asked == [False, True]
