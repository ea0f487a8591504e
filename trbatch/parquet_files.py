"""How Parquet is read from Python's files: in the thread that asks, and nowhere else."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from trbatch.storage import Folder

FOOTER = 64 * 1024  # bytes of a file's end that are asked for at first
_MAGIC = b"PAR1"


def open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """An open Parquet file that reads only when it is asked to, in the thread that asks.

    With Arrow's default, `pre_buffer`, threads of its own read ahead and hold the bytes, which are
    Python objects. One that lets go of them while the interpreter ends aborts the process after all
    its work is done: one `trbatch submit` in 120 on a busy machine (pyarrow 26, Python 3.11).

    Raises:
        pa.ArrowException, OSError, UnicodeDecodeError: it is no Parquet file, or a damaged one.
    """
    return pq.ParquetFile(file, pre_buffer=False)


def read_parquet(file: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a Parquet file; of all columns, or of these. Raises like `open_parquet`."""
    names = None if columns is None else list(columns)
    return open_parquet(file).read(columns=names, use_threads=False)


def schema_of(folder: Folder, name: str) -> pa.Schema:
    """The schema of a Parquet file in a folder, of which only the end is read.

    Raises:
        pa.ArrowException, OSError, UnicodeDecodeError: it is no Parquet file, or a damaged one.
        FileNotFoundError: there is none.
        Unreachable: the storage fails.
    """
    end = folder.tail(name, FOOTER)
    # The file ends with its footer, the footer's length in 4 bytes and the magic.
    needed = int.from_bytes(end[-8:-4], "little") + 8
    if end.endswith(_MAGIC) and needed > len(end):
        end = folder.tail(name, needed)
    return open_parquet(io.BytesIO(end)).schema_arrow
