"""Job specs: what `trbatch submit jobs/nightly.toml` reads.

A spec is a TOML file with the settings of a job under the names that the Python API has (`store` is
the job store), and a table `[sampling]`. Relative paths start from the spec's own folder. In
`input`, `output` and `name`, `{date}` is the day on which the spec is read, in local time.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trbatch import structured
from trbatch.adapters import CONFIG, JOINT
from trbatch.config import JobSpec, SamplingParams
from trbatch.control import Control
from trbatch.errors import MissingExtra, UsageError
from trbatch.naming import is_local_path
from trbatch.toml_files import TomlFile

SUFFIX = ".toml"
DATED = ("input", "output", "name")
SAMPLING = "sampling"
ADAPTER = "adapter"  # is no field: it becomes a part of the model's name

_JOB = {field.name: field.default for field in dataclasses.fields(JobSpec)}
_SAMPLED = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
_NAMES = {"store" if name == "out" else name: name for name in _JOB}  # in the file -> the field
_DEFAULTS = {name: _JOB[field] for name, field in _NAMES.items()} | {"input": "", ADAPTER: ""}
_PATHS = ("input", "out", "output")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def is_job_file(given: str) -> bool:
    """Whether what was given as an input is a spec: prompts are never TOML."""
    return given.endswith(SUFFIX)


def read_job_file(path: str | Path, today: datetime.date | None = None) -> dict[str, Any]:
    """The fields of `JobSpec` that a spec sets, and the adapter; the sampling is a dictionary.

    Args:
        path: the spec.
        today: what `{date}` stands for; None is the present day.

    Raises:
        UsageError: the file cannot be read, has no `input`, or has a key or value that is wrong;
            file and line are named.
    """
    file = TomlFile.read(Path(path))
    for name in file.values:
        if name in _SAMPLED and name not in _NAMES:
            raise file.wrong(name, f"{name} belongs to the sampling", hint=f"below [{SAMPLING}]")
    file.refuse_unknown(list(_DEFAULTS))
    sampling = dict(file.table(SAMPLING))
    if "seed" in sampling:
        raise file.wrong(
            "seed", "a seed is the job's, not the sampling's", table=SAMPLING,
            hint=f"write it above [{SAMPLING}]",
        )  # fmt: skip
    file.refuse_unknown([name for name in _SAMPLED if name != "seed"], SAMPLING)
    if not file.values.get("input"):
        raise UsageError(f"{file.path}: a job needs an input", hint='e.g. input = "prompts.jsonl"')
    values = {name: value for name, value in file.values.items() if name != SAMPLING}
    for name, value in values.items():
        file.check_type(name, value, _DEFAULTS[name])
        if name != ADAPTER:
            _check(file, name, partial(JobSpec.from_dict, {"input": "x", _NAMES[name]: value}))
        if name == "deadline":
            _check(file, name, partial(Control().asked, deadline=value))
    _check_sampling(file, sampling)
    day = (today or datetime.date.today()).isoformat()
    for name in DATED:
        if name in values:
            values[name] = _dated(file, name, values[name], day)
    fields = {_NAMES.get(name, name): value for name, value in values.items()}
    folder = file.path.absolute().parent
    for name in _PATHS:
        if fields.get(name):
            fields[name] = resolved(fields[name], folder)
    if fields.get("template"):
        fields["template"] = _template(fields["template"], folder)
    for name in ("model", ADAPTER):
        if fields.get(name):
            fields[name] = _weights(fields[name], folder)
    return fields | ({SAMPLING: sampling} if sampling else {})


def resolved(path: str, folder: Path) -> str:
    """A path as it is meant in a file that lies in `folder`; a URL stays as it is."""
    if "://" in path:
        return path
    return os.path.normpath(folder / os.path.expanduser(path))


def _template(given: str, folder: Path) -> str:
    from trbatch.templates import template_file  # here: few jobs need Jinja

    return resolved(given, folder) if template_file(given, folder) else given


def _weights(name: str, folder: Path) -> str:
    """A model or an adapter, or both in one name; what can be a hub name only stays as it is."""
    return JOINT.join(
        resolved(one, folder)
        if is_local_path(one) or one.endswith(".gguf") or _lies_at(folder / one)
        else one
        for one in name.split(JOINT)
    )


def _lies_at(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", CONFIG))


def _check_sampling(file: TomlFile, sampling: dict[str, Any]) -> None:
    """Check the table: each value's type, all of them together, and what only a grammar can tell.

    Together, because `min_tokens` alone may be more than the default of `max_tokens`.
    """
    for name, value in sampling.items():
        file.check_type(name, value, _SAMPLED[name], SAMPLING)
    try:
        made = SamplingParams.from_dict(sampling)
    except UsageError as error:
        named = re.split(r"\W", error.message, maxsplit=1)[0]  # messages begin with the setting
        raise file.wrong(named, error.message, table=SAMPLING, hint=error.hint) from error
    if made.structured is not None:
        _check(file, "structured", partial(structured.check, made.structured), SAMPLING)


def _check(file: TomlFile, key: str, make: Callable[[], Any], table: str = "") -> None:
    """Refuse a value with which something cannot be made, with the line it stands in."""
    try:
        make()
    except MissingExtra:
        raise
    except UsageError as error:
        raise file.wrong(key, error.message, table=table, hint=error.hint) from error


def _dated(file: TomlFile, key: str, text: str, day: str) -> str:
    for found in _PLACEHOLDER.findall(text):
        if found != "date":
            raise file.wrong(key, f"{{{found}}} in {key} is unknown", hint="there is {date}")
    return text.replace("{date}", day)
