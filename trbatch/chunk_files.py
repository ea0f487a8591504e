"""The chunk files of a job: written by one reading of its input, made safe, checked and opened.

Each reading has a folder of its own, `chunks/<generation>-<token>`, so that two commands at once
never mix their chunks. The manifest names the one that counts. Others are outdated if their
generation is lower; else a command may be filling them at this moment.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, Self

import orjson
import pyarrow as pa

from trbatch import chunks
from trbatch.config import JobSpec
from trbatch.errors import InputError, JobFailed, Unreachable
from trbatch.ids import RepeatCheck
from trbatch.input_limits import MAX_COLUMNS
from trbatch.manifest import Manifest
from trbatch.prompts import Batch, check_repeats
from trbatch.storage import Folder, LocalFolder

CHUNKS = "chunks"
_READING = re.compile(r"(\d+)-[0-9a-f]{8}")
_LOCAL_WRITERS = 1  # threads; more of them only contend with the one that reads and hashes
_REMOTE_WRITERS = 8  # an object store takes much longer for a chunk than it takes to make one
_CURE = (
    "the same `trbatch submit` or `trbatch run` that made it reads the input anew and keeps what "
    "is finished"
)


def new_reading(generation: int) -> str:
    """The name below the job folder of a new folder of chunks."""
    return f"{CHUNKS}/{generation}-{secrets.token_hex(4)}"


def generation_of(reading: str) -> int | None:
    """Which generation of the input a folder below `chunks` holds; None if its name is not ours."""
    found = _READING.fullmatch(reading)
    return int(found[1]) if found else None


@contextmanager
def opened(job: Folder, name: str) -> Iterator[BinaryIO]:
    """A chunk for reading.

    Raises:
        JobFailed: it is missing or damaged.
        Unreachable: the storage fails.
    """
    try:
        with job.open(name) as file:
            yield file
    except FileNotFoundError as error:
        raise JobFailed(
            f"the chunk {job.join(name)} is missing; submit the job again", hint=_CURE
        ) from error
    except OSError as error:
        if error.errno is not None:
            what = f"cannot read {job.join(name)}: {error.strerror}"
            raise Unreachable(what) from error
        raise _damaged(job, name, error) from error  # Arrow's own, of bytes that make no sense
    except (pa.ArrowException, orjson.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise _damaged(job, name, error) from error


def _damaged(job: Folder, name: str, error: Exception) -> JobFailed:
    words = str(error).partition("\n")[0]
    return JobFailed(
        f"the chunk {job.join(name)} is damaged ({words}); submit the job again", hint=_CURE
    )


def are_whole(job: Folder, manifest: Manifest) -> bool:
    """Whether every chunk of a job is there and can be read.

    In an object store they are only looked for: an object is whole, or not there.
    """
    names = [manifest.chunk_name(index) for index in range(manifest.chunks)]
    found = set(job.names(manifest.chunk_folder))
    if any(name.rpartition("/")[2] not in found for name in names):
        return False
    return not isinstance(job, LocalFolder) or all(_is_whole(job, name) for name in names)


def _is_whole(job: Folder, name: str) -> bool:
    try:
        with opened(job, name) as file:
            chunks.read_table(file)
    except JobFailed:
        return False
    return True


class ChunkWriter:
    """Writes batches as chunks and counts what a manifest says about them.

    Files are encoded and stored by threads of their own, while the next rows are read and hashed.
    A chunk is certainly stored only when the context has ended, and safe from a power cut only
    after `settle`.
    """

    def __init__(self, job: Folder, name: str, spec: JobSpec, job_seed: int) -> None:
        self.folder = name
        self.ids = RepeatCheck()
        self.errors: Counter[str] = Counter()  # bad rows by code
        self.unnamed_rows = 0
        self.columns: set[str] = set()  # that pass through
        self.chunk_samples: list[int] = []
        self._job = job
        self._spec = spec
        self._hasher = chunks.RowHasher(spec.model, spec.revision, spec.sampling, job_seed)
        self._writers = _LOCAL_WRITERS if isinstance(job, LocalFolder) else _REMOTE_WRITERS
        self._threads = ThreadPoolExecutor(self._writers, thread_name_prefix="chunk-writer")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        while self._waiting and kind is None:
            self._waiting.popleft().result()

    def write(self, batch: Batch) -> None:
        """Write the next chunk. Waits when the threads are far behind."""
        table, samples = chunks.encode(batch, self._hasher)
        self.columns.update(chunks.passed_names(table.schema))
        if len(self.columns) > MAX_COLUMNS:
            place = f"{self._spec.input}: by line {batch.rows[-1].line:,}"
            raise InputError(
                f"{place} the rows have more than {MAX_COLUMNS:,} different fields",
                hint='put what differs from row to row into one field, e.g. "data": {…}',
            )
        number = len(self.chunk_samples)
        self._waiting.append(self._threads.submit(self._store, number, table))
        if len(self._waiting) > 4 * self._writers:
            self._waiting.popleft().result()
        self.chunk_samples.append(samples)
        self.ids.add(row.id for row in batch.rows)
        for row in batch.rows:
            if row.error is not None:
                self.errors[row.error.code] += 1
            self.unnamed_rows += not row.named and row.request is not None

    def check_repeats(self, again: Iterable[Batch]) -> None:
        """Raise `InputError` if an id came twice.

        A bad row without an id gives way when its number is another row's id: one bad row must not
        refuse the rest.

        Args:
            again: the batches once more; looked at only if an id may have come twice.
        """
        repeated = self.ids.repeated()
        if not repeated:
            return
        spec = self._spec
        rows = (row for batch in again for row in batch.rows)
        for row in check_repeats(rows, repeated, spec.input):
            index, position = divmod(row.index, spec.chunk_size)
            with self._job.open(self._name(index)) as file:
                table = chunks.read_table(file)
            self._store(index, chunks.with_id(table, position, f"{row.id} (line {row.line})"))

    def settle(self) -> None:
        """Let all chunks survive a power cut from now on; all at once, which is much quicker.

        Raises:
            Unreachable: some have gone meanwhile.
        """
        if len(self._job.names(self.folder)) != len(self.chunk_samples):
            raise Unreachable(
                f"another command has removed chunks of {self._job.path} while they were written",
                hint="submit again: the input is then read anew",
            )
        self._job.sync(self.folder)

    def _store(self, index: int, table: pa.Table) -> None:
        self._job.write(self._name(index), chunks.to_bytes(table), durable=False)

    def _name(self, index: int) -> str:
        return f"{self.folder}/{index:05d}.parquet"
