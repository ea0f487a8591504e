"""Names: of a job and its task, from its input's path; of a model as all call it; of a worker."""

from __future__ import annotations

import os
import re
import uuid
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from trbatch import adapters
from trbatch.errors import UsageError

MATRICES = "matrices"  # a folder of the store beside the job folders

_ROOT_MARKS = (".git", "pyproject.toml", "trbatch.toml")
_DATE = re.compile(
    r"(?<!\d)(?:19|20)\d{2}(?P<dash>[-_.]?)(?:0[1-9]|1[0-2])"  # 2026-08, 202608
    r"(?:(?P=dash)(?:0[1-9]|[12]\d|3[01])(?:[T_-]?\d{2}[-_:.]?\d{2}(?:[-_:.]?\d{2})?)?)?(?!\d)"
)
_LONGEST = 80  # characters of a slug


def slug(text: str) -> str:
    """The text as a name that every file system and URL takes; "" becomes "unnamed"."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    clean = re.sub(r"([-._])[-._]+", r"\1", clean).strip("-._")
    return clean[:_LONGEST].strip("-._") or "unnamed"


def stem(path: str) -> str:
    """The file's name without its extensions, e.g. `night-1` of `/data/night-1.jsonl.gz`."""
    name = path.rpartition("/")[2]
    return re.sub(r"(\.(jsonl|json|ndjson|parquet))?(\.(gz|zst))?$", "", name, flags=re.IGNORECASE)


def checked_job_name(name: str) -> str:
    """A job's name as the user gave it.

    Raises:
        UsageError: it cannot be a folder's name in the store.
    """
    if name == MATRICES or slug(name) != name:
        raise UsageError(
            f"a job cannot be named {name!r}",
            hint=f"use letters, digits, '.', '_' and '-', e.g. {slug(name + '-1')!r}",
        )
    return name


def model_name(given: str) -> str:
    """A local model by its absolute path, so that it is found from any folder; else a hub name.

    A folder in the working directory that is no model does not hide the hub name that it is called
    by.

    Raises:
        UsageError: it can only be a local model, and there is none.
    """
    base, adapter = adapters.split(given)
    if adapter:
        return adapters.joined(model_name(base), adapters.adapter_name(adapter))
    path = Path(os.path.expanduser(given))  # unlike pathlib's it takes every text
    is_gguf = path.suffix == ".gguf"
    if path.is_file() if is_gguf else (path / "config.json").is_file():
        return str(path.absolute())
    if not is_gguf and not is_local_path(given):
        return given
    what = "GGUF file" if is_gguf else "model folder"
    raise UsageError(
        f"there is no {what} at {path}",
        hint="give a GGUF file, a folder that holds config.json and *.safetensors, or a hub name",
    )


def is_local_path(given: str) -> bool:
    """Whether a model's name cannot be a hub name."""
    return given.startswith(("/", "./", "../", "~")) or given in (".", "..")


def default_job_id(path: str, settings: dict[str, Any]) -> str:
    """`<stem>-<8 hex digits of the input's absolute path and the settings>`."""
    asked = orjson.dumps([path, settings], option=orjson.OPT_SORT_KEYS)
    return f"{slug(stem(path))}-{blake2b(asked, digest_size=4).hexdigest()}"


def default_task(path: str) -> str:
    """`<project folder>-<stem without dates>`: the same for tonight's input and for tomorrow's.

    The project folder is the nearest one above with a `.git`, a `pyproject.toml` or a
    `trbatch.toml`, else the one that the file lies in.
    """
    if "://" in path:
        project = path.rpartition("/")[0].rpartition("/")[2]
    else:
        parents = Path(path).absolute().parents
        marked = (p for p in parents if any((p / mark).exists() for mark in _ROOT_MARKS))
        project = next(marked, parents[0]).name
    undated = slug(_DATE.sub("", stem(path)))
    return slug(f"{project}-{undated}" if undated != "unnamed" else project)


def row_place(path: str, line: int) -> str:
    """A row's place, spelled as in the errors of `prompts.read_batches`."""
    return f"{path}, row {line}" if path.lower().endswith(".parquet") else f"{path}:{line}"


def worker_name(name: str) -> str:
    """Never made twice, not even by a restarted container: segments are named after it."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return f"{safe}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
