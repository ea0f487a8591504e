"""The command line: parse, call the api, print. Data on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from trbatch import __version__, api
from trbatch import cli_options as options
from trbatch.cli_bench import bench_group
from trbatch.cli_matrix import matrix_group
from trbatch.cli_output import (
    log_to_stderr,
    print_error,
    print_json,
    print_queue,
    print_server,
    print_status,
    print_summary,
)
from trbatch.errors import EXIT_OK, EXIT_ROWS_FAILED, TrbatchError
from trbatch.figures import Progress
from trbatch.outputs import check_output
from trbatch.progress import Reporter, reporter

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Commands(click.Group):
    """A group of commands, and the one place where an error becomes a message and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        """Run a command. A TrbatchError is shown with its hint and ends with its exit code."""
        try:
            return super().invoke(context)
        except TrbatchError as error:
            print_error(error)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped; the same command again goes on", err=True)
            context.exit(INTERRUPTED)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    **options.example("trbatch run prompts.jsonl -o answers.parquet"),
)
@click.version_option(__version__, prog_name="trbatch")
def commands() -> None:
    """Batch inference with Token Recycling: prompts in, a Parquet dataset out.

    Exit codes: 0 every row ok, 1 unexpected error, 2 usage, 3 finished with failed rows, 4 job
    failed, 5 cancelled, 6 timed out, 7 resume refused, 75 Redis or storage unreachable, 130 and
    143 stopped by a signal.
    """
    log_to_stderr("WARNING")


def main() -> None:
    """Entry point of the program `trbatch`."""
    signal.signal(signal.SIGTERM, _terminate)
    commands(prog_name="trbatch")


@commands.command(
    "run", **options.example("trbatch run prompts.jsonl -o answers.parquet --max-tokens 128")
)
@click.argument("input", type=str)
@options.output_option
@options.format_option
@options.model_options
@options.sampling_options
@options.job_options
@options.engine_options
@options.redis_option
@options.json_option
@click.pass_context
def run_command(context: click.Context, /, input: str, **settings: Any) -> None:
    """Submit INPUT, decode it here, and collect it."""
    from trbatch.local import run

    spec = options.job_spec(input, settings)
    engine = options.engine_config(settings)  # wrong values are told before anything is enqueued
    check_output(settings["output"], os.path.abspath(input), settings["format"])
    job = api.submit(spec, redis_url=settings["redis_url"])
    with reporter() as show:
        _say_submitted(job, show)
        manifest = job.folder.manifest
        worker = dataclasses.asdict(engine) | {
            "model": manifest.model,
            "revision": manifest.revision,
            "trust_remote_code": spec.trust_remote_code,
            "burst": True,
        }
        arguments = options.arguments_for(worker_command, worker)
        status = run(job, arguments, report=show.update, on_line=show.log)
    _collect(context, job, status.progress, settings)


@commands.command(
    "submit", **options.example("trbatch submit prompts.jsonl --max-tokens 128 --top-p 0.9")
)
@click.argument("input", type=str)
@options.output_option
@options.model_options
@options.sampling_options
@options.job_options
@options.redis_option
def submit_command(input: str, **settings: Any) -> None:
    """Check INPUT and enqueue it. Prints the job's id alone on stdout.

    INPUT is a .jsonl (.gz, .zst) or .parquet file of rows with 'prompt' or 'messages'. The same
    command again continues the same job.
    """
    job = api.submit(options.job_spec(input, settings), redis_url=settings["redis_url"])
    with reporter() as show:
        _say_submitted(job, show)
    click.echo(job.id)


@commands.command("worker", **options.example("trbatch worker --gpu 0"))
@options.model_options
@options.engine_options
@options.worker_options
@options.redis_option
@click.pass_context
def worker_command(context: click.Context, /, **settings: Any) -> None:
    """Decode what is queued, until stopped.

    With --model it takes only that model's chunks; without, it loads what the next chunk needs.
    The first Ctrl-C (or SIGTERM) finishes what was taken, the second hands it back.
    """
    log_to_stderr("INFO")
    context.exit(api.work(options.worker_config(settings)))


@commands.command("status", **options.example("trbatch status prompts-1a2b3c4d"))
@click.argument("job", required=False)
@options.store_option
@options.redis_option
@options.json_option
def status_command(job: str | None, out: str, redis_url: str, as_json: bool) -> None:
    """How far JOB is, or what the queue holds.

    Without JOB it lists the chunks that wait, by model, and the workers that live.
    """
    if job is None:
        print_queue(redis_url, as_json=as_json)
        return
    print_status(api.status(job, store=out, redis_url=redis_url), as_json=as_json)


@commands.command("wait", **options.example("trbatch wait prompts-1a2b3c4d --timeout 3600"))
@click.argument("job")
@click.option("--timeout", type=float, help="Give up after so many seconds (exit code 6).")
@options.store_option
@options.redis_option
@options.json_option
@click.pass_context
def wait_command(
    context: click.Context, job: str, timeout: float | None, out: str, redis_url: str, as_json: bool
) -> None:
    """Wait until every row of JOB is there."""
    with reporter() as show:
        status = api.wait(job, timeout, store=out, redis_url=redis_url, report=show.update)
    if as_json:
        print_json(status.to_dict())
    context.exit(EXIT_ROWS_FAILED if status.progress.rows_failed else EXIT_OK)


@commands.command(
    "collect", **options.example("trbatch collect prompts-1a2b3c4d -o answers.parquet")
)
@click.argument("job")
@options.output_option
@options.format_option
@options.store_option
@options.json_option
@click.pass_context
def collect_command(context: click.Context, /, job: str, **settings: Any) -> None:
    """Write the dataset of JOB, with a receipt.

    Every row is in it exactly once, in input order; failed rows carry an error code and message.
    """
    opened = api.Job.open(job, store=settings["out"])
    _collect(context, opened, opened.folder.progress(), settings)


@commands.command("resume", **options.example("trbatch resume prompts-1a2b3c4d"))
@click.argument("job")
@options.store_option
@options.redis_option
@options.json_option
def resume_command(job: str, out: str, redis_url: str, as_json: bool) -> None:
    """Enqueue what JOB still lacks."""
    opened = api.Job.open(job, store=out, redis_url=redis_url)
    chunks = opened.resume()
    if as_json:
        print_json({"id": opened.id, "path": opened.path, "chunks_enqueued": chunks})
    else:
        click.echo(f"{opened.id}: {chunks} chunks enqueued")


@commands.group("server", **options.example("trbatch server status"))
def server_group() -> None:
    """The embedded queue server.

    It starts by itself when a command needs it, and belongs to this user on this host.
    """


@server_group.command("start", **options.example("trbatch server start"))
@options.json_option
def server_start(as_json: bool) -> None:
    """Start the server if it does not run."""
    from trbatch import server

    print_server(server.start(), as_json=as_json)


@server_group.command("stop", **options.example("trbatch server stop"))
@options.json_option
def server_stop(as_json: bool) -> None:
    """Stop the server; what is queued stays on disk for its next start."""
    from trbatch import server

    ran = server.stop()
    if as_json:
        print_json({"stopped": ran})
    else:
        click.echo("stopped" if ran else "was not running")


@server_group.command("status", **options.example("trbatch server status --json"))
@options.json_option
def server_status(as_json: bool) -> None:
    """Whether the server runs, and where."""
    from trbatch import server

    print_server(server.status(), as_json=as_json)


commands.add_command(bench_group)
commands.add_command(matrix_group)


def _collect(
    context: click.Context, job: api.Job, progress: Progress, settings: dict[str, Any]
) -> None:
    receipt = job.collect(settings["output"], format=settings["format"])
    print_summary(receipt, progress, as_json=settings["as_json"])
    context.exit(receipt.exit_code)


def _say_submitted(job: api.Job, show: Reporter) -> None:
    manifest = job.folder.manifest
    bad = f", {manifest.rows_failed:,} of them unusable" if manifest.rows_failed else ""
    verb = "continues" if job.folder.continued else "submitted"
    show.log(
        f"{verb} job {job.id}: {manifest.rows:,} rows{bad}, model {manifest.model}, "
        f"task {manifest.task}\n  in {job.path}"
    )


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)
