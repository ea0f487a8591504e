"""`trbatch report`: a job's figures in one pass over its rows, and a page that shows them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from trbatch import matrices, passthrough
from trbatch.dataset import receipt_of
from trbatch.errors import TrbatchError, UsageError
from trbatch.ids import RepeatCheck
from trbatch.job import JobFolder
from trbatch.joining import Index, Joiner
from trbatch.manifest import Manifest
from trbatch.masking import mask_text
from trbatch.matrices import SavedMatrix
from trbatch.receipt import Receipt
from trbatch.report_figures import COLUMNS, NO_CATEGORY, RowCount, RowFigures
from trbatch.report_time import Clock
from trbatch.storage import writing
from trbatch.trace import Trace

logger = logging.getLogger(__name__)

CATEGORY = "category"  # the column of the input that rows are grouped by
LONGEST_CATEGORY = 80  # characters
PAGE = "report.html"  # in the job folder, unless another place is named


@dataclass(frozen=True, slots=True)
class Cost:
    """What the workers' time cost. Prices are in the currency of `gpu_hour_price`."""

    gpu_hour_price: float
    gpu_hours: float  # in which a worker, one a GPU, decoded rows of the job
    total: float
    per_million_tokens: float | None  # generated ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a report shows."""

    manifest: Manifest
    receipt: Receipt  # of the rows as they are now; `output` is "" before the first `collect`
    rows: RowFigures
    trace: Trace
    facts: Mapping[str, list[str]]  # of the engines, e.g. their dtype
    category: str  # the column that rows were grouped by; "": there is none
    cost: Cost | None
    matrix: SavedMatrix | None  # the task's, as it is now
    made_at: float  # Unix seconds
    output: str = ""  # the page, once it is written

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one worker decoded rows of the job."""
        return sum(end - start for start, end in self.trace.busy)

    @property
    def worker_s(self) -> float:
        """The same, summed over workers."""
        return sum(self.trace.worker_s.values())

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens generated a second of `busy_s`."""
        tokens = self.rows.total.completion_tokens
        return tokens / self.busy_s if self.busy_s > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-serialisable values."""
        total = self.rows.total
        return {
            "job": self.manifest.id,
            "output": self.output,
            "receipt": self.receipt.to_dict(),
            "tokens_per_s": self.tokens_per_s,
            "busy_s": self.busy_s,
            "worker_s": self.worker_s,
            "mean_acceptance_length": total.mean_acceptance_length,
            "draft_acceptance_rate": total.draft_acceptance_rate,
            "speedup": total.speedup,
            "mean_acceptance_length_varied": self.rows.varied.mean_acceptance_length,
            "speedup_varied": self.rows.varied.speedup,
            "cost": dataclasses.asdict(self.cost) if self.cost else None,
            **self.rows.to_dict(),
            "trace": self.trace.to_dict(),
            "settings": settings_of(self),
        }


def make_report(
    job: JobFolder, *, gpu_hour_price: float | None = None, category: str = CATEGORY
) -> Report:
    """Count a job's rows as they are now; the job may still be running.

    Args:
        gpu_hour_price: of one worker for an hour, in any currency; None: costs are not of interest.
        category: the input's column to group rows by; rows are not grouped if there is none,
            and a warning says so where it is another than the usual one.

    Raises:
        UsageError: the price is not positive.
        JobFailed: a segment is damaged.
    """
    if gpu_hour_price is not None and not 0 < gpu_hour_price < 1e9:
        raise UsageError(f"the price of a GPU hour must be positive, not {gpu_hour_price:g}")
    trace = job.ledger.trace()
    inputs = job.passthrough_schema()
    grouped = {name: kind for name, kind in inputs.types.items() if name == category}
    if category not in ("", CATEGORY, *grouped):
        columns = ", ".join(inputs.types) or "none beside its prompts"
        logger.warning("the input has no column %r to group rows by; it has %s", category, columns)
    inputs = passthrough.Schema(grouped, inputs.as_json & grouped.keys())
    index = Index.of(job)
    joiner = Joiner(job, index, inputs, job.control().row_end())
    count, keys = RowCount(Clock(trace.busy), categorised=bool(grouped)), RepeatCheck()
    for group in joiner.groups():
        rows = group.results.select(COLUMNS).to_pylist()
        keys.add(f"{row['sample_index']} {row['custom_id']}" for row in rows)
        own = passthrough.dictionaries(group.inputs, group.results.num_rows)
        for row, values in zip(rows, own, strict=True):
            count.add(row, _category(values.get(category)))
    figures = count.figures()
    facts = job.ledger.facts()
    return Report(
        manifest=job.manifest,
        receipt=receipt_of(job, _collected(job), index, joiner, figures.total, keys),
        rows=figures,
        trace=trace,
        facts=facts,
        category=category if grouped else "",
        cost=_cost(gpu_hour_price, trace, figures.total.completion_tokens),
        matrix=_matrix(job, facts),
        made_at=time.time(),
    )


def write_report(job: JobFolder, report: Report, output: str = "") -> Report:
    """Write the page. Returns the report with the place where it lies.

    Args:
        output: a file or URL; "" puts it into the job folder.

    Raises:
        UsageError: the name promises something else than a page, or is the job's input.
    """
    from trbatch.report_page import page  # here: nothing else needs it

    place = output or job.folder.join(PAGE)
    if output and not output.lower().endswith((".html", ".htm")):
        raise UsageError(f"{output} would be a page of HTML", hint="name it .html")
    with writing(place) as file:
        file.write(page(report).encode("utf-8"))
    return dataclasses.replace(report, output=str(place))


def settings_of(report: Report) -> dict[str, str]:
    """What was asked and what decoded it, as texts; passwords of URLs are masked."""
    manifest, spec = report.manifest, report.manifest.spec
    asked = spec.sampling.to_dict()
    own = {name: value for name, value in spec.to_dict().items() if name not in _ELSEWHERE}
    found = {
        "input": manifest.input.path,
        "model": "@".join(part for part in (manifest.model, manifest.revision) if part),
        "task": manifest.task,
        "job_seed": manifest.job_seed,
        "created": manifest.created,
        "trbatch": manifest.version,
        **{f"sampling.{name}": value for name, value in asked.items() if _says_something(value)},
        **{name: value for name, value in own.items() if _says_something(value)},
        **{f"engine.{name}": ", ".join(values) for name, values in report.facts.items()},
    }
    return {name: mask_text(_text(value)) for name, value in found.items()}


_ELSEWHERE = ("input", "model", "revision", "task", "sampling", "seed", "name")


def _says_something(value: Any) -> bool:
    return value is not None and value is not False and value != "" and value != ()


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(repr, value))
    return "yes" if value is True else str(value)


def _category(value: Any) -> str:
    return NO_CATEGORY if value is None else str(value)[:LONGEST_CATEGORY]


def _cost(price: float | None, trace: Trace, tokens: int) -> Cost | None:
    if price is None:
        return None
    hours = sum(trace.worker_s.values()) / 3600
    total = hours * price
    return Cost(price, hours, total, total / tokens * 1e6 if tokens else None)


def _matrix(job: JobFolder, facts: Mapping[str, list[str]]) -> SavedMatrix | None:
    """The task's matrix, if the job's rows taught one that is kept."""
    if job.spec.private_matrix or not facts.get("model_fingerprint"):
        return None
    try:
        return matrices.find(job.matrices, job.manifest.task, facts["model_fingerprint"][-1])
    except TrbatchError:  # removed meanwhile, or never saved: the report does without
        return None


def _collected(job: JobFolder) -> str:
    """Where the dataset lies by the job's last `collect`."""
    try:
        found: str = orjson.loads(job.folder.read("stats.json"))["receipt"]["output"]
    except (FileNotFoundError, orjson.JSONDecodeError, KeyError):
        return ""
    return found
