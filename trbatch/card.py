"""A dataset's card: the README.md that says where its texts come from and how to open it.

Its YAML header is the one that the Hugging Face hub and `datasets` read.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import orjson
import pyarrow as pa

from trbatch.config import SamplingParams
from trbatch.job import JobFolder
from trbatch.manifest import Manifest
from trbatch.naming import is_local_path
from trbatch.receipt import Receipt
from trbatch.schema import SCHEMA

NAME = "README.md"
MARK = (
    "<!-- Written by trbatch: the next collection writes it anew. Remove this line to keep it. -->"
)
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_LARGER = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))


def is_ours(text: str) -> bool:
    """Whether a card was written by trbatch and not changed into somebody's own."""
    return MARK in text


def says_files(text: str) -> bool:
    """Whether a card's header says which files are the dataset, as `configs` of the hub do."""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return header is not None and "data_files:" in header[1]


def card(job: JobFolder, receipt: Receipt, schema: pa.Schema, files: str, described: str) -> str:
    """The card of a collected job, as Markdown.

    Args:
        job: that was collected.
        receipt: of the collection.
        schema: of the Parquet file.
        files: which files of the card's folder are the dataset, a glob.
        described: the one of them that this job has written.
    """
    parts = [
        _header(job.id, receipt, files),
        MARK,
        f"# {job.id}",
        _summary(job.manifest, receipt, described),
        _loading(files),
        "## How it was made",
        _making(job.manifest, receipt),
        *_texts(job.manifest),
        "## Columns",
        _columns(schema),
    ]
    return "\n\n".join(parts) + "\n"


def _header(name: str, receipt: Receipt, files: str) -> str:
    lines = ["---", f"pretty_name: {_quoted(name)}"]
    lines += ["tags:", "- synthetic", "- trbatch"]
    lines += ["size_categories:", f"- {_size(receipt.rows_out)}"]
    lines += ["configs:", "- config_name: default", "  data_files:", "  - split: train"]
    lines += [f"    path: {_quoted(files)}", "---"]
    return "\n".join(lines)


def _size(rows: int) -> str:
    return next((name for most, name in (*_SIZES, *_LARGER) if rows < most), "n>1T")


def _summary(manifest: Manifest, receipt: Receipt, described: str) -> str:
    figures = receipt.stats["figures"]
    return (
        f"{receipt.rows_ok:,} texts written by `{_model(manifest)}`, "
        f"{figures['completion_tokens']:,} tokens. This page describes `{described}`. "
        f"Its receipt: {receipt}. A row without a text says why in `error_code` and "
        "`error_message`."
    )


def _loading(files: str) -> str:
    code = (
        f'import datasets\n\nrows = datasets.load_dataset("parquet", data_files="{files}")["train"]'
    )
    return _block(f'{code}\nrows = rows.filter(lambda row: row["text"] is not None)', "python")


def _making(manifest: Manifest, receipt: Receipt) -> str:
    spec, stats = manifest.spec, receipt.stats
    rows = {
        "model": f"`{_model(manifest)}`",
        "revision": manifest.revision,
        "numbers": stats["metadata"].get("trbatch.dtype", ""),
        "input": f"`{manifest.input.path.rpartition('/')[2]}`, {manifest.rows:,} rows",
        "sampling": _code(_sampling(spec.sampling)),
        "job seed": str(manifest.job_seed),
        "chat template arguments": _code(spec.chat_template_kwargs or {}),
        "made": f"{manifest.created}, trbatch {manifest.version}",
    }
    if stats["mean_acceptance_length"]:
        length = f"{stats['mean_acceptance_length']:.2f}"
        rows["speculative decoding"] = f"Token Recycling, {length} tokens a forward"
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(lines)


def _sampling(sampling: SamplingParams) -> dict[str, Any]:
    """What decides texts: what differs from the defaults, and how they are chosen and end."""
    default = SamplingParams()
    values = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    always = ("temperature", "max_tokens")
    return {k: v for k, v in values.items() if k in always or v != getattr(default, k)}


def _texts(manifest: Manifest) -> list[str]:
    parts = []
    if manifest.spec.system_prompt:
        parts += ["System prompt:", _block(manifest.spec.system_prompt)]
    if manifest.spec.template:
        parts += ["Template of the prompts:", _block(manifest.spec.template, "jinja")]
    return parts


def _columns(schema: pa.Schema) -> str:
    lines = ["| column | type | meaning |", "|---|---|---|"]
    for field in schema:
        ours = field.name in SCHEMA.names
        metadata = SCHEMA.field(field.name).metadata if ours else {}
        meaning = (metadata or {}).get(b"description", b"of the input").decode()
        lines.append(f"| `{_cell(field.name)}` | {_cell(_kind(field.type))} | {_cell(meaning)} |")
    return "\n".join(lines)


def _kind(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 60 else text.partition("<")[0]


def _model(manifest: Manifest) -> str:
    """The model's name; of a folder only its last part, which tells nothing of the machine."""
    name = manifest.model
    return name.rstrip("/").rpartition("/")[2] if is_local_path(name) else name


def _block(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _code(values: dict[str, Any] | Any) -> str:
    return f"`{orjson.dumps(values).decode()}`" if values else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _quoted(text: str) -> str:
    """As JSON, which YAML reads too."""
    return orjson.dumps(text).decode()
