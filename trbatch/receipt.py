"""The proof that a dataset is complete: rows in = ok + failed + cancelled, each once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trbatch.errors import EXIT_OK, EXIT_ROWS_FAILED, Cancelled, Expired, JobFailed
from trbatch.wording import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What `collect` found. Counts are output rows: one for each sample, one for each bad row."""

    job: str
    output: str  # where the dataset lies
    errors_output: str = ""  # where failed rows lie if not there, too; "": there, or there are none
    card: str = ""  # the README.md that was written with it
    pushed: str = ""  # the copy that was pushed
    rows_in: int  # asked for
    input_rows: int = 0  # rows of the input, fewer where some have several samples; 0: not known
    rows_ok: int
    rows_failed: int
    rows_cancelled: int
    rows_expired: int = 0  # of the failed ones: those that the deadline cut off
    rows_missing: int = 0  # in no segment, and so not in the dataset either
    duplicates: int = 0  # rows that another segment held already; left out
    repeated: int = 0  # rows of the dataset whose (id, sample) another row has: 0, or a bug
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)  # as in stats.json

    @property
    def rows_out(self) -> int:
        """Rows of the dataset."""
        return self.rows_ok + self.rows_failed + self.rows_cancelled

    @property
    def complete(self) -> bool:
        """Whether every row that was asked for is in the dataset, exactly once."""
        return self.rows_in == self.rows_out and not self.rows_missing and not self.repeated

    @property
    def sampled(self) -> bool:
        """Whether rows of the input have several samples: what is counted are samples then."""
        return 0 < self.input_rows < self.rows_in

    @property
    def counted_in(self) -> str:
        """What was asked for: `17 rows`, or `17 samples of 11 rows`."""
        if not self.sampled:
            return f"{self.rows_in} rows"
        return f"{self.rows_in} samples of {counted(self.input_rows, 'row')}"

    @property
    def exit_code(self) -> int:
        """What the command line exits with."""
        if not self.complete:
            return JobFailed.exit_code
        if self.rows_cancelled:
            return Cancelled.exit_code
        if self.rows_expired:
            return Expired.exit_code
        return EXIT_ROWS_FAILED if self.rows_failed else EXIT_OK

    def __str__(self) -> str:
        """The receipt in words."""
        out = f"{self.rows_ok} ok + {self.rows_failed} failed + {self.rows_cancelled} cancelled"
        dropped = f"; {self.duplicates} duplicates left out" if self.duplicates else ""
        if self.complete:
            late = f"; the deadline cut {self.rows_expired} off" if self.rows_expired else ""
            once = "each sample once" if self.sampled else "each id once"
            return f"complete: {self.counted_in} in = {out}, {once}{dropped}{late}"
        problems = []
        if self.rows_missing:
            problems.append(f"{self.rows_missing} missing")
        if self.repeated:
            problems.append(f"{self.repeated} repeated")
        return (
            f"NOT complete: {self.counted_in} in, {out}, {', '.join(problems) or 'too many'}"
            f"{dropped}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The receipt as JSON-serialisable values, without the stats."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "stats"]
        values = {name: getattr(self, name) for name in names}
        return values | {"complete": self.complete, "in_words": str(self)}
