"""Whether Parquet files of one folder open as one dataset.

`datasets` takes the columns of the first file by name and casts all others to them: a column that a
later file lacks is null there, one that only a later file has is an error, and so is a value that
cannot be cast; see `casting`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa

from trbatch.casting import Misfit, doubtful, misfit_of_types, misfit_of_values
from trbatch.errors import UsageError
from trbatch.masking import mask_url, printable
from trbatch.parquet_files import open_parquet, schema_of
from trbatch.storage import Folder

_READERS = 8  # footers that are read at a time
_BATCH_ROWS = 8192  # whose values are compared at a time


class _File(NamedTuple):
    """A Parquet file, whose name in the dataset need not be where it lies now."""

    name: str
    folder: Folder
    base: str
    schema: pa.Schema


def check_together(root: Folder, name: str, source: Folder, base: str) -> None:
    """Refuse a file with which the others in its folder would no longer open as one dataset.

    Reads footers: that of the first file; or of all where the new one comes first by name, unless
    it replaces one of the same types. Columns are read only where it depends on their values.

    Args:
        root: the place of the dataset.
        name: of the new file in it, e.g. `data/night.parquet`.
        source: where the new file lies now.
        base: its name there.

    Raises:
        UsageError: they would not; or a file that is there already is no Parquet file.
        Unreachable: the storage fails.
    """
    new = _File(name, source, base, schema_of(source, base))
    below = name.rpartition("/")[0]
    found = [f"{below}/{base}" for base in root.names(below) if base.endswith(".parquet")]
    for other in found:
        # One that has vanished meanwhile is passed over.
        if other < name and (first := _file(root, other)) is not None:
            _check(new, first.name, first.schema)
            return
    if name in found and _replaces_the_same(root, new):
        return
    for later in _files(root, [other for other in found if other > name]):
        _check(later, name, new.schema)


def _replaces_the_same(root: Folder, new: _File) -> bool:
    try:
        return bool(schema_of(root, new.name).equals(new.schema))
    except (pa.ArrowException, UnicodeDecodeError, OSError):
        return False  # it has vanished, or is damaged and goes


def _files(root: Folder, names: list[str]) -> Iterator[_File]:
    """Files with their schemas, in order, without those that have vanished."""
    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="footers")
    try:
        for file in pool.map(lambda name: _file(root, name), names):
            if file is not None:
                yield file
    finally:
        pool.shutdown(cancel_futures=True)


def _file(root: Folder, name: str) -> _File | None:
    """A file of the dataset; None if it has vanished."""
    try:
        return _File(name, root, name, schema_of(root, name))
    except FileNotFoundError:
        return None
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
    except FileNotFoundError:  # it has vanished since
        return None
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise _damaged(file.folder, file.base) from error
    return None


def _damaged(root: Folder, name: str) -> UsageError:
    return UsageError(
        f"{mask_url(root.join(name))} is no whole Parquet file: no dataset opens with it",
        hint="remove it, or push to another place",
    )
