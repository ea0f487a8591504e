"""Which failures of a job do not count any more, because somebody asked to retry them.

Each request is one file, `retries/<microseconds>-<token>.json`, written once: it names the
segments that there were and the error codes, if only some are meant. What fails again lies in a
later segment and counts.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Sequence

import orjson

from trbatch.errors import UsageError
from trbatch.storage import Folder

FOLDER = "retries"


class Retries:
    """The requests of one job; each is read once, however often one asks."""

    def __init__(self, job: Folder) -> None:
        self._job = job
        self._read: set[str] = set()
        self._codes: dict[str, set[str]] = {}  # by segment; "" stands for every code

    def __len__(self) -> int:
        """Requests that the last `refresh` saw."""
        return len(self._read)

    def refresh(self) -> None:
        """Read what has come since."""
        for name in self._job.names(FOLDER):
            if name not in self._read:
                self._count(name)
                self._read.add(name)

    def void(self, segment: str, code: str | None) -> bool:
        """Whether a failure of this code in this segment does not count any more."""
        codes = self._codes.get(segment, ())
        return "" in codes or (code or "") in codes

    def ask(self, segments: Sequence[str], codes: Collection[str]) -> None:
        """Ask for what failed in these segments, of these codes (none: of all), again."""
        name = f"{FOLDER}/{int(time.time() * 1e6):016d}-{secrets.token_hex(4)}.json"
        self._job.write(name, orjson.dumps({"codes": sorted(codes), "segments": list(segments)}))

    def carry_over(self, known: Collection[str], segments: Sequence[str]) -> None:
        """Ask for what all but the known requests ask in the segments of a compaction, too."""
        for name in self._job.names(FOLDER):
            if name not in known:
                asked = orjson.loads(self._job.read(f"{FOLDER}/{name}"))
                self.ask(segments, asked["codes"])

    def _count(self, name: str) -> None:
        try:
            asked = orjson.loads(self._job.read(f"{FOLDER}/{name}"))
            codes = set(map(str, asked["codes"])) or {""}
            for segment in asked["segments"]:
                self._codes.setdefault(str(segment), set()).update(codes)
        except FileNotFoundError:  # `prune` has removed it with the failures that it meant
            return
        except (orjson.JSONDecodeError, TypeError, KeyError) as error:
            raise UsageError(
                f"{self._job.join(f'{FOLDER}/{name}')} is damaged: {error}",
                hint="remove it and ask for the retry again",
            ) from error
