"""The commands that show a job: `trbatch watch report`."""

from __future__ import annotations

from typing import Any

import click

from trbatch import api
from trbatch import cli_options as options
from trbatch.cli_output import print_json


@click.command(
    "report", **options.example("trbatch report prompts-1a2b3c4d -o report.html --gpu-hour-price 2")
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


REPORT_COMMANDS = (report_command,)
