"""Whether a Parquet file is much larger in memory than it looks: told by its metadata alone.

A file of some kilobytes can hold a value of gigabytes, once and referred to by many rows
(dictionary encoding) or in pages that are nearly nothing when compressed.
"""

from __future__ import annotations

from typing import BinaryIO

import pyarrow.parquet as pq

from trbatch.input_limits import MAX_EMPTY_EXPANSION

_LARGE = 64 << 20  # bytes of a row group that fit into memory whatever they expand from
_HEADER = 64  # bytes of a page's header that are looked at


def may_explode(metadata: pq.FileMetaData, file: BinaryIO, most: int) -> bool:
    """Whether some thousand rows may be too much at once, so that they are best read one by one.

    Args:
        metadata: of the file.
        file: to look at the headers of its dictionaries; its position stays as it is.
        most: bytes of a value that are fine.
    """
    position = file.tell()
    try:
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return any(
            _may_explode(group.column(number), file, most)
            for group in groups
            for number in range(group.num_columns)
        )
    finally:
        file.seek(position)


def _may_explode(column: pq.ColumnChunkMetaData, file: BinaryIO, most: int) -> bool:
    size, packed = column.total_uncompressed_size, max(column.total_compressed_size, 1)
    if size > _LARGE and size / packed > MAX_EMPTY_EXPANSION:
        return True
    if not column.has_dictionary_page or column.dictionary_page_offset is None or size <= most:
        return False
    file.seek(column.dictionary_page_offset)
    found = _uncompressed_size(file.read(_HEADER))
    return found is None or found > most


def _uncompressed_size(header: bytes) -> int | None:
    """Bytes of a page behind this header; None if it is none.

    A page's header is a Thrift struct in the compact protocol. Its first two fields are its type
    and its size, 32-bit integers: each the byte 0x15 and a zigzag varint.
    """
    place, value = 0, None
    for _ in range(2):
        if header[place : place + 1] != b"\x15":
            return None
        place += 1
        shift = value = 0
        while place < len(header):
            byte = header[place]
            value |= (byte & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if byte < 0x80:
                break
        value = value >> 1 ^ -(value & 1)
    return value
