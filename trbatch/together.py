"""Whether Parquet files of one folder open as one dataset.

`datasets` takes the columns of the first file by name and casts all others to them: a column that a
later file lacks is null there, one that only a later file has is an error, and so is a value that
cannot be cast; see `casting`.
"""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from trbatch.casting import Misfit, doubtful, misfit_of_types, misfit_of_values
from trbatch.errors import UsageError
from trbatch.masking import mask_url, printable
from trbatch.parquet_files import open_parquet, schema_of
from trbatch.storage import Folder

_BATCH_ROWS = 8192  # whose values are compared at a time


class _File(NamedTuple):
    """A Parquet file, whose name in the dataset need not be where it lies now."""

    name: str
    folder: Folder
    base: str
    schema: pa.Schema


def check_together(root: Folder, name: str, source: Folder, base: str) -> None:
    """Refuse a file with which the others in its folder would no longer open as one dataset.

    Reads footers: that of the first file, or of all where the new one comes first by name. Columns
    are read only where it depends on their values.

    Args:
        root: the place of the dataset.
        name: of the new file in it, e.g. `data/night.parquet`; what it replaces does not count.
        source: where the new file lies now.
        base: its name there.

    Raises:
        UsageError: they would not; or a file that is there already is no Parquet file.
        Unreachable: the storage fails.
    """
    new = _File(name, source, base, schema_of(source, base))
    below = name.rpartition("/")[0]
    found = [f"{below}/{base}" for base in root.names(below) if base.endswith(".parquet")]
    others = [other for other in found if other != name]
    if others and others[0] < name:
        _check(new, others[0], _file(root, others[0]).schema)
        return
    for other in others:
        _check(_file(root, other), name, new.schema)


def _file(root: Folder, name: str) -> _File:
    """A file of the dataset."""
    try:
        return _File(name, root, name, schema_of(root, name))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise _damaged(root, name) from error


def _check(file: _File, first: str, wanted: pa.Schema) -> None:
    found = misfit_of_types(file.schema, wanted)
    if found is None and (columns := doubtful(file.schema, wanted)):
        found = _misfit_of_values(file, columns, wanted)
    if found is None:
        return
    there = f"{found.wanted} in" if found.wanted else "not in"
    reason = f" ({printable(found.reason)})" if found.reason else ""
    raise UsageError(
        f"{file.name} and {first} would not open as one dataset: the column "
        f"{printable(found.column)!r} is {found.type} in {file.name} and {there} {first}, the "
        f"first file there{reason}",
        hint="push this job to a place of its own, e.g. a folder below this one",
    )


def _misfit_of_values(file: _File, columns: list[str], wanted: pa.Schema) -> Misfit | None:
    try:
        with file.folder.open(file.base) as opened:
            parquet = open_parquet(opened)
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                if found := misfit_of_values(batch, wanted):
                    return found
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise _damaged(file.folder, file.base) from error
    return None


def _damaged(root: Folder, name: str) -> UsageError:
    return UsageError(
        f"{mask_url(root.join(name))} is no whole Parquet file: no dataset opens with it",
        hint="remove it, or push to another place",
    )
