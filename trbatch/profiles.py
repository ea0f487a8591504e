"""Profiles of workers: settings that suit a kind of machine, in a TOML file under the flags' names.

Those that come with trbatch lie in `workers/profiles/` and are installed as data of the package.
`[worker]` in `trbatch.toml` holds the same settings for whoever works in that folder. Weakest
first: the defaults, the profile that `[worker]` names, `[worker]` itself, `--profile`, the flags.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trbatch.config import PROJECT_SETTINGS
from trbatch.errors import UsageError
from trbatch.job_files import resolved
from trbatch.naming import is_local_path
from trbatch.toml_files import TomlFile

NONE = "none"  # as a profile's name: neither a profile nor what trbatch.toml says of workers
WORKER = "worker"  # the table of trbatch.toml
PROJECT = "trbatch.toml"

_PACKAGE = Path(__file__).parent
_SHIPPED = (_PACKAGE / "worker_profiles", _PACKAGE.parent / "workers" / "profiles")

Placed = tuple[TomlFile, Any]  # a value and the file that it is from


def shipped() -> dict[str, Path]:
    """The profiles that come with trbatch, by name: as installed, else as in the repository."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), _SHIPPED[0])
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def find(profile: str) -> Path:
    """The file of a profile, by the name of a shipped one or by a path.

    Raises:
        UsageError: there is none; the message names the nearest, or all that come with trbatch.
    """
    known = shipped()
    if profile in known:
        return known[profile]
    if "/" in profile or profile.endswith(".toml"):
        return Path(profile).expanduser()
    close = difflib.get_close_matches(profile, known, n=1)
    hint = (
        f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}; or give a path"
    )
    raise UsageError(f"there is no profile {profile!r}", hint=hint)


def settings(
    profile: str, defaults: Mapping[str, Any], folder: Path | None = None
) -> dict[str, Placed]:
    """What a profile and `trbatch.toml` set, each with the file that says so.

    Args:
        profile: as `--profile` was given; "" for none, `NONE` to ignore `trbatch.toml` as well.
        defaults: of every setting that there is.
        folder: where `trbatch.toml` may lie; the working directory if None.

    Raises:
        UsageError: a file cannot be read, or has a key or a value that is wrong; file and line are
            named.
    """
    if profile == NONE:
        return {}
    found: dict[str, Placed] = {}
    project = (folder or Path.cwd()) / PROJECT
    if project.is_file():
        file = TomlFile.read(project)
        file.refuse_unknown(PROJECT_SETTINGS)
        own = _checked(file, {**defaults, "profile": ""}, WORKER)
        named = str(own.pop("profile", (file, ""))[1])
        if named not in ("", NONE):
            found |= _profile(named, defaults)
        found |= own
    return found | (_profile(profile, defaults) if profile else {})


def _profile(profile: str, defaults: Mapping[str, Any]) -> dict[str, Placed]:
    file = TomlFile.read(find(profile))
    return _checked(file, defaults)


def _checked(file: TomlFile, defaults: Mapping[str, Any], table: str = "") -> dict[str, Placed]:
    values = file.table(table) if table else file.values
    file.refuse_unknown(list(defaults), table)
    found: dict[str, Placed] = {}
    for key, value in values.items():
        file.check_type(key, value, defaults[key], table)
        found[key] = (file, _meant(file.path.absolute().parent, key, value))
    return found


def _meant(folder: Path, key: str, value: Any) -> Any:
    """A value with paths as they are meant in a file of this folder."""
    if key == "root":
        return [resolved(one, folder) for one in ([value] if isinstance(value, str) else value)]
    if key == "model" and is_local_path(value):
        return resolved(value, folder)
    return value
