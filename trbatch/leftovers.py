"""What killed commands have left in a store, told apart from what a command writes just now.

What nobody has touched for `disk.ABANDONED_S`, a day, is nobody's any more: a command that writes
touches something every few seconds. Younger things are never taken.
"""

from __future__ import annotations

import time

from trbatch.chunk_files import CHUNKS, generation_of
from trbatch.control import CONTROL
from trbatch.disk import ABANDONED_S
from trbatch.job import JobFolder
from trbatch.retries import FOLDER as RETRIES
from trbatch.segments import FOLDER as SEGMENTS
from trbatch.storage import Folder
from trbatch.submission import DOOMED


def outdated(job: JobFolder) -> list[str]:
    """Folders of chunks of earlier readings, which no manifest will name again."""
    newest = job.manifest.generation
    found = []
    for name in job.folder.folders(CHUNKS):
        generation = generation_of(name)
        if generation is not None and generation < newest:
            found.append(f"{CHUNKS}/{name}")
    return found


def abandoned(job: JobFolder) -> list[str]:
    """Hidden files and folders of chunks that commands and workers killed long ago have left."""
    used = job.manifest.chunk_folder
    found = [path for path in _unnamed(job) if _is_old(job.folder, path)]
    for below in ("", SEGMENTS, RETRIES, used):
        found += job.folder.abandoned(below)
    return found


def is_being_read(job: JobFolder) -> bool:
    """Whether a command may be writing chunks of the job's input at this moment."""
    return any(not _is_old(job.folder, path) for path in _unnamed(job))


def is_abandoned(place: Folder) -> bool:
    """Whether a folder without a manifest is what a `submit` killed long ago has left.

    It holds chunks and nothing that is not ours.
    """
    readings = place.folders(CHUNKS)
    return (
        bool(readings)
        and place.folders("") == [CHUNKS]
        and set(place.names("")) <= {CHUNKS, CONTROL, DOOMED}
        and set(place.names(CHUNKS)) <= set(readings)
        and all(generation_of(name) is not None for name in readings)
        and _is_old(place, "")
    )


def _unnamed(job: JobFolder) -> list[str]:
    """Folders of chunks that the manifest does not name, and that are not outdated."""
    known = {job.manifest.chunk_folder, *outdated(job)}
    found = (f"{CHUNKS}/{name}" for name in job.folder.folders(CHUNKS))
    return [path for path in found if path not in known]


def _is_old(place: Folder, path: str) -> bool:
    return time.time() - place.last_change(path) > ABANDONED_S
