"""What commands print: tables and JSON on stdout, errors and logs on stderr."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import orjson
from rich.console import Console
from rich.table import Table

from trbatch import logs
from trbatch.connection import mask_url
from trbatch.errors import TrbatchError
from trbatch.figures import Progress
from trbatch.job_status import JobStatus
from trbatch.masking import mask_text, masked, printable
from trbatch.moments import written
from trbatch.progress import describe, duration, left_of
from trbatch.pruning import Pruned
from trbatch.queue import JobQueue
from trbatch.results import Receipt
from trbatch.server import ServerStatus
from trbatch.team import Share
from trbatch.wording import counted

logger = logging.getLogger("trbatch")

WIDTH_OF_A_FILE = 200  # columns, where stdout is no terminal


def print_error(error: TrbatchError) -> None:
    """The message, and the hint on a line of its own, on stderr."""
    if logs.as_json():
        fields = {"event": "error", "hint": error.hint, "exit_code": error.exit_code}
        logger.error("%s", error.message, extra=fields)
        return
    click.echo(f"error: {mask_text(error.message)}", err=True)
    if error.hint:
        click.echo(f"hint: {mask_text(error.hint)}", err=True)


def print_json(values: Any) -> None:
    """One line of JSON on stdout, without the password of any URL."""
    click.echo(orjson.dumps(masked(values), default=_jsonable).decode())


def print_summary(receipt: Receipt, progress: Progress, *, as_json: bool) -> None:
    """What became of a job: the receipt in words, the figures, where the dataset lies."""
    if as_json:
        print_json(receipt.to_dict() | {"figures": progress.to_dict()})
        return
    rows = f"{receipt.rows_ok:,} ok, {receipt.rows_failed:,} failed"
    if receipt.rows_cancelled:
        rows += f", {receipt.rows_cancelled:,} cancelled"
    if receipt.sampled:
        rows += f", of {counted(receipt.input_rows, 'row')}"
    if progress.rows_repetitive:
        rows += f"; {progress.rows_repetitive:,} go round in circles (column repetitive)"
    tokens = f"{progress.completion_tokens:,} generated, {progress.prompt_tokens:,} of prompts"
    table = {
        "samples" if receipt.sampled else "rows": rows,
        "tokens": tokens,
        "tokens/s": _number(progress.tokens_per_s, ",.1f"),
        "mean acceptance length": _number(progress.mean_acceptance_length, ".2f"),
        "measured speed-up": _number(progress.speedup, ".2f", "x over plain decoding"),
        "dataset": str(receipt.output),
        "receipt": str(receipt),
    }
    if receipt.errors_output:
        table["failed rows"] = receipt.errors_output
    if receipt.card:
        table["card"] = mask_url(receipt.card)
    if receipt.pushed:
        table["pushed to"] = mask_url(receipt.pushed)
    print_pairs(table)


def print_status(status: JobStatus, *, as_json: bool) -> None:
    """How far a job is, and who decodes it."""
    if as_json:
        print_json(status.to_dict())
        return
    chunks = status.chunks
    words = f"{status.state}, paused" if status.paused else status.state
    behind = f", {status.ahead} chunks of more urgent jobs wait" if status.ahead else ""
    pairs = {
        "job": status.id,
        "state": words,
        "progress": describe(status),
        **_pace_of(status.progress),
        "chunks": f"{chunks.queued} queued, {chunks.started} running, {chunks.failed} failed",
        "priority": f"{status.priority}{behind}",
        "workers": str(status.workers),
        "model": status.model,
        "task": status.task,
        "folder": status.path,
    }
    if status.deadline is not None:
        left = status.deadline - time.time()
        when = f"{duration(left)} left" if left > 0 else "passed"
        pairs["deadline"] = f"{written(status.deadline)}, {when}"
    for lease in status.leases:
        since = "" if lease.running_s is None else f" for {duration(lease.running_s)}"
        pairs[f"chunk {lease.chunk}"] = (
            f"at {lease.worker}{since}, attempt {lease.attempt}, "
            f"lease of {duration(max(lease.left_s, 0.0))}"
        )
    for code, rows in status.errors.items():
        pairs[f"failed: {code or 'unknown'}"] = counted(rows, "row")
    for number, reason in status.failures.items():
        pairs[f"failed: chunk {number}"] = reason
    print_pairs(pairs)
    if status.team:
        click.echo()
        print_rows(map(_share_record, status.team), "nobody")


def _share_record(share: Share) -> dict[str, str]:
    """A worker's part of a job as a line of a table."""
    silent = share.last_rows_s
    return {
        "worker": printable(share.worker) or "(several)",
        "state": printable(share.state) or "-",
        "chunks": str(share.chunks),
        "rows": f"{share.rows:,}",
        "failed": f"{share.rows_failed:,}",
        "tokens/s": _number(share.tokens_per_s, ",.0f"),
        "acceptance": _number(share.mean_acceptance_length, ".2f"),
        "speed-up": _number(share.speedup, ".2f", "x"),
        "last rows": "-" if silent is None else f"{duration(silent)} ago",
    }


def print_pruned(done: Iterable[Pruned], *, dry_run: bool, as_json: bool) -> None:
    """What was done with each job, and how much room that makes."""
    records = [dataclasses.asdict(one) for one in done]
    if as_json:
        print_json({"dry_run": dry_run, "jobs": records})
        return
    freed = sum(record["bytes"] for record in records)
    for record in records:
        record["bytes"] = f"{record['bytes']:,}"
    print_rows(records, "no job lies here")
    click.echo(f"{freed / 2**20:,.1f} MiB {'would go, at most' if dry_run else 'freed'}")


def print_queue(redis_url: str, statuses: Iterable[JobStatus] = (), *, as_json: bool) -> None:
    """Which models' chunks wait, which workers live, and how far these jobs are.

    The jobs are asked for when the queue has answered.
    """
    with JobQueue.connect(redis_url) as jobs:
        queues = [dataclasses.asdict(queue) for queue in jobs.queues()]
        workers = [dataclasses.asdict(worker) for worker in jobs.workers()]
        url = mask_url(jobs.url)
    found = list(statuses)
    if as_json:
        jobs_found = [status.to_dict() for status in found]
        print_json({"redis_url": url, "queues": queues, "workers": workers, "jobs": jobs_found})
        return
    for queue in queues:
        queue["model"] = "@".join(part for part in queue["model"].values() if part)
        del queue["name"]
    click.echo(f"queue {url}")
    print_rows(queues, "nothing was ever queued")
    print_rows(
        [{k: worker[k] for k in ("name", "state", "model", "chunks")} for worker in workers],
        "no worker lives; start one with: trbatch worker",
    )
    if found:
        click.echo()
        print_rows(map(_job_record, found), "")


def _pace_of(progress: Progress) -> dict[str, str]:
    """What is told of a job once rows of it were decoded."""
    if progress.busy_s == 0:
        return {}
    return {
        "speed-up": _number(progress.speedup, ".2f", "x over plain decoding"),
        "decoding": duration(progress.busy_s),
    }


def _job_record(status: JobStatus) -> dict[str, str]:
    """A job as a line of a table."""
    progress = status.progress
    return {
        "job": status.id,
        "state": f"{status.state}, paused" if status.paused else status.state,
        "rows": f"{progress.rows_done:,}/{progress.rows:,}",
        "failed": f"{progress.rows_failed:,}",
        "tokens/s": _number(progress.tokens_per_s, ",.0f"),
        "acceptance": _number(progress.mean_acceptance_length, ".2f"),
        "speed-up": _number(progress.speedup, ".2f", "x"),
        "left": left_of(status) or "-",
    }


def print_server(status: ServerStatus, *, as_json: bool) -> None:
    """Whether the embedded server runs, and where."""
    if as_json:
        print_json(dataclasses.asdict(status))
        return
    values = {"state": status.state, "url": status.url}
    if status.running and not status.answering:
        values["process"] = f"{status.pid or 'unknown'}; `trbatch server stop` ends it"
    elif status.running:
        values["process"] = f"{status.pid}, {status.version}, up {status.uptime_s:,} s"
        values["memory"] = f"{status.memory / 2**20:.1f} MiB, {status.clients} clients"
    values["folder"] = str(status.folder)
    for path in status.set_aside:
        values[f"set aside: {path.name}"] = "a log of the queue that could not be read"
    print_pairs(values)


def print_table(values: Mapping[str, Any], *, as_json: bool) -> None:
    """A benchmark's result: its figures as pairs, its lists of records as tables."""
    if as_json:
        print_json(values)
        return
    plain = {k: v for k, v in values.items() if not _is_records(v)}
    print_pairs({name: _cell(value) for name, value in plain.items()})
    for name, value in values.items():
        if _is_records(value):
            click.echo(f"\n{name}")
            print_rows(value, "none")


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Names and values, one pair a line."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        click.echo(f"{name.ljust(width)}  {mask_text(value)}")


def print_rows(rows: Iterable[Mapping[str, Any]], otherwise: str) -> None:
    """A table of records that have the same fields; `otherwise` where there are none."""
    records = list(rows)
    if not records:
        click.echo(otherwise)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in records[0]:
        table.add_column(str(column), overflow="fold")
    for record in records:
        table.add_row(*(_cell(value) for value in record.values()))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(inner) for inner in value)
    return mask_text(str(value))


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return mask_text(str(value))
    raise TypeError(f"{type(value).__name__} has no JSON form")
