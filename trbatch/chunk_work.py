"""A chunk in a worker's hands: from the lease to the engine's requests to result rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from trbatch.chunks import ChunkRow
from trbatch.engine.sequence import Completion, Request
from trbatch.errors import UsageError
from trbatch.job import JobFolder
from trbatch.lease import BadChunk, Lease
from trbatch.results import result_row

FOLDERS_KEPT = 4  # open job folders without work; each remembers which rows are done


@dataclass(slots=True, eq=False)
class ChunkWork:
    """A chunk in flight: what the engine still owes, what no segment holds yet."""

    lease: Lease
    folder: JobFolder
    rows: list[tuple[ChunkRow, int]]  # with the sample's index; a request's key is its place here
    owed: set[int] = field(default_factory=set)
    given: int = 0  # places from here on the engine has not been asked for yet
    unpublished: int = 0
    failed_rows: int = 0

    @classmethod
    def begin(cls, lease: Lease, folder: JobFolder) -> Self:
        """The chunk with what its job still lacks; nothing if the job has moved on."""
        if folder.manifest.generation != lease.generation:
            return cls(lease, folder, [])
        rows = folder.missing(lease.chunk, None)
        return cls(lease, folder, rows, owed=set(range(len(rows))))

    @property
    def done(self) -> bool:
        """Whether every row lies in a segment."""
        return not self.owed and not self.unpublished

    @property
    def in_engine(self) -> int:
        """Rows that the engine was asked for and has not answered."""
        return self.given - (len(self.rows) - len(self.owed))

    def requests(self, most: int) -> tuple[list[Request], list[Completion]]:
        """The next rows as the engine's requests; and those that cannot be one, as errors."""
        requests: list[Request] = []
        impossible: list[Completion] = []
        while self.given < len(self.rows) and len(requests) < most:
            place, self.given = self.given, self.given + 1
            try:
                requests.append(self._request(place))
            except UsageError as error:
                impossible.append(self._error(place, "invalid_sampling", error.message))
        return requests, impossible

    def result(self, completion: Completion, place: int, worker: str) -> dict[str, Any]:
        """The result row of a finished request. An error says of which line of the input it is."""
        row, _ = self.rows[place]
        manifest = self.folder.manifest
        if completion.finish_reason == "error":
            where = _place(manifest.input.path, row.line)
            completion = replace(completion, error_message=f"{where}: {completion.error_message}")
        return result_row(
            completion,
            row,
            model=manifest.model,
            task=manifest.task,
            worker=worker,
            attempts=self.lease.attempt,
        )

    def _request(self, place: int) -> Request:
        request = self.folder.request(*self.rows[place])
        return replace(request, key=(self.lease.id, place))

    def _error(self, place: int, code: str, message: str) -> Completion:
        row, sample = self.rows[place]
        return Completion(
            key=(self.lease.id, place),
            finish_reason="error",
            error_code=code,
            error_message=message,
            seed=row.seed,
            sample_index=sample,
        )


class Folders:
    """The job folders that this worker has open, each opened once.

    Args:
        roots: folders or URLs that job folders must lie below; () allows any.
    """

    def __init__(self, roots: tuple[str, ...]) -> None:
        self._roots = roots
        self._open: dict[str, JobFolder] = {}

    def open(self, lease: Lease) -> JobFolder:
        """The chunk's job folder; read again if the chunk is of another generation.

        Raises:
            BadChunk: it lies outside the folders that this worker may read.
        """
        folder = self._open.pop(lease.folder, None)
        if folder is None or folder.manifest.generation != lease.generation:
            _check_root(lease.folder, self._roots)
            folder = JobFolder.open(lease.folder)
        self._open[lease.folder] = folder  # behind the others: the order is by last use
        return folder

    def close_idle(self, in_use: Iterable[str]) -> None:
        """Forget all but the last used of the folders that are not `in_use`."""
        busy = set(in_use)
        for path in [path for path in self._open if path not in busy][:-FOLDERS_KEPT]:
            del self._open[path]


def _place(path: str, line: int) -> str:
    """A row's place, spelled as in the errors of `prompts.read_batches`."""
    return f"{path}, row {line}" if path.lower().endswith(".parquet") else f"{path}:{line}"


def _check_root(folder: str, roots: tuple[str, ...]) -> None:
    """Refuse a job folder outside the allowed ones: paths come out of Redis.

    Raises:
        BadChunk: it is none of them.
    """
    if not roots:
        return
    for root in roots:
        if "://" in folder or "://" in root:
            inside = folder.startswith(root.rstrip("/") + "/") and ".." not in folder.split("/")
        else:
            inside = Path(folder).resolve().is_relative_to(Path(root).resolve())
        if inside:
            return
    raise BadChunk(f"the job folder {folder} lies outside what this worker may read")
