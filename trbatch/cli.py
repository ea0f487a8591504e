"""The command line: parse, call the api, print. Data on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from trbatch import __version__, api, logs
from trbatch import cli_configs as configs
from trbatch import cli_options as options
from trbatch.bad_rows import first_reasons
from trbatch.cli_bench import bench_group
from trbatch.cli_completion import completion_command
from trbatch.cli_fields import epilog, example
from trbatch.cli_help import MOST_COLUMNS, ProgramGroup, told
from trbatch.cli_job_options import (
    job_options,
    model_options,
    prompt_options,
    sampling_options,
    worker_model_options,
)
from trbatch.cli_jobs import JOB_COMMANDS
from trbatch.cli_matrix import matrix_group
from trbatch.cli_output import (
    print_error,
    print_json,
    print_queue,
    print_status,
    print_summary,
)
from trbatch.cli_reports import REPORT_COMMANDS
from trbatch.cli_server import server_group
from trbatch.errors import (
    EXIT_CODES,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    Cancelled,
    Expired,
    JobFailed,
    TrbatchError,
    Unreachable,
    UsageError,
)
from trbatch.extras import require_worker
from trbatch.figures import Progress
from trbatch.hooks import on_complete
from trbatch.logs import log_to_stderr
from trbatch.outputs import check_output
from trbatch.profiles import NONE
from trbatch.progress import Reporter, reporter
from trbatch.results import Receipt
from trbatch.sinks import check_error_file
from trbatch.stopping import asking_signals, leaving
from trbatch.watching import jobs_in
from trbatch.wording import counted

NEWEST = 10  # jobs that `status` lists
BAD_ROWS_SHOWN = 3  # when a job is submitted
INTERRUPTED = 128 + signal.SIGINT


class Commands(ProgramGroup):
    """The program, and the one place where an error becomes a message and an exit code."""

    exit_codes = EXIT_CODES

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        """Parse what stands before the command. Wrong usage is shown as in a command."""
        try:
            return super().make_context(*arguments, **settings)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            print_error(told(error))
            raise click.exceptions.Exit(UsageError.exit_code) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. A TrbatchError is shown with its hint and ends with its exit code."""
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            print_error(told(error))
            ctx.exit(UsageError.exit_code)
        except TrbatchError as error:
            print_error(error)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            logs.note("stopped; the same command again goes on", exit_code=INTERRUPTED)
            ctx.exit(INTERRUPTED)


@click.group(
    "trbatch",
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": MOST_COLUMNS,
    },
    epilog=epilog("trbatch run prompts.jsonl -o answers.parquet"),
)
@click.version_option(__version__, prog_name="trbatch")
def commands() -> None:
    """Batch inference with Token Recycling: prompts in, a Parquet dataset out.

    `trbatch run` does all of it. To share work among GPUs and machines, start `trbatch worker` on
    each and use `trbatch submit`, `wait` and `collect`. Each command has a help of its own:
    `trbatch COMMAND -h`.
    """
    log_to_stderr("WARNING", "text")


def main() -> None:
    """Entry point of the program `trbatch`."""
    for number in set(asking_signals()) - {signal.SIGINT}:  # which raises KeyboardInterrupt
        signal.signal(number, _terminate)
    with leaving():
        commands(prog_name="trbatch")


@commands.command("run", **example("trbatch run prompts.jsonl -o answers.parquet --max-tokens 128"))
@click.argument("input", type=str)
@options.output_option
@options.format_option
@model_options
@prompt_options
@sampling_options
@job_options
@options.engine_options
@options.on_complete_option
@options.redis_option
@options.log_format_option
@options.json_option
@click.pass_context
def run_command(context: click.Context, /, input: str, **settings: Any) -> None:
    """Submit INPUT, decode it here, and collect the dataset.

    INPUT is a .jsonl (.gz, .zst) or .parquet file of rows with 'prompt' or 'messages', or a job
    spec (.toml). The same command again goes on where it was stopped. Without --output the dataset
    lies in the job folder; the last lines say where. A job that was cancelled meanwhile, or was not
    done by its --deadline, is collected as well.
    """
    from trbatch.local import run

    require_worker("`trbatch run`")
    log_to_stderr("WARNING", settings["log_format"])
    spec = configs.job_spec(input, settings)
    engine = configs.engine_config(settings)  # wrong values are told before anything is enqueued
    check_output(spec.output, os.path.abspath(spec.input), settings["format"])
    check_error_file(spec.output, settings["format"])
    job = api.submit(spec, redis_url=settings["redis_url"])
    manifest = job.folder.manifest
    worker = dataclasses.asdict(engine) | {
        "model": manifest.model,
        "revision": manifest.revision,
        "trust_remote_code": spec.trust_remote_code,
        "gpu": settings["gpu"],
        "burst": True,
        "log_format": settings["log_format"],
        "profile": NONE,  # the engine's options are all of this command's
    }
    arguments = configs.arguments_for(worker_command, worker)
    try:
        with reporter() as show:
            _say_submitted(job, show)
            status = run(job, arguments, report=show.update, on_line=show.log)
    except JobFailed as error:
        context.exit(_ended_badly(job, error, settings["on_complete"]))
    receipt = _collect(job, status.progress, settings)
    code = on_complete(settings["on_complete"], status, receipt.exit_code, receipt.output)
    context.exit(code)


@commands.command("submit", **example("trbatch submit prompts.jsonl --max-tokens 128 --top-p 0.9"))
@click.argument("input", type=str)
@options.output_option
@model_options
@prompt_options
@sampling_options
@job_options
@options.dry_run_option
@options.redis_option
@options.log_format_option
@options.json_option
@click.pass_context
def submit_command(context: click.Context, /, input: str, **settings: Any) -> None:
    """Check INPUT and enqueue it. Prints the job's id alone on stdout.

    INPUT is a .jsonl (.gz, .zst) or .parquet file of rows with 'prompt' or 'messages', or a job
    spec: a .toml file with a job's settings, over which flags win. The same command again continues
    the same job: of an input that has grown, only the new rows are decoded.
    """
    log_to_stderr("WARNING", settings["log_format"])
    spec = configs.job_spec(input, settings)
    if settings["dry_run"]:
        from trbatch.cli_preview import dry_run

        context.exit(dry_run(spec, as_json=settings["as_json"]))
    job = api.submit(spec, redis_url=settings["redis_url"])
    with reporter() as show:
        _say_submitted(job, show)
    if settings["as_json"]:
        rows = {"rows": job.folder.manifest.rows, "rows_bad": job.folder.manifest.rows_failed}
        print_json({"job": job.id, "folder": job.path} | rows)
    else:
        click.echo(job.id)


@commands.command("worker", **example("trbatch worker --gpu 0"))
@options.profile_option
@worker_model_options
@options.engine_options
@options.worker_options
@options.redis_option
@options.log_format_option
@click.pass_context
def worker_command(context: click.Context, /, **settings: Any) -> None:
    """Decode what is queued, until stopped.

    With --model it takes only that model's chunks; without, it loads what the next chunk needs.
    This process only watches: a child of it decodes, one a GPU, and is replaced when it dies. The
    first Ctrl-C (or SIGTERM) finishes what was taken within --grace, the second hands it back.
    """
    from trbatch.flight import FlightRecord
    from trbatch.supervisor import die_with_parent, supervise

    require_worker("`trbatch worker`")
    log_to_stderr("INFO", settings["log_format"])
    config = configs.worker_config(settings)
    if (flight := FlightRecord.inherited()) is not None:
        die_with_parent()
        context.exit(api.work(config, flight))
    arguments = configs.arguments_for(worker_command, configs.for_children(settings))
    context.exit(supervise(config, settings["gpu"], arguments))


@commands.command("status", **example("trbatch status prompts-1a2b3c4d"))
@click.argument("job", required=False)
@options.store_option
@options.redis_option
@options.json_option
def status_command(job: str | None, out: str, redis_url: str, as_json: bool) -> None:
    """Tell how far JOB is, or what the queue holds.

    JOB is its id or its folder. Without JOB: the chunks that wait, by model, the workers that live,
    and the newest jobs of the store. `trbatch watch` shows the same live.
    """
    if job is None:
        print_queue(redis_url, _newest_jobs(out, redis_url), as_json=as_json)
        return
    print_status(api.status(job, store=out, redis_url=redis_url), as_json=as_json)


@commands.command("wait", **example("trbatch wait prompts-1a2b3c4d --timeout 3600"))
@click.argument("job")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Give up after so many seconds (exit code 6).",
)
@options.on_complete_option
@options.store_option
@options.redis_option
@options.json_option
@click.pass_context
def wait_command(
    context: click.Context, /, job: str, timeout: float | None, as_json: bool, **settings: str
) -> None:
    """Wait until every row of JOB is there.

    JOB is its id or its folder. Exits with 3 if some rows failed, with 5 if the job was cancelled
    and with 6 if its deadline or the --timeout passed. It may be stopped and started again.
    """
    opened = api.Job.open(job, store=settings["out"], redis_url=settings["redis_url"])
    try:
        with reporter() as show:
            status = opened.wait(timeout, report=show.update)
    except (JobFailed, Cancelled, Expired) as error:
        context.exit(_ended_badly(opened, error, settings["on_complete"], as_json=as_json))
    if as_json:
        print_json(status.to_dict())
    code = EXIT_ROWS_FAILED if status.progress.rows_failed else EXIT_OK
    context.exit(on_complete(settings["on_complete"], status, code))


@commands.command("collect", **example("trbatch collect prompts-1a2b3c4d -o answers.parquet"))
@click.argument("job")
@options.output_option
@options.format_option
@options.card_option
@options.push_option
@options.store_option
@options.json_option
@click.pass_context
def collect_command(context: click.Context, /, job: str, **settings: Any) -> None:
    """Write the dataset of JOB, and prove that it is complete.

    JOB is its id or its folder. Every row is in the dataset exactly once, in input order; failed
    rows carry an error code and message. With --format jsonl each failed sample is a line of a
    file of its own, NAME.errors.jsonl, and a row's line has those that did not fail. A job that
    runs may be collected, too: the receipt then says how many rows are missing, and the exit code
    is 4.
    """
    opened = api.Job.open(job, store=settings["out"])
    context.exit(_collect(opened, opened.folder.progress(), settings).exit_code)


for job_command in (*JOB_COMMANDS, *REPORT_COMMANDS):
    commands.add_command(job_command)
commands.add_command(bench_group)
commands.add_command(matrix_group)
commands.add_command(server_group)
commands.add_command(completion_command)


def _newest_jobs(store: str, redis_url: str) -> Iterator[api.JobStatus]:
    try:
        for job in jobs_in(store, redis_url, unfinished=False, most=NEWEST):
            yield job.status()
    except Unreachable as error:  # of the storage: the queue can be shown all the same
        logs.note(f"warning: jobs are not listed: {error.message}")


def _collect(job: api.Job, progress: Progress, settings: dict[str, Any]) -> Receipt:
    wishes = {name: settings[name] for name in ("card", "push") if name in settings}
    receipt = job.collect(settings["output"], format=settings["format"], **wishes)
    print_summary(receipt, progress, as_json=settings["as_json"])
    if receipt.rows_missing and not logs.as_json():
        click.echo(f"hint: trbatch wait {job.id}, then the same command again", err=True)
    return receipt


def _ended_badly(job: api.Job, error: TrbatchError, command: str, *, as_json: bool = False) -> int:
    """Tell of a job that lacks rows and that nobody works on. Returns the exit code."""
    print_error(error)
    if not command and not as_json:
        return error.exit_code
    status = job.status()
    if as_json:
        print_json(status.to_dict())
    return on_complete(command, status, error.exit_code)


def _say_submitted(job: api.Job, show: Reporter) -> None:
    manifest = job.folder.manifest
    bad = f", {manifest.rows_failed:,} of them unusable" if manifest.rows_failed else ""
    what = f"{counted(manifest.rows, 'row')}{bad}, model {manifest.model}, task {manifest.task}"
    fields = {"job": job.id, "folder": job.path, "rows": manifest.rows}
    fields["rows_unusable"] = manifest.rows_failed
    if not job.folder.continued:
        line = f"submitted job {job.id}: {what}\n  in {job.path}"
        show.log(line, event="submitted", **fields)
        _show_bad_rows(job, show)
        return
    progress = job.folder.progress()
    left = f"{progress.rows - progress.rows_done:,} of {progress.rows:,} rows are to be decoded"
    if job.folder.reread:
        line = f"continues job {job.id} with its input read anew: {what}; {left}"
    else:
        line = f"same input and settings: job {job.id}, {what}; {left}"
    show.log(f"{line}\n  in {job.path}", event="continues", **fields)
    if job.folder.reread:
        _show_bad_rows(job, show)
    control = job.folder.control()
    if control.stopped and not progress.complete:
        how = control.hold or "past its deadline"
        line = f"  it is {how} and stays so; `trbatch resume {job.id}` takes it up again"
        show.log(line, event="held", job=job.id, how=how)


def _show_bad_rows(job: api.Job, show: Reporter) -> None:
    """A few unusable rows with their reasons, so that a mistake in all of them is seen at once."""
    reasons = first_reasons(job.folder, BAD_ROWS_SHOWN)
    for reason in reasons:
        show.log(f"  {reason}", event="row_unusable", job=job.id)
    if reasons and (more := job.folder.manifest.rows_failed - len(reasons)):
        show.log(f"  … and {more:,} more; all are in the dataset, with error_code", job=job.id)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
