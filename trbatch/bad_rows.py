"""The first rows of a job that are unusable, to be shown when it is submitted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from trbatch.job import JobFolder

_CHUNKS = 16  # that are looked at: a submit of a million rows should not read them all again


def first_reasons(job: JobFolder, most: int) -> list[str]:
    """Why the first few bad rows of the input cannot be decoded, each with its file and line.

    Fewer than `most`, maybe none, if they do not stand near the input's begin.
    """
    return list(islice(_reasons(job), most)) if job.manifest.rows_failed else []


def _reasons(job: JobFolder) -> Iterator[str]:
    for index in range(min(job.manifest.chunks, _CHUNKS)):
        for row in job.chunk_rows(index):
            if row.error is not None:
                yield f"{row.error.message} ({row.error.code})"
