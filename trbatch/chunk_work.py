"""A chunk in a worker's hands: from the lease to the engine's requests to result rows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from trbatch.chunk_lease import BadChunk, Lease
from trbatch.chunks import ChunkRow
from trbatch.confinement import Confinement
from trbatch.engine.sequence import Completion, Request
from trbatch.errors import TrbatchError, UsageError
from trbatch.job import JobFolder
from trbatch.naming import row_place
from trbatch.queue_names import ModelKey
from trbatch.results import result_row
from trbatch.suspects import ALONE, Suspects

FOLDERS_KEPT = 4  # open job folders without work; each remembers which rows are done


@dataclass(slots=True, eq=False)
class ChunkWork:
    """A chunk in flight: what the engine still owes, what no segment holds yet."""

    lease: Lease
    folder: JobFolder
    rows: list[tuple[ChunkRow, int]]  # with the sample's index; a request's key is its place here
    owed: set[int] = field(default_factory=set)
    given: set[int] = field(default_factory=set)  # of the owed ones, those that the engine has
    # Groups of places; one is begun when nothing of those before is in the engine or unpublished.
    waves: deque[list[int]] = field(default_factory=deque)
    poison: list[int] = field(default_factory=list)
    unpublished: int = 0
    failed_rows: int = 0
    held: bool = False  # nothing was decoded because people have stopped the job
    retries: int = 0  # requests to retry that were known when it was begun
    _waiting: deque[int] = field(default_factory=deque)  # of the wave that was begun

    @classmethod
    def begin(cls, lease: Lease, folder: JobFolder) -> Self:
        """The chunk with what its job still lacks; nothing if the job has moved on or is held.

        Raises:
            BadChunk: the job has no such chunk, or not for this model's queues.
        """
        manifest = folder.manifest
        if manifest.generation != lease.generation:
            return cls(lease, folder, [])
        if lease.chunk >= manifest.chunks:
            raise BadChunk(f"job {folder.id} has {manifest.chunks} chunks, none {lease.chunk}")
        if lease.queue.name not in ModelKey(manifest.model, manifest.revision).queue_names:
            raise BadChunk(f"job {folder.id} is for {manifest.model}, not for this queue")
        if folder.control().stopped:
            return cls(lease, folder, [], held=True)
        rows = folder.missing(lease.chunk, None)
        waves, poison = _waves(rows, lease.suspects)
        return cls(
            lease, folder, rows, set(range(len(rows))),
            waves=waves, poison=poison, retries=len(folder.ledger.retries),
        )  # fmt: skip

    @property
    def quarantined(self) -> bool:
        """Whether it may kill its process, and so runs in one without other chunks."""
        return bool(self.lease.suspects)

    @property
    def done(self) -> bool:
        """Whether every row lies in a segment."""
        return not self.owed and not self.unpublished

    @property
    def in_engine(self) -> int:
        """Rows that the engine was asked for and has not answered."""
        return len(self.given)

    @property
    def held_up(self) -> bool:
        """Whether its next rows wait for the publication of those before."""
        return bool(self.waves and self.unpublished and not self.given and not self._waiting)

    def asked_again(self) -> bool:
        """Whether failed rows of it are to be retried of which nobody knew when it was begun.

        Raises:
            TrbatchError: the job folder cannot be read.
        """
        retries = self.folder.ledger.retries
        retries.refresh()
        return len(retries) > self.retries and bool(self.folder.missing(self.lease.chunk))

    def requests(self, most: int) -> tuple[list[Request], list[Completion]]:
        """The next rows as the engine's requests; and those that cannot be one, as errors."""
        requests: list[Request] = []
        impossible = [self._poisoned(place) for place in self.poison]
        self.poison = []
        if self.waves and not (self._waiting or self.given or self.unpublished):
            self._waiting.extend(self.waves.popleft())
        while self._waiting and len(requests) < most:
            place = self._waiting.popleft()
            try:
                requests.append(self._request(place))
                self.given.add(place)
            except UsageError as error:
                impossible.append(self._error(place, "invalid_sampling", error.message))
        return requests, impossible

    def result(self, completion: Completion, place: int, worker: str) -> dict[str, Any]:
        """The result row of a finished request. An error says of which line of the input it is."""
        row, _ = self.rows[place]
        manifest = self.folder.manifest
        if completion.finish_reason == "error":
            where = row_place(manifest.input.path, row.line)
            completion = replace(completion, error_message=f"{where}: {completion.error_message}")
        return result_row(
            completion,
            row,
            model=manifest.model,
            task=manifest.task,
            worker=worker,
            attempts=self.lease.attempt,
            finished_at=time.time(),
        )

    def _request(self, place: int) -> Request:
        return self.folder.request(*self.rows[place], key=(self.lease.id, place))

    def _poisoned(self, place: int) -> Completion:
        cause = self.lease.suspects.cause
        message = f"decoding this row alone ended the process {ALONE} times: {cause}"
        return self._error(place, "poison", message)

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


def _waves(
    rows: list[tuple[ChunkRow, int]], suspects: Suspects
) -> tuple[deque[list[int]], list[int]]:
    """Places of rows in the order of running: each group of suspects, then all others; poison."""
    places = {(row.prompt_index, sample): place for place, (row, sample) in enumerate(rows)}
    poison = [place for name, place in places.items() if name in suspects.poison]
    left = dict.fromkeys(place for place in places.values() if place not in set(poison))
    waves: deque[list[int]] = deque()
    for group in suspects.groups:
        wave = [places[name] for name in group if places.get(name) in left]
        for place in wave:
            del left[place]
        waves.append(wave)
    waves.append(list(left))
    return deque(wave for wave in waves if wave), poison


class Folders:
    """The job folders that this worker has open, each opened once.

    Args:
        confinement: where job folders may lie.
    """

    def __init__(self, confinement: Confinement) -> None:
        self.confinement = confinement
        self._open: dict[str, JobFolder] = {}

    def open(self, lease: Lease) -> JobFolder:
        """The chunk's job folder; read again if the chunk is of another generation.

        Raises:
            BadChunk: it lies outside the folders that this worker may read.
        """
        folder = self._open.pop(lease.folder, None)
        if folder is None or folder.manifest.generation != lease.generation:
            self.confinement.check_folder(lease.folder)
            folder = JobFolder.open(lease.folder)
        self._open[lease.folder] = folder  # behind the others: the order is by last use
        return folder

    def has_results(self, lease: Lease) -> bool:
        """Whether rows of the chunk's job were decoded: its model could be loaded then."""
        try:
            return bool(self.open(lease).ledger.names())
        except TrbatchError:  # it cannot be read; whoever takes the chunk will say so
            return False

    def close_idle(self, in_use: Iterable[str]) -> None:
        """Forget all but the last used of the folders that are not `in_use`."""
        busy = set(in_use)
        for path in [path for path in self._open if path not in busy][:-FOLDERS_KEPT]:
            del self._open[path]
