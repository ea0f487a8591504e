"""The commands that change a submitted job: cancel, pause, continue, resume, retry, prune."""

from __future__ import annotations

from typing import Any

import click

from trbatch import api
from trbatch import cli_options as options
from trbatch.cli_fields import example, grouped
from trbatch.cli_output import print_json, print_pruned, print_status
from trbatch.errors import UsageError
from trbatch.wording import counted

_job = grouped(
    click.argument("job"), options.store_option, options.redis_option, options.json_option
)
_deadline = click.option(
    "deadline",
    "--deadline",
    default="",
    metavar="WHEN",
    help="A new one, e.g. 8h or 07:00; 'none' lifts it. Without it: as it was.",
)


@click.command("cancel", **example("trbatch cancel prompts-1a2b3c4d"))
@_job
def cancel_command(job: str, out: str, redis_url: str, as_json: bool) -> None:
    """End JOB and keep what is done.

    Workers let go of its rows within seconds. `trbatch collect` writes what there is, the other
    rows as cancelled, and exits with 5; `trbatch resume` takes the cancellation back.
    """
    print_status(api.cancel(job, store=out, redis_url=redis_url), as_json=as_json)


@click.command("pause", **example("trbatch pause prompts-1a2b3c4d"))
@_job
def pause_command(job: str, out: str, redis_url: str, as_json: bool) -> None:
    """Stop decoding JOB until `trbatch continue`.

    Finished rows are kept; rows that workers are in the middle of are begun anew then.
    """
    print_status(api.pause(job, store=out, redis_url=redis_url), as_json=as_json)


@click.command("continue", **example("trbatch continue prompts-1a2b3c4d"))
@_job
def continue_command(job: str, out: str, redis_url: str, as_json: bool) -> None:
    """Go on with a paused JOB.

    `trbatch resume` does the same for a job that was stopped in any other way.
    """
    opened = api.Job.open(job, store=out, redis_url=redis_url)
    if opened.folder.control().hold == "cancelled":
        raise UsageError(
            f"job {opened.id} is cancelled, not paused", hint=f"trbatch resume {opened.path}"
        )
    _print_enqueued(opened, opened.resume(), as_json=as_json)


@click.command("resume", **example("trbatch resume prompts-1a2b3c4d"))
@_job
@_deadline
def resume_command(job: str, out: str, redis_url: str, as_json: bool, deadline: str) -> None:
    """Enqueue what JOB still lacks, whatever has stopped it.

    JOB is its id or its folder. It takes back a pause or a cancellation, and it is all that has to
    be done after the queue's server has lost everything.
    """
    opened = api.Job.open(job, store=out, redis_url=redis_url)
    _print_enqueued(opened, opened.resume(deadline=deadline), as_json=as_json)


@click.command("retry", **example("trbatch retry prompts-1a2b3c4d --failed"))
@_job
@click.option("--failed", is_flag=True, help="Decode failed rows again.")
@click.option(
    "codes",
    "--code",
    multiple=True,
    metavar="CODE",
    help="Only those of this error code; may be repeated.",
)
def retry_command(
    job: str, out: str, redis_url: str, as_json: bool, failed: bool, codes: tuple[str, ...]
) -> None:
    """Decode failed rows of JOB again.

    `trbatch status` shows the error codes. Rows that are bad in the input stay as they are: correct
    them there and submit again.
    """
    if not failed:
        raise UsageError("retry needs to be told what", hint="add --failed, maybe with --code CODE")
    opened = api.Job.open(job, store=out, redis_url=redis_url)
    rows = opened.retry(codes)
    if as_json:
        print_json({"id": opened.id, "path": opened.path, "rows_retried": rows})
        return
    bad = opened.folder.manifest.rows_failed
    left = f"; {counted(bad, 'row')} unusable in the input: correct them there" if bad else ""
    again = f"{counted(rows, 'row')} to be decoded again" if rows else "no such row has failed"
    click.echo(f"{opened.id}: {again}{left}")


@click.command("prune", **example("trbatch prune --older-than 30d --dry-run"))
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option(
    "older_than",
    "--older-than",
    default="",
    metavar="SPAN",
    help="Remove jobs to which nothing has happened for so long, e.g. 30d.",
)
@click.option(
    "--force", is_flag=True, help="Remove old jobs that still run or were not collected, too."
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
@options.store_option
@options.redis_option
@options.json_option
def prune_command(jobs: tuple[str, ...], out: str, as_json: bool, **settings: Any) -> None:
    """Make collected jobs small, and remove old ones.

    Without JOB it looks at every job of the store. A collected job keeps few files of results in
    the place of many. With --older-than, jobs that have ended and were collected are removed with
    all of their files once nothing has happened to them for so long; a dataset outside the job's
    folder stays. What killed commands and workers left a day ago or earlier goes as well.
    """
    dry_run: bool = settings["dry_run"]
    print_pruned(api.prune(jobs, store=out, **settings), dry_run=dry_run, as_json=as_json)


def _print_enqueued(job: api.Job, chunks: int, *, as_json: bool) -> None:
    if as_json:
        print_json({"id": job.id, "path": job.path, "chunks_enqueued": chunks})
    elif chunks or not job.folder.progress().complete:
        left = "" if chunks else "; those that lack rows wait or run already"
        click.echo(f"{job.id}: {counted(chunks, 'chunk')} enqueued{left}")
    else:
        click.echo(f"{job.id}: every row is there")


JOB_COMMANDS = (
    cancel_command,
    pause_command,
    continue_command,
    resume_command,
    retry_command,
    prune_command,
)
