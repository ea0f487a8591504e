"""From segments to one dataset: every row exactly once, in input order.

Rows are joined by key, never by position; see `joining`.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext, suppress
from typing import BinaryIO

import orjson

import trbatch
from trbatch.errors import JobFailed
from trbatch.figures import Figures, covered_seconds
from trbatch.ids import RepeatCheck
from trbatch.job import JobFolder
from trbatch.joining import Index, Joiner
from trbatch.outputs import check_output, errors_of, target
from trbatch.receipt import Receipt
from trbatch.segments import consistently
from trbatch.sinks import Group, JsonSink, ParquetSink, Sink, check_error_file, error_file
from trbatch.storage import exists, sweep, writing


def collect(job: JobFolder, output: str | None = None, format: str = "parquet") -> Receipt:
    """Write the dataset of a job, with stats, errors and a receipt in the job folder.

    Rows that no segment holds yet are left out and counted as missing; the receipt then is not
    complete. Where the job was cancelled or its deadline has passed they are rows that say so.
    Columns of the input keep their types and names, but for names that a result column has: those
    get the prefix `input_`.

    Args:
        job: whose rows; may still be running.
        output: a file, or a folder to put `<job id>.<format>` into. If None, the job's own output
            unless its name promises another format, else `results.<format>` in the job folder.
        format: `parquet`, or `jsonl` for OpenAI's batch result lines; samples without a text are
            then lines of a file of their own, `<output>.errors.jsonl`, as in OpenAI's API.

    Raises:
        UsageError: the format is unknown, the output's name promises another one, or a file lies
            where failed rows belong that trbatch has not written.
        JobFailed: chunks or segments are missing or damaged.
    """
    place = output_of(job, output or "", format)
    failed = errors_of(place) if format == "jsonl" else ""
    check_output(failed, job.manifest.input.path, format)
    check_error_file(place, format)
    for path in filter(None, (place, failed)):
        sweep(path)
    # All anew if segments go meanwhile: `prune` puts few in the place of many.
    try:
        index, joiner, tally = consistently(job.ledger.names, lambda _: _write(job, place, failed))
    except FileNotFoundError as error:
        raise JobFailed(
            f"segments of job {job.id} keep going while they are collected",
            hint="the same command again, when nothing else removes files of the job",
        ) from error
    failed = failed if failed and exists(failed) else ""
    receipt = receipt_of(job, place, index, joiner, tally.figures, tally.keys, errors=failed)
    job.folder.write("stats.json", orjson.dumps(receipt.stats, option=orjson.OPT_INDENT_2))
    job.mark(complete=receipt.complete and not joiner.ended)
    return receipt


def _write(job: JobFolder, place: str, failed: str) -> tuple[Index, Joiner, _Tally]:
    """Write the dataset and the failed rows, from the segments that there are now."""
    inputs = job.passthrough_schema()
    index = Index.of(job)
    joiner = Joiner(job, index, inputs, job.control().row_end())
    tally = _Tally()
    with (
        error_file(failed) if failed else nullcontext() as failures,
        writing(place) as file,
        job.folder.writing("errors.jsonl") as errors,
    ):
        sink: Sink = (
            ParquetSink(file, inputs, _metadata(job))
            if failures is None
            else JsonSink(file, failures, inputs)
        )
        try:
            for group in joiner.groups():
                sink.write(group)
                tally.count(group, errors)
        except BaseException:
            with suppress(Exception):
                sink.close()  # before its file: else it tries when nobody looks
            raise
        sink.close()
    return index, joiner, tally


class _Tally:
    """What the dataset holds, counted as it is written."""

    def __init__(self) -> None:
        self.figures = Figures()
        self.keys = RepeatCheck()

    def count(self, group: Group, errors: BinaryIO) -> None:
        """Count a group's rows and write its failed ones to `errors`."""
        rows = group.results.select(_COUNTED).to_pylist()
        self.keys.add(f"{row['sample_index']} {row['custom_id']}" for row in rows)
        for row, line in zip(rows, group.lines.to_pylist(), strict=True):
            self.figures.count(row)
            if row["finish_reason"] == "error":
                names = ("custom_id", "sample_index", "prompt_index", "error_code", "error_message")
                failure = {name: row[name] for name in names} | {"line": line}
                errors.write(orjson.dumps(failure, option=orjson.OPT_APPEND_NEWLINE))


_COUNTED = [
    "custom_id",
    "sample_index",
    "prompt_index",
    "finish_reason",
    "repetitive",
    "error_code",
    "error_message",
    "prompt_tokens",
    "completion_tokens",
    "decode_s",
    "speedup",
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
]


def output_of(job: JobFolder, output: str, format: str) -> str:
    """Where the dataset goes; the file that the job itself names, only if that fits the format."""
    check_output(output, job.manifest.input.path, format)
    found = target(output, job.spec.output, job.id, format)
    check_output(found, job.manifest.input.path, format)
    return found or job.folder.join(f"results.{format}")


def _metadata(job: JobFolder) -> dict[str, str]:
    """What the dataset's file says about itself; the engine's facts as its workers named them."""
    manifest = job.manifest
    facts = {"dtype": ["unknown"]} | job.ledger.facts()
    return {
        "trbatch.job": manifest.id,
        "trbatch.version": trbatch.__version__,
        "trbatch.model": manifest.model,
        "trbatch.revision": manifest.revision,
        "trbatch.task": manifest.task,
        "trbatch.job_seed": str(manifest.job_seed),
        "trbatch.sampling": orjson.dumps(manifest.spec.sampling.to_dict()).decode(),
        **{f"trbatch.{name}": ", ".join(values) for name, values in facts.items()},
    }


def receipt_of(
    job: JobFolder,
    target: str,
    index: Index,
    joiner: Joiner,
    figures: Figures,
    keys: RepeatCheck,
    *,
    errors: str = "",
) -> Receipt:
    """The receipt of the rows that `joiner` gave.

    Args:
        target: where the dataset lies.
        errors: where rows without a text lie, if they do not lie there.
        figures: sums over these rows.
        keys: sample and id of each.
    """
    receipt = Receipt(
        job=job.id,
        output=target,
        errors_output=errors,
        rows_in=job.manifest.samples,
        input_rows=job.manifest.rows,
        rows_ok=figures.rows_ok,
        rows_failed=figures.rows_failed,
        rows_cancelled=figures.rows_cancelled,
        rows_expired=joiner.expired,
        rows_missing=joiner.missing,
        duplicates=index.rows - len(index),
        repeated=len(keys.repeated()),
    )
    busy_s = covered_seconds(footer.span for footer in job.ledger.footers())
    stats = {
        "receipt": receipt.to_dict(),
        "rows_outdated": len(index) - joiner.used,
        "figures": figures.to_dict(),
        "mean_acceptance_length": figures.mean_acceptance_length,
        "draft_acceptance_rate": figures.draft_acceptance_rate,
        "speedup": figures.speedup,
        "busy_s": busy_s,
        "tokens_per_s": figures.completion_tokens / busy_s if busy_s > 0 else None,
        "metadata": _metadata(job),
    }
    return dataclasses.replace(receipt, stats=stats)
