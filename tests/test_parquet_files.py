"""Parquet is read in the thread that asks: Arrow's own must hold no Python object at the end."""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trbatch.parquet_files import open_parquet, read_parquet

PACKAGE = Path(__file__).parent.parent / "trbatch"


class Watched(io.BytesIO):
    """A file that remembers which threads read from it."""

    def __init__(self, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=100)
        super().__init__(sink.getvalue())
        self.readers: set[int] = set()

    def read(self, size: int | None = -1, /) -> bytes:
        self.readers.add(threading.get_ident())
        return super().read(size)


TABLE = pa.table({"id": [str(number) for number in range(1000)], "row": range(1000)})


def test_a_whole_table_is_read_in_this_thread() -> None:
    file = Watched(TABLE)
    assert read_parquet(file) == TABLE
    assert file.readers == {threading.get_ident()}


def test_columns_are_read_in_this_thread() -> None:
    file = Watched(TABLE)
    assert read_parquet(file, ["row"]) == TABLE.select(["row"])
    assert file.readers == {threading.get_ident()}


def test_batches_are_read_in_this_thread() -> None:
    file = Watched(TABLE)
    batches = open_parquet(file).iter_batches(64, use_threads=False)
    assert pa.Table.from_batches(batches) == TABLE
    assert file.readers == {threading.get_ident()}


def test_arrow_left_to_itself_reads_in_threads_of_its_own() -> None:
    file = Watched(TABLE)
    pq.ParquetFile(file, pre_buffer=True).read(use_threads=False)
    assert file.readers - {threading.get_ident()}


def test_no_other_module_opens_parquet() -> None:
    own = PACKAGE / "parquet_files.py"
    texts = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py")) if path != own}
    opens = re.compile(r"pq\.(?:ParquetFile\(|read_\w+)|\.iter_batches\((?!.*use_threads=False)")
    assert not [str(path) for path, text in texts.items() if opens.search(text)]
