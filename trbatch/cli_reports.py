"""The commands that show jobs: `trbatch watch report`."""

from __future__ import annotations

from typing import Any

import click

from trbatch import api
from trbatch import cli_options as options
from trbatch.cli_fields import example
from trbatch.cli_output import print_json
from trbatch.watching import EVERY_S, jobs_in, view_for, watch


@click.command(
    "report", **example("trbatch report prompts-1a2b3c4d -o report.html --gpu-hour-price 2")
)
@click.argument("job")
@click.option(
    "output",
    "-o",
    "--output",
    default="",
    help="The page's file or URL, *.html. Without it: report.html in the job folder.",
)
@click.option(
    "gpu_hour_price",
    "--gpu-hour-price",
    type=float,
    help="Of one worker for an hour, in any currency: the page then shows what tokens cost.",
)
@click.option(
    "category",
    "--category",
    default=api.CATEGORY,
    show_default=True,
    metavar="COLUMN",
    help="The input's column to group rows by.",
)
@options.store_option
@options.json_option
def report_command(job: str, as_json: bool, out: str, **settings: Any) -> None:
    """Write a page of pictures and figures about JOB.

    It is one HTML file without scripts that fetches nothing, fit for a screen and for paper. Prints
    where it lies, or with --json every figure on it. JOB may still be running.
    """
    report = api.report(job, store=out, **settings)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(report.output)


@click.command("watch", **example("trbatch watch prompts-1a2b3c4d"))
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option(
    "every",
    "--every",
    type=click.FloatRange(min=0.1),
    default=EVERY_S,
    show_default=True,
    help="Seconds between lines, where stdout is no terminal or with --json.",
)
@options.store_option
@options.redis_option
@options.json_option
@click.pass_context
def watch_command(
    context: click.Context,
    /,
    jobs: tuple[str, ...],
    every: float,
    out: str,
    redis_url: str,
    as_json: bool,
) -> None:
    """Show JOBs and their workers until they have ended.

    Without JOB it shows every job of the store that has not ended. On a terminal the picture is
    live: rows, tokens/s, tokens a forward, speed-up, and the time left with the job's tail in it.
    Elsewhere it is a line a job now and then, with --json of everything `trbatch status` knows.
    Exits like `wait`: 0, 3 with failed rows, 4 failed, 5 cancelled, 6 expired.
    """
    opened = [api.Job.open(name, store=out, redis_url=redis_url) for name in jobs]
    opened = opened or jobs_in(out, redis_url, unfinished=True)
    if not opened:
        click.echo("no job is unfinished", err=True)
        return
    with view_for(as_json=as_json, every_s=every) as view:
        code = watch(opened, view)
    context.exit(code)


REPORT_COMMANDS = (watch_command, report_command)
