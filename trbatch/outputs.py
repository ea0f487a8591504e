"""Where a job's dataset goes, and what its file may not be called."""

from __future__ import annotations

import os

from trbatch.errors import UsageError

FORMATS = ("parquet", "jsonl")
# Suffixes that promise something else than what is written.
_PROMISES = {
    "parquet": (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".gz", ".zst"),
    "jsonl": (".parquet", ".csv", ".tsv", ".gz", ".zst"),
}
_WORDS = {"parquet": "a Parquet file", "jsonl": "lines of JSON"}
_HINTS = {
    "parquet": "name it .parquet, or ask for --format jsonl",
    "jsonl": "name it .jsonl, or ask for --format parquet",
}


def check_path(path: str) -> None:
    """Refuse a path that is no text: it could stand in no manifest and in no message.

    Raises:
        UsageError: it is not valid UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = path.encode("utf-8", "backslashreplace").decode()
        raise UsageError(
            f"the name {shown} is not valid UTF-8", hint="rename it, e.g. with mv or convmv"
        ) from error


def check_not_stream(given: str, what: str, cure: str) -> None:
    """Refuse `-`, by which other programs mean what streams through them.

    Args:
        given: a path or URL as the user wrote it.
        what: it would be, and why that cannot be.
        cure: what to do instead.

    Raises:
        UsageError: it is that.
    """
    if given == "-":
        raise UsageError(f"- cannot be {what}", hint=f"{cure}; a file of that name is ./-")


def check_output(output: str, input: str, format: str = "") -> None:
    """Refuse an output that would mislead, or overwrite the job's input.

    Args:
        output: a file, or a folder that a file is put into; "" is always fine.
        input: the job's input, a URL or an absolute path.
        format: what will be written; "" if that is not decided yet.

    Raises:
        UsageError: no format, or not this one, may be written there, or its name is no text.
    """
    if format not in (*FORMATS, ""):
        raise UsageError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    check_path(output)
    check_not_stream(
        output,
        "the output: a dataset appears when it is whole",
        "name a file and read that, e.g. -o answers.jsonl --format jsonl && cat answers.jsonl",
    )
    if not output or is_folder(output):
        return
    if all(_misleads(output, one) for one in ([format] if format else FORMATS)):
        raise UsageError(
            f"{output} would be {_WORDS[format or 'parquet']}", hint=_HINTS[format or "parquet"]
        )
    if output == input or os.path.abspath(output) == input:
        raise UsageError(f"{output} is the job's input", hint="choose another --output")


def target(output: str, asked: str, job_id: str, format: str) -> str:
    """The dataset's file; "" if it goes into the job folder.

    Args:
        output: what was named now; wins.
        asked: what was named when the job was made. Another format's file stays as it is.
        job_id: what a file in a folder is named after.
        format: what will be written.
    """
    place = output or asked
    if place and is_folder(place):
        return f"{place.rstrip('/')}/{job_id}.{format}"
    return "" if not output and _misleads(asked, format) else place


def errors_of(output: str) -> str:
    """The file beside lines of JSON that holds the failed rows: `<name>.errors.jsonl`."""
    stem, dot, suffix = output.rpartition(".")
    named = dot and suffix.lower() in ("jsonl", "ndjson", "json")
    return f"{stem if named else output}.errors.jsonl"


def is_folder(output: str) -> bool:
    """Whether a file that is named after the job goes into what was named as the output."""
    return output.endswith("/") or ("://" not in output and os.path.isdir(output))


def _misleads(output: str, format: str) -> bool:
    return output.lower().endswith(_PROMISES[format])
