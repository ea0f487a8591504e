"""`trbatch submit --dry-run`: what a job would ask, what is wrong with its rows, how long it takes.

Reads the whole input as `submit` does, renders and counts each prompt as a worker does, and writes
nothing anywhere.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from trbatch.chunks import RowHasher
from trbatch.config import JobSpec
from trbatch.control import Control
from trbatch.earlier_jobs import Pace, earlier_pace
from trbatch.engine.sequence import Request
from trbatch.ids import RepeatCheck
from trbatch.job import JobFolder
from trbatch.merging import SamplingMerger
from trbatch.misspelt import warn_of_misspelt
from trbatch.naming import row_place
from trbatch.outputs import check_output
from trbatch.prompts import check_repeats
from trbatch.rows import Row
from trbatch.schema import Key
from trbatch.shaping import CHAT_ARGUMENTS
from trbatch.storage import folder
from trbatch.submission import (
    MANIFEST,
    batches,
    changed_settings,
    check_named,
    control_of_new,
    has_same_input,
    job_id_of,
    named_template,
    resolved,
)
from trbatch.tokenizing import Counted, NoTokenizer, PromptCounter

SHOWN_PROMPTS = 3
SHOWN_BAD_ROWS = 5


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """A prompt for people to look at."""

    id: str
    line: int
    text: str  # as the model gets it; where it cannot be rendered, its request as JSON
    tokens: int | None


@dataclass(slots=True, kw_only=True)
class Preview:
    """What `submit` would do. Counts of tokens are None where no tokenizer is here."""

    job: str
    continues: bool  # there is such a job; only what it lacks would be decoded
    input: str
    model: str
    task: str
    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # bad rows by error code
    bad_rows: list[str] = field(default_factory=list)  # what is wrong with the first of them
    samples: int = 0  # to decode
    samples_done: int = 0
    prompt_tokens: int | None = None  # of all good rows
    longest_prompt: tuple[str, int] | None = None  # id of the row, tokens
    new_tokens_at_most: int = 0  # of the samples to decode: the sum of their `max_tokens`
    uncounted: str = ""  # why no tokens were counted
    pace: Pace | None = None  # of earlier jobs; None: there are none of this model
    seconds: float | None = None  # with texts as long as theirs
    seconds_at_most: float | None = None  # with every text of `max_tokens`
    prompts: list[ShownPrompt] = field(default_factory=list)

    @property
    def rows_bad(self) -> int:
        """Rows that would be error rows."""
        return self.errors.total()

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-serialisable values."""
        # A Counter is not copied as a dictionary is: `asdict` makes tuples its keys.
        plain = dataclasses.asdict(dataclasses.replace(self, errors=Counter()))
        return plain | {"errors": dict(self.errors), "rows_bad": self.rows_bad}


def preview(spec: JobSpec, *, report: Callable[[int], None] | None = None) -> Preview:
    """Do all of `submission.submit` but the writing, and count.

    Args:
        spec: of the job.
        report: is told how many rows are read, now and then.

    Raises:
        InputError, UsageError, ResumeRefused: as `submit` would.
    """
    Control().asked(deadline=spec.deadline)
    spec, template = resolved(spec), named_template(spec)
    check_output(spec.output, spec.input)
    store = folder(spec.out)
    job_id = job_id_of(spec, store)
    path = store.join(job_id)
    job = JobFolder.open(path) if folder(path).exists(MANIFEST) else None
    if job is None:
        control_of_new(spec, job_id)
    else:
        changed_settings(job.manifest, spec)
    found = Preview(
        job=job_id, continues=job is not None, input=spec.input, model=spec.model, task=spec.task
    )
    found.pace = earlier_pace(spec.out, spec.model, spec.revision, spec.task)
    reader = _Reader(spec, template, found, job)
    reader.read(report)
    if job is not None and not has_same_input(job.manifest, spec):
        check_named(job.manifest, reader.unnamed_rows)
    return found


class _Reader:
    """Goes through the input once and fills a preview in."""

    def __init__(self, spec: JobSpec, template: str, found: Preview, job: JobFolder | None) -> None:
        self._spec = spec
        self._template = template  # what messages call it
        self._found = found
        self._done: Container[Key] = frozenset() if job is None else job.done()
        seed = (spec.seed or 0) if job is None or spec.seed is not None else job.manifest.job_seed
        self._hasher = RowHasher(spec.model, spec.revision, spec.sampling, seed)
        self._merger = SamplingMerger(spec.sampling)
        self.unnamed_rows = 0  # good ones whose id is their number
        self._likely = 0.0  # tokens to generate, with texts as long as earlier ones
        self._counter: PromptCounter | None = None
        try:
            self._counter = PromptCounter(
                spec.model, spec.revision, trust_remote_code=spec.trust_remote_code
            )
            found.prompt_tokens = 0
        except NoTokenizer as error:
            found.uncounted = str(error)

    def read(self, report: Callable[[int], None] | None) -> None:
        """Read every row.

        Raises:
            InputError: the input is unusable, or an id comes twice.
        """
        ids = RepeatCheck()
        columns: set[str] = set()
        for batch in batches(self._spec, self._template):
            columns.update(batch.passed)
            ids.add(row.id for row in batch.rows)
            self._found.rows += len(batch.rows)
            good = []
            for row in batch.rows:
                if row.error is None:
                    good.append(row)
                    self.unnamed_rows += not row.named
                else:
                    self._count_bad(row.error.code, row.error.message)
            self._take(good)
            if report is not None:
                report(self._found.rows)
        if repeated := ids.repeated():
            again = batches(self._spec, self._template)
            rows = (row for batch in again for row in batch.rows)
            check_repeats(rows, repeated, self._spec.input)
        warn_of_misspelt(self._spec, columns)
        if self._found.pace is not None:
            speed = self._found.pace.tokens_per_s
            self._found.seconds = self._likely / speed
            self._found.seconds_at_most = self._found.new_tokens_at_most / speed

    def _take(self, rows: Sequence[Row]) -> None:
        """Count rows that can be read, some of which the model may refuse."""
        requests = [_request(row.request or {}, self._spec) for row in rows]
        counts: Sequence[Counted | None] = [None] * len(rows)
        if self._counter is not None:
            counts = self._counter.count(requests)
        for row, count in zip(rows, counts, strict=True):
            if count is not None and count.error is not None:
                place = row_place(self._spec.input, row.line)
                self._count_bad(count.error.code, f"{place}: {count.error.message}")
                continue
            if count is not None:
                self._count_tokens(row, count.tokens)
            self._count_samples(row)
            if len(self._found.prompts) < SHOWN_PROMPTS:
                self._found.prompts.append(_shown(row, count))

    def _count_bad(self, code: str, message: str) -> None:
        self._found.errors[code] += 1
        if len(self._found.bad_rows) < SHOWN_BAD_ROWS:
            self._found.bad_rows.append(message)

    def _count_tokens(self, row: Row, tokens: int) -> None:
        found = self._found
        found.prompt_tokens = (found.prompt_tokens or 0) + tokens
        if found.longest_prompt is None or tokens > found.longest_prompt[1]:
            found.longest_prompt = (row.id, tokens)

    def _count_samples(self, row: Row) -> None:
        assert row.request is not None, "a bad row asks for nothing"
        _, fingerprint, samples = self._hasher.identify(row)
        sampling, _, _ = self._merger.merge(row.request.get("sampling"))
        done = sum((row.id, fingerprint, sample) in self._done for sample in range(samples))
        left = samples - done
        self._found.samples += left
        self._found.samples_done += done
        self._found.new_tokens_at_most += left * sampling.max_tokens
        if self._found.pace is not None:
            self._likely += left * min(sampling.max_tokens, self._found.pace.tokens_per_sample)


def _request(request: Mapping[str, Any], spec: JobSpec) -> Request:
    """What of a row decides its prompt."""
    return Request(
        key=0,
        sampling=spec.sampling,
        prompt=request.get("prompt"),
        messages=request.get("messages"),
        chat_template_kwargs=request.get(CHAT_ARGUMENTS),
    )


def _shown(row: Row, count: Counted | None) -> ShownPrompt:
    if count is not None:
        return ShownPrompt(row.id, row.line, count.text, count.tokens)
    request = row.request or {}
    text = request.get("prompt") or orjson.dumps(request["messages"]).decode()
    return ShownPrompt(row.id, row.line, text, None)
