"""JobFolder: the sole owner of where a job's files lie, which segments there are, what is missing.

    <store>/<job>/manifest.json                  what was asked, and what the input was
                  chunks/<reading>/00000.parquet the checked input, one lease of work a file
                  segments/<worker>-….parquet    finished rows, published every few seconds
                  control.json                   paused, cancelled, deadline, priority
                  retries/….json                 which failed rows are to be decoded again
                  errors.jsonl stats.json        written by collect
                  _SUCCESS | _PARTIAL            whether collect found every row
    <store>/matrices/                            the tasks' warm matrices

The folder is the truth and needs neither a queue nor a worker to be understood. A row is done when
a segment holds its key: (id, request fingerprint, sample).
"""

from __future__ import annotations

import os
import time
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import pyarrow as pa

from trbatch import chunks, passthrough
from trbatch.chunk_files import opened
from trbatch.chunks import ChunkRow
from trbatch.config import JobSpec, default_store
from trbatch.control import Control
from trbatch.engine.sequence import Request, TaskKey
from trbatch.errors import InputError, JobFailed
from trbatch.figures import Figures, Progress, covered_seconds
from trbatch.manifest import Manifest
from trbatch.naming import MATRICES
from trbatch.pace import recent_pace
from trbatch.schema import Key
from trbatch.segments import Ledger, SegmentWriter
from trbatch.shaping import CHAT_ARGUMENTS
from trbatch.storage import LocalFolder, folder
from trbatch.submission import MANIFEST, MARKS, submit
from trbatch.trace import Steps

__all__ = ["ChunkRow", "JobFolder", "Key"]

QUICK_COUNT_S = 0.2  # comparing all keys is no burden at any time
COUNT_RESTS = 3  # times that it took: the pause after a comparison that took longer
_NOT_COUNTED = ((frozenset[str](), 0), (0, 0))  # segments and retries seen; rows ok and failed


class JobFolder:
    """One job's folder, on a local disk or in an object store.

    Not for several threads at once. The manifest is read when the folder is opened; `refresh` reads
    it again.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = folder(path)
        self.path = self.folder.path
        self.manifest = self._read_manifest()
        self.continued = False  # whether `submit` found the job there already,
        self.reread = False  # and read its input anew
        self.ledger = Ledger(self.folder)
        self._segments = SegmentWriter(self.folder)
        self._task_key: TaskKey | None = None  # asked for with every row
        self._count_ended = self._count_took = 0.0  # seconds
        self._counted: tuple[tuple[frozenset[str], int], tuple[int, int]] = _NOT_COUNTED

    @classmethod
    def submit(cls, spec: JobSpec) -> Self:
        """Make the job of a spec or continue it; see `submission.submit`. Enqueues nothing.

        Raises:
            InputError: the input is unusable or an id is repeated.
            ResumeRefused: the job is there and cannot be continued as `spec.resume` asks.
        """
        submission = submit(spec)
        job = cls(submission.path)
        job.continued, job.reread = submission.continued, submission.reread
        return job

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The job of a folder.

        Raises:
            InputError: the folder is no job folder.
            UsageError: it is damaged, or of another version's format.
        """
        return cls(path)

    @classmethod
    def find(cls, name: str, store: str = "") -> Self:
        """A job by its folder's path, or by its id in a store (default: `default_store()`).

        Raises:
            InputError: there is neither.
        """
        if folder(name).exists(MANIFEST):
            return cls(name)
        in_store = folder(store or default_store()).join(name)
        if "/" not in name and folder(in_store).exists(MANIFEST):
            return cls(in_store)
        if "/" in name:
            raise InputError(
                f"no job folder at {name}",
                hint="give the folder that submit printed: it holds manifest.json",
            )
        raise InputError(
            f"there is no job {name!r} in {folder(store or default_store()).path}",
            hint="give the id that submit printed, or the job folder's path; --store if it lies "
            "elsewhere",
        )

    @property
    def id(self) -> str:
        """The job's id: the name of its folder."""
        return self.manifest.id

    @property
    def spec(self) -> JobSpec:
        """What was asked."""
        return self.manifest.spec

    @property
    def matrices(self) -> Path | str:
        """Where the store keeps the tasks' matrices; a URL's text in an object store."""
        if isinstance(self.folder, LocalFolder):
            return Path(self.path).parent / MATRICES
        return f"{self.path.rpartition('/')[0]}/{MATRICES}"

    @property
    def task_key(self) -> TaskKey:
        """The matrix that this job's rows read and write: the store's, or one of its own."""
        if self._task_key is None:
            self._task_key = self._named_task()
        return self._task_key

    def _named_task(self) -> TaskKey:
        manifest, folder = self.manifest, self.matrices
        if self.spec.private_matrix:
            return TaskKey(manifest.matrix, apart=self.path)
        apart = manifest.id if self.spec.cold else ""
        return TaskKey(manifest.matrix, folder, apart, self.spec.cold)

    def refresh(self) -> None:
        """Read the manifest again: the input may have been read anew since."""
        self.manifest = self._read_manifest()
        self._task_key = None
        self._counted = _NOT_COUNTED

    def is_current(self) -> bool:
        """Whether the input was not read anew since the manifest was read."""
        return self._read_manifest().chunk_folder == self.manifest.chunk_folder

    def chunk_rows(self, index: int) -> list[ChunkRow]:
        """The rows of a chunk, bad ones included.

        Raises:
            JobFailed: it is missing or damaged.
        """
        with self._chunk(index) as file:
            return chunks.read_rows(file)

    def chunk_table(self, index: int) -> pa.Table:
        """A chunk with its passed-through columns; see `chunks.SCHEMA`."""
        with self._chunk(index) as file:
            return chunks.read_table(file)

    def passthrough_schema(self) -> passthrough.Schema:
        """Names and types of the passed-through columns, over all chunks."""
        return passthrough.unified(self._chunk_schemas())

    def control(self) -> Control:
        """What people want of the job now; read anew at each call."""
        return Control.of(self.folder)

    def done(self) -> Container[Key]:
        """The rows that the segments hold, failed ones included, cancelled ones not."""
        self.ledger.refresh()
        return self.ledger

    def missing(self, index: int, done: Container[Key] | None = None) -> list[tuple[ChunkRow, int]]:
        """Rows of a chunk and their samples that still have to be decoded.

        Args:
            index: of the chunk.
            done: keys to leave out; `done()` if None.
        """
        done = self.done() if done is None else done
        return [
            (row, sample)
            for row in self.chunk_rows(index)
            for sample in range(row.samples)
            if row.key(sample) not in done
        ]

    def missing_chunks(self) -> list[int]:
        """Chunks of which at least one row still has to be decoded."""
        done = self.done()
        asked = [i for i, samples in enumerate(self.manifest.chunk_samples) if samples]
        if not len(self.ledger):
            return asked
        return [i for i in asked if any(key not in done for key in self._chunk_keys(i))]

    def request(self, row: ChunkRow, sample_index: int, key: Hashable | None = None) -> Request:
        """One sample of a good row as the engine takes it; its key is the row's `Key` if None."""
        assert row.error is None, f"row {row.custom_id} cannot be decoded: {row.error}"
        return Request(
            key=row.key(sample_index) if key is None else key,
            sampling=row.sampling(self.spec.sampling),
            seed=row.seed,
            sample_index=sample_index,
            order=row.prompt_index,
            task=self.task_key,
            prompt=row.request.get("prompt"),
            messages=row.request.get("messages"),
            chat_template_kwargs=row.request.get(CHAT_ARGUMENTS),
        )

    def publish(
        self,
        worker: str,
        results: Sequence[Mapping[str, Any]],
        *,
        facts: Mapping[str, str] | None = None,
        steps: Steps | None = None,
    ) -> str:
        """Write finished rows as one segment; they are safe when this returns.

        Args:
            worker: who decoded them; part of the segment's name.
            results: result rows as `results.result_row` makes them, at least one.
            facts: what the dataset's metadata should say of the engine, e.g. its dtype.
            steps: that the engine made since the segment before; see `trace.Steps`.

        Returns:
            the segment's file name.
        """
        return self._segments.publish(worker, results, facts or {}, steps)

    def progress(self, *, exact: bool = False) -> Progress:
        """How far the job is. Reads only footers that it has not read yet.

        Keys are compared as well once the footers claim that nothing is missing, and always when
        the input was read anew or rows are retried: only keys can tell a duplicate or an outdated
        row. Where that takes long it is done now and then, unless it must be `exact`. The seconds
        left are counted from the newest row on, since the folder does not tell who works.
        """
        footers = self.ledger.footers()
        figures = Figures()
        for footer in footers:
            figures.add(footer.figures)
        ok, failed = figures.rows_ok, figures.rows_failed
        asked = sum(self.manifest.chunk_samples)
        self.ledger.retries.refresh()
        if ok + failed >= asked or self.manifest.generation or self.ledger.retries:
            ok, failed = self.outcomes() if exact or self._count_is_due() else self._counted[1]
        busy = covered_seconds(footer.span for footer in footers)
        pace = recent_pace(footers)
        return Progress(
            rows=self.manifest.samples,
            rows_ok=ok,
            rows_failed=failed + self.manifest.rows_failed,
            rows_cancelled=figures.rows_cancelled,
            rows_repetitive=figures.rows_repetitive,
            prompt_tokens=figures.prompt_tokens,
            completion_tokens=figures.completion_tokens,
            num_spec_steps=figures.num_spec_steps,
            mean_acceptance_length=figures.mean_acceptance_length,
            draft_acceptance_rate=figures.draft_acceptance_rate,
            speedup=figures.speedup,
            busy_s=busy,
            tokens_per_s=figures.completion_tokens / busy if busy > 0 else None,
            seconds_left=None if pace is None else pace.seconds_for(asked - ok - failed),
            last_row_at=max((footer.span[1] for footer in footers), default=None),
        )

    def mark(self, *, complete: bool) -> None:
        """Leave `_SUCCESS` or `_PARTIAL` in the folder, and only that one."""
        right, wrong = MARKS if complete else MARKS[::-1]
        self.folder.remove(wrong)
        self.folder.write(right, b"")

    def outcomes(self) -> tuple[int, int]:
        """How many of the rows asked for succeeded and failed, by their keys."""
        seen = (frozenset(self.ledger.refresh()), len(self.ledger.retries))
        if self._counted[0] == seen:
            return self._counted[1]
        start = time.monotonic()
        ok = failed = 0
        for index in range(self.manifest.chunks):
            for key in self._chunk_keys(index):
                succeeded = self.ledger.succeeded(key)
                ok += succeeded is True
                failed += succeeded is False
        self._counted = (seen, (ok, failed))
        self._count_ended = time.monotonic()
        self._count_took = self._count_ended - start
        return ok, failed

    def _count_is_due(self) -> bool:
        """Whether to compare all keys again: not too often where it takes seconds."""
        rested = time.monotonic() - self._count_ended
        return self._count_took < QUICK_COUNT_S or rested > COUNT_RESTS * self._count_took

    @contextmanager
    def _chunk(self, index: int) -> Iterator[BinaryIO]:
        try:
            with opened(self.folder, self.manifest.chunk_name(index)) as file:
                yield file
        except JobFailed as error:
            if self.is_current():
                raise
            raise JobFailed(
                f"the input of job {self.id} was read anew meanwhile", hint="the same command again"
            ) from error

    def _chunk_keys(self, index: int) -> Iterator[Key]:
        with self._chunk(index) as file:
            return chunks.read_keys(file)

    def _chunk_schemas(self) -> Iterator[passthrough.Schema]:
        for index in range(self.manifest.chunks):
            with self._chunk(index) as file:
                schema = chunks.read_schema(file)
            yield schema

    def _read_manifest(self) -> Manifest:
        try:
            data = self.folder.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{self.path} is not a job folder: it has no {MANIFEST}",
                hint="give the id that submit printed, or the job folder's path",
            ) from error
        return Manifest.from_json(data, self.folder.join(MANIFEST))
