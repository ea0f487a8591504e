"""What a job was asked to do and what its input was: `manifest.json`, the first truth of a job."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any, Self

import orjson

from trbatch.config import JobSpec
from trbatch.errors import InputError, Unreachable, UsageError
from trbatch.input_limits import check_rereadable, unreadable
from trbatch.masking import mask_text, mask_url

FORMAT = 1  # of the job folder
_CHUNK_FOLDER = re.compile(r"chunks/[\w-]+")  # inside the job folder, whoever wrote the manifest

_LONGEST_IN_WORDS = 120  # characters of a setting

# Settings that change neither the good rows nor how they are decoded.
_FREE_SETTINGS = (
    "input",
    "out",
    "output",
    "name",
    "resume",
    "chunk_size",
    "max_row_bytes",
    "deadline",
    "priority",
)
# Settings that came later, all of them empty by default: a job without them keeps its id.
_LATER_SETTINGS = (
    "template",
    "system_prompt",
    "chat",
    "chat_template_kwargs",
    "ignore_body_fields",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputState:
    """What the input file was when it was read."""

    path: str  # absolute
    size: int  # bytes
    stamp: str  # time of the last change, or the object store's checksum
    digest: str  # of the content; "" for a file in an object store

    @classmethod
    def of(cls, path: str) -> Self:
        """The state of a file now. Reads it once, for its digest.

        Raises:
            InputError: there is no such file, or it cannot be read.
        """
        size, stamp = _stamp(path)
        return cls(path=path, size=size, stamp=stamp, digest=_digest(path))

    def holds(self) -> bool:
        """Whether the file is as it was. Reads it only if its time has changed."""
        size, stamp = _stamp(self.path)
        if (size, stamp) == (self.size, self.stamp):
            return True
        return bool(self.digest) and size == self.size and self.digest == _digest(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was asked, and what the input was split into."""

    id: str
    spec: JobSpec
    model: str
    revision: str
    task: str
    job_seed: int
    created: str  # ISO 8601, UTC
    version: str  # of trbatch
    input: InputState
    rows: int  # of the input, bad ones included
    rows_failed: int  # of the input that are bad and need no worker
    unnamed_rows: int  # good ones whose id is their number
    generation: int  # how often the input was read anew
    chunk_folder: str  # name below the job folder
    chunk_samples: tuple[int, ...]  # by chunk: samples to decode
    errors: dict[str, int] = dataclasses.field(default_factory=dict)  # bad rows by error code
    format: int = FORMAT

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return len(self.chunk_samples)

    @property
    def matrix(self) -> str:
        """The task whose matrix these rows read and write: a private one is the job's alone."""
        return f"{self.task} (job {self.id} alone)" if self.spec.private_matrix else self.task

    @property
    def samples(self) -> int:
        """Rows of the complete output: one for each sample, one for each bad row."""
        return sum(self.chunk_samples) + self.rows_failed

    def chunk_name(self, index: int) -> str:
        """A chunk's file below the job folder."""
        assert 0 <= index < self.chunks, f"job {self.id} has chunks 0 to {self.chunks - 1}"
        return f"{self.chunk_folder}/{index:05d}.parquet"

    def to_json(self) -> bytes:
        """The manifest as it is stored."""
        return orjson.dumps(dataclasses.asdict(self), option=orjson.OPT_INDENT_2)

    @classmethod
    def from_json(cls, data: bytes, path: str) -> Self:
        """The manifest of a job folder.

        Raises:
            UsageError: it is damaged or of another format.
        """
        try:
            values: dict[str, Any] = orjson.loads(data)
            if values.get("format") != FORMAT:
                raise UsageError(
                    f"{path} has format {values.get('format')}, this trbatch reads {FORMAT}",
                    hint=f"it was made by trbatch {values.get('version')}",
                )
            values["spec"] = JobSpec.from_dict(values["spec"])
            values["input"] = InputState(**values["input"])
            values["chunk_samples"] = tuple(map(int, values["chunk_samples"]))
            if not _CHUNK_FOLDER.fullmatch(values["chunk_folder"]):
                raise TypeError(f"chunks cannot lie in {values['chunk_folder']!r}")
            return cls(**values)
        except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{path} is damaged: {error}") from error


def settings(spec: JobSpec, model: str) -> dict[str, Any]:
    """What must be the same for a job to be continued: what decides its rows and their texts."""
    values = {k: v for k, v in spec.to_dict().items() if k not in _FREE_SETTINGS}
    values = {k: v for k, v in values.items() if v or k not in _LATER_SETTINGS}
    return values | {"model": model}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Each setting that differs, in words."""
    found = []
    for name in old | new:
        before, after = old.get(name), new.get(name)
        if name == "sampling" and before and after:
            found += differences(before, after)
        elif _plain(before) != _plain(after):
            found.append(f"{name} was {_short(before)}, now {_short(after)}")
    return found


def _short(value: Any) -> str:
    """A setting for a message: of a long text its begin."""
    text = repr(value)
    return text if len(text) <= _LONGEST_IN_WORDS else f"{text[:_LONGEST_IN_WORDS]}…"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _stamp(path: str) -> tuple[int, str]:
    try:
        if "://" in path:
            return _remote_stamp(path)
        check_rereadable(path)
        state = os.stat(path)
        return state.st_size, str(state.st_mtime_ns)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ImportError, ValueError) as error:
        raise unreadable(path, error) from error


def _remote_stamp(path: str) -> tuple[int, str]:
    import fsspec  # here: it takes longer to import than a local file needs

    try:
        files, place = fsspec.core.url_to_fs(path)
        return int(files.size(place) or 0), str(files.checksum(place))
    except (FileNotFoundError, ImportError, ValueError):
        raise
    except Exception as error:  # each store's library has errors of its own
        raise Unreachable(
            f"cannot read {mask_url(path)}: {mask_text(str(error)) or type(error).__name__}",
            hint="credentials come from where the store's library looks for them, e.g. the "
            "environment",
        ) from error


def _digest(path: str) -> str:
    if "://" in path:
        return ""  # the store's checksum is enough, and a second download too much
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise unreadable(path, error) from error
