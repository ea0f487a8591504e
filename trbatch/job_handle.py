"""A submitted job as Python has it: what can be asked of it and done to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from trbatch import control_verbs, pushing
from trbatch.dataset import output_of
from trbatch.errors import TimedOut
from trbatch.job import JobFolder
from trbatch.job_status import JobStatus, job_failure, job_status
from trbatch.masking import mask_text
from trbatch.reporting import CATEGORY, make_report, write_report
from trbatch.reporting import Report as JobReport
from trbatch.results import Receipt
from trbatch.results import collect as collect_results

POLL_S = 0.5  # between looks at a job that is waited for

Report = Callable[[JobStatus], None]


class Job:
    """A submitted job: its folder, and the queue that its chunks go through.

    Args:
        folder: the job's folder.
        redis_url: the queue; "" takes `TRBATCH_REDIS_URL`, `REDIS_URL`, the embedded server.
    """

    def __init__(self, folder: JobFolder, redis_url: str = "") -> None:
        self.folder = folder
        self.redis_url = redis_url

    def __repr__(self) -> str:
        return f"Job({mask_text(self.path)!r})"

    @classmethod
    def open(cls, job: str | Path, *, store: str | Path = "", redis_url: str = "") -> Self:
        """A job by its id in `store`, or by the path or URL of its folder.

        Raises:
            UsageError: there is no such job.
        """
        return cls(JobFolder.find(str(job), str(store)), redis_url)

    @property
    def id(self) -> str:
        """The job's id, unique in its store."""
        return self.folder.id

    @property
    def path(self) -> str:
        """The path or URL of the job's folder."""
        return str(self.folder.path)

    def status(self) -> JobStatus:
        """How far the job is.

        Raises:
            Unreachable: the queue cannot be asked, and rows are missing.
        """
        return job_status(self.folder, self.redis_url)

    def wait(self, timeout: float | None = None, *, report: Report | None = None) -> JobStatus:
        """Wait until every row is there. A paused job is waited for until it has gone on.

        Args:
            timeout: seconds after which to give up; None waits for ever.
            report: is given the status about twice a second.

        Raises:
            JobFailed: rows are missing and nobody works on them any more.
            Cancelled: somebody cancelled the job.
            Expired: the job's deadline passed.
            TimedOut: the time limit passed first.
        """
        end = None if timeout is None else time.monotonic() + timeout
        failed = False
        while True:
            before, status = failed, self.status()
            failed = status.state == "failed"
            if report is not None:
                report(status)
            if status.state == "completed":
                return status
            if status.state == "expired" and status.chunks.queued:
                control_verbs.clear(self.folder, self.redis_url)
            # A chunk may be in no list for a moment: a worker let go of it as the job was resumed.
            over = end is not None and time.monotonic() >= end
            if status.finished and (before or over or not failed):
                raise job_failure(status)
            if over:
                done = f"{status.progress.rows_done} of {status.progress.rows} rows"
                raise TimedOut(
                    f"job {self.id}: {done} after {timeout:g} s",
                    hint="the job goes on; `trbatch wait` and `trbatch collect` take it up again",
                )
            time.sleep(POLL_S)

    def resume(self, *, deadline: str = "") -> int:
        """Go on with a job that was paused, cancelled or lost from the queue.

        Enqueues the chunks that still lack rows and neither wait nor run. Returns how many.

        Args:
            deadline: a new one, in the words of `submit`; "none" lifts it, "" leaves it.

        Raises:
            UsageError: the deadline has passed and no other is given.
        """
        return control_verbs.resume(self.folder, self.redis_url, deadline)

    def pause(self) -> JobStatus:
        """Take the job's waiting chunks out of the queue and let workers give up the others.

        Finished rows are kept; a row that is half done is begun anew by `resume`.
        """
        control_verbs.hold(self.folder, self.redis_url, "paused")
        return self.status()

    def cancel(self) -> JobStatus:
        """End the job. Finished rows are kept, and `collect` writes the others as cancelled.

        A job whose rows are all there stays completed; `resume` takes back a cancellation.
        """
        control_verbs.hold(self.folder, self.redis_url, "cancelled")
        return self.status()

    def retry(self, codes: Iterable[str] = ()) -> int:
        """Decode failed rows again. Rows that are bad in the input stay error rows.

        Args:
            codes: only failures of these error codes; () of all.

        Returns:
            How many rows are to be decoded again.

        Raises:
            UsageError: the job is paused, cancelled or past its deadline.
        """
        return control_verbs.retry(self.folder, self.redis_url, codes)

    def collect(
        self,
        output: str | Path = "",
        *,
        format: str = "parquet",
        card: bool = False,
        push: str = "",
    ) -> Receipt:
        """Write the dataset: every row exactly once, in input order.

        Args:
            output: file to write; "" takes the job's own, else a file in the job folder.
            format: `parquet`, or `jsonl` for OpenAI's result lines with an error file beside them.
            card: write a README.md that describes the dataset beside it.
            push: a URL that gets a copy and a card, e.g. `hf://datasets/me/answers`; "": none. A
                dataset that lacks rows is not pushed.

        Raises:
            UsageError: the output's name does not suit the format, a card or an error file would
                take the place of one that trbatch has not written, or what is pushed would not open
                as one dataset with what lies there.
            Unreachable: the storage fails, or the place to push to.
        """
        if push:
            pushing.check_push(push, format)
        if card:
            pushing.check_card(output_of(self.folder, str(output), format), format)
        receipt = collect_results(self.folder, str(output) or None, format=format)
        if card:
            receipt = pushing.write_card(self.folder, receipt)
        return pushing.push(self.folder, receipt, push) if push else receipt

    def report(
        self,
        output: str | Path = "",
        *,
        gpu_hour_price: float | None = None,
        category: str = CATEGORY,
    ) -> JobReport:
        """Write a page of pictures and figures about the job, which may still be running.

        Args:
            output: an HTML file; "" puts it into the job folder.
            gpu_hour_price: of one worker for an hour, in any currency; adds what tokens cost.
            category: the input's column to group rows by, if it has one of this name.
        """
        made = make_report(self.folder, gpu_hour_price=gpu_hour_price, category=category)
        return write_report(self.folder, made, str(output))
