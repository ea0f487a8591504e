"""A collected dataset and its card into a place of datasets: the Hugging Face hub, a bucket.

The place is any URL that fsspec knows. Each job has a file of its own there, `data/<job>.parquet`,
so that nights add up to one dataset and a job that is pushed again replaces what is its own.
"""

from __future__ import annotations

import dataclasses
import re
import shutil

from trbatch import card
from trbatch.errors import Unreachable, UsageError
from trbatch.job import JobFolder
from trbatch.logs import note
from trbatch.masking import mask_url
from trbatch.parquet_files import schema_of
from trbatch.receipt import Receipt
from trbatch.storage import Folder, folder, place, writing
from trbatch.together import check_together

_ON_THE_HUB = re.compile(r"hf://(datasets|buckets)/[^/@]+/[^/@]+(@[^/]+(/.*)?|/.*)?")


def check_push(url: str, format: str) -> None:
    """Refuse what cannot be pushed, before anything is collected.

    Raises:
        UsageError: the place is no URL of a folder, or the format is not Parquet.
    """
    if format != "parquet":
        raise UsageError("a dataset is pushed as Parquet", hint="leave --format away")
    if "://" not in url or url.lower().endswith((".parquet", ".jsonl", ".md")):
        raise UsageError(
            f"{mask_url(url)} is no place for a dataset",
            hint="give the URL of a dataset or a folder, e.g. hf://datasets/me/answers",
        )
    if url.startswith("hf://") and not _ON_THE_HUB.fullmatch(url):
        raise UsageError(
            f"{mask_url(url)} names no dataset", hint="write hf://datasets/NAME/DATASET"
        )


def check_card(output: str, format: str) -> None:
    """Refuse a card where there would be somebody's own.

    Raises:
        UsageError: the folder of the output has a README.md of another hand, or the format is not
            Parquet.
    """
    if format != "parquet":
        raise UsageError("a card describes a Parquet dataset", hint="leave --format away")
    parent, _ = place(output)
    if _foreign_card(parent) is not None:
        raise UsageError(
            f"{mask_url(parent.join(card.NAME))} was not written by trbatch",
            hint="put the dataset into a folder of its own with --output",
        )


def write_card(job: JobFolder, receipt: Receipt) -> Receipt:
    """Write the card beside the dataset. Returns the receipt that names it."""
    parent, name = place(receipt.output)
    return dataclasses.replace(receipt, card=_write_card(job, receipt, parent, name, name))


def push(job: JobFolder, receipt: Receipt, url: str) -> Receipt:
    """Copy the dataset into a place of datasets and write the card there.

    A card of another hand stays as it is; so does the place if rows are missing.

    Returns:
        the receipt that names what was written.

    Raises:
        UsageError: with what lies there already it would not open as one dataset.
        Unreachable: the place cannot be written to.
    """
    if not receipt.complete:
        note("not pushed: the dataset is not complete; collect again when the job is done")
        return receipt
    try:
        return _copy(job, receipt, folder(url))
    except (Unreachable, UsageError) as error:
        whole = f"the dataset is whole in {mask_url(receipt.output)}"
        if isinstance(error, Unreachable):
            whole += "; the same command pushes it"
        hint = f"{error.hint}; {whole}" if error.hint else whole
        raise type(error)(error.message, hint=hint) from error


def _copy(job: JobFolder, receipt: Receipt, root: Folder) -> Receipt:
    name = f"data/{job.id}.parquet"
    source, base = place(receipt.output)
    foreign = _foreign_card(root)
    # Unless somebody says which files belong together.
    if foreign is None or not card.says_files(foreign):
        check_together(root, name, source, base)
    with source.open(base) as file, writing(root.join(name)) as target:
        shutil.copyfileobj(file, target)
    written = ""
    if foreign is not None:
        note(f"{mask_url(root.join(card.NAME))} was not written by trbatch and stays as it is")
    else:
        written = _write_card(job, receipt, root, "data/*.parquet", name)
    return dataclasses.replace(receipt, pushed=root.join(name), card=written or receipt.card)


def _write_card(job: JobFolder, receipt: Receipt, where: Folder, files: str, name: str) -> str:
    source, base = place(receipt.output)
    schema = schema_of(source, base)
    where.write(card.NAME, card.card(job, receipt, schema, files, name).encode())
    return where.join(card.NAME)


def _foreign_card(where: Folder) -> str | None:
    """The card in a folder that trbatch has not written; None if there is none."""
    try:
        text = where.read(card.NAME).decode(errors="replace")
    except FileNotFoundError:
        return None
    return None if card.is_ours(text) else text
