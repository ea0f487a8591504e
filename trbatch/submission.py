"""From a job spec to a job folder: made anew, continued as it is, or with its input read anew."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import trbatch
from trbatch.chunk_files import CHUNKS, ChunkWriter, are_whole, new_reading
from trbatch.config import JobSpec, default_model, default_store
from trbatch.control import Control
from trbatch.errors import ResumeRefused, UsageError
from trbatch.manifest import InputState, Manifest, differences, settings
from trbatch.misspelt import warn_of_misspelt
from trbatch.moments import written
from trbatch.naming import checked_job_name, default_job_id, default_task, model_name
from trbatch.outputs import check_not_stream, check_output, check_path
from trbatch.prompts import Batch, read_batches
from trbatch.shaping import Shaping
from trbatch.storage import Folder, folder

MANIFEST = "manifest.json"
MARKS = ("_SUCCESS", "_PARTIAL")  # whether the last collect found every row
DOOMED = "_REMOVED"  # a folder with this mark is what an interrupted removal has left


@dataclass(frozen=True, slots=True)
class Submission:
    """A job folder that is ready for workers."""

    path: str
    continued: bool  # it was there already
    reread: bool = False  # and its input was read anew


def submit(spec: JobSpec) -> Submission:
    """Make or continue the job of a spec. Reads the input only if it is new or has changed.

    A job is continued by its id: `spec.name`, else an id made from the input's path and the
    settings, so that the same command again finds the same job. `spec.resume` says what may be:
    `if_possible` continues a job of the same settings, `always` insists on one and takes it over
    with changed settings too, `never` makes a new one.

    Raises:
        InputError: the file is unusable or an id is repeated; nothing has been kept.
        UsageError: the output cannot be written as any format, or there is no such model.
        ResumeRefused: the job cannot be continued as `spec.resume` asks.
    """
    Control().asked(deadline=spec.deadline)  # a wrong one is told before anything is read
    return _submit(resolved(spec), named_template(spec))


def _submit(spec: JobSpec, template: str) -> Submission:
    """Make or continue the job of a resolved spec, whose template messages call `template`."""
    check_output(spec.output, spec.input)
    store = folder(spec.out)
    job_id = job_id_of(spec, store)
    job = folder(store.join(job_id))
    if not job.exists(MANIFEST):
        if _make(job, job_id, spec, template):
            return Submission(job.path, continued=False)
        if spec.resume == "never":  # another number, or a refusal
            return _submit(spec, template)
    old = Manifest.from_json(job.read(MANIFEST), job.join(MANIFEST))
    reread = _continue(job, old, spec, template)
    if reread is None:
        return _submit(spec, template)
    control = Control.of(job)
    wanted = control.asked(priority=spec.priority, deadline=spec.deadline)
    if wanted != control:
        wanted.write(job)
    return Submission(job.path, continued=True, reread=reread)


def resolved(spec: JobSpec) -> JobSpec:
    """The spec with absolute paths, with names for what was left open, and its template's text.

    Raises:
        UsageError: there is no such model or template, or it is no valid one; a path is no text, or
            `-`.
    """
    check_not_stream(
        spec.input,
        "the input: a job is continued by its file",
        "write it to a file first, e.g. cat > prompts.jsonl, and give that",
    )
    check_output(spec.output, "")  # as it was written: below, `-` is a path
    path, store = _absolute(spec.input), folder(spec.out or default_store()).path
    check_path(path)
    check_path(store)
    return dataclasses.replace(
        spec,
        input=path,
        output=_absolute(spec.output) if spec.output else "",
        out=store,
        model=model_name(spec.model or default_model()),
        task=spec.task or default_task(path),
        template=_template(spec.template),
    )


def _template(given: str) -> str:
    """The template itself, which the manifest keeps, whether it or its file was given."""
    if not given:
        return ""
    from trbatch.templates import read_template  # here: few jobs need Jinja

    return read_template(given)


def named_template(spec: JobSpec) -> str:
    """What messages call the template of a spec that is not resolved; "" where it has none."""
    if not spec.template:
        return ""
    from trbatch.templates import template_name  # here: few jobs need Jinja

    return template_name(spec.template)


def _absolute(path: str) -> str:
    if "://" in path:
        return path
    is_folder = "/" if path.endswith("/") else ""
    return os.path.abspath(os.path.expanduser(path)) + is_folder


def job_id_of(spec: JobSpec, store: Folder) -> str:
    """The id of a resolved spec's job, which may be there or not.

    Raises:
        ResumeRefused: it is, and `spec.resume` is `never`.
    """
    if spec.name:
        job_id = checked_job_name(spec.name)
        if spec.resume == "never" and folder(store.join(job_id)).exists(MANIFEST):
            raise ResumeRefused(
                f"a job {job_id!r} is there already and --resume is 'never'",
                hint="choose another --name, or leave --resume away to continue the job",
            )
        return job_id
    decisive = settings(spec, spec.model) | {"sampling": spec.sampling.identity()}
    default = job_id = default_job_id(spec.input, decisive)
    number = 1
    while spec.resume == "never" and folder(store.join(job_id)).exists(MANIFEST):
        number += 1
        job_id = f"{default}-{number}"
    return job_id


def _make(job: Folder, job_id: str, spec: JobSpec, template: str) -> bool:
    """Make the job; False if another command has made it in the meantime: that one counts."""
    if job.exists(DOOMED):  # or the next `prune` would end the removal, and this job
        job.remove("")
    seed = secrets.randbits(63) if spec.seed is None else spec.seed
    control = control_of_new(spec, job_id)
    manifest = _read_input(job, job_id, spec, seed, template, generation=0)
    if control != Control():
        control.write(job)  # before the manifest: from that on the job is there
    if job.create(MANIFEST, manifest.to_json()):
        return True
    job.remove(manifest.chunk_folder)
    return False


def control_of_new(spec: JobSpec, job_id: str) -> Control:
    """What is wanted of a job that is not there yet.

    Raises:
        ResumeRefused: it has to be there.
        UsageError: its deadline has passed, or is no point in time.
    """
    if spec.resume == "always":
        raise ResumeRefused(
            f"there is no job {job_id!r} in {spec.out} to resume",
            hint="leave --resume away to make it",
        )
    control = Control().asked(priority=spec.priority, deadline=spec.deadline)
    if control.expired and control.deadline is not None:
        raise UsageError(
            f"the deadline has passed already: {written(control.deadline)}",
            hint="give a later one, e.g. 8h or 07:00",
        )
    return control


def _continue(job: Folder, old: Manifest, spec: JobSpec, template: str) -> bool | None:
    """Continue a job. Returns whether its input was read anew.

    An input that has not changed is read, too, if chunks of it are missing or damaged. None: while
    it was read, another command has changed or removed the job, and nothing was done.
    """
    changed = changed_settings(old, spec)
    same_input = has_same_input(old, spec)
    same_limits = old.spec.max_row_bytes == spec.max_row_bytes
    if same_input and same_limits and not changed and are_whole(job, old):
        if spec.output != old.spec.output:
            spec = dataclasses.replace(old.spec, output=spec.output)
            job.write(MANIFEST, dataclasses.replace(old, spec=spec).to_json())
        return False
    seed = old.job_seed if spec.seed is None else spec.seed
    new = _read_input(job, old.id, spec, seed, template, generation=old.generation + 1)
    if not same_input:
        with _removed_on_error(job, new.chunk_folder):
            check_named(old, new.unnamed_rows)
    if not _is_still(job, old):
        job.remove(new.chunk_folder)
        job.prune(CHUNKS)
        return None
    job.write(MANIFEST, dataclasses.replace(new, created=old.created).to_json())
    for mark in MARKS:
        job.remove(mark)
    return True


def has_same_input(old: Manifest, spec: JobSpec) -> bool:
    """Whether a job's input is the one of the spec, and as it was."""
    return old.input.path == spec.input and old.input.holds()


def check_named(old: Manifest, unnamed_rows: int) -> None:
    """Refuse to continue a job with a changed input whose rows nobody can tell apart.

    Args:
        unnamed_rows: of the changed input, good ones whose id is their number.

    Raises:
        ResumeRefused: the numbers may mean other rows now.
    """
    if unnamed_rows or old.unnamed_rows:
        raise ResumeRefused(
            f"the input of job {old.id!r} has changed and {unnamed_rows or old.unnamed_rows}"
            " of its rows have no id, so that their numbers may mean other rows now",
            hint="give every row a 'custom_id' or 'id', or start a new job with --resume never",
        )


def _is_still(job: Folder, old: Manifest) -> bool:
    """Whether a job's manifest is the one that was read before."""
    try:
        return Manifest.from_json(job.read(MANIFEST), job.join(MANIFEST)) == old
    except FileNotFoundError:
        return False


def changed_settings(old: Manifest, spec: JobSpec) -> list[str]:
    """Which settings of a job the spec would change, in words.

    Raises:
        ResumeRefused: there are some, and `spec.resume` is not `always`.
    """
    changed = differences(settings(old.spec, old.model), settings(spec, spec.model))
    if changed and spec.resume != "always":
        raise ResumeRefused(
            f"job {old.id!r} was made with other settings: {'; '.join(changed)}",
            hint="give those again, choose another --name, or --resume always to go on with the "
            "new settings",
        )
    return changed


def _read_input(
    job: Folder, job_id: str, spec: JobSpec, job_seed: int, template: str, generation: int
) -> Manifest:
    """Read, check and hash the input and write its chunks; on any error no chunk is left.

    The chunks are safe from a power cut before the manifest that names them is written.
    """
    state = InputState.of(spec.input)
    writer = ChunkWriter(job, new_reading(generation), spec, job_seed)
    with _removed_on_error(job, writer.folder):
        with writer:
            for batch in batches(spec, template):
                writer.write(batch)
        writer.check_repeats(batches(spec, template))
        writer.settle()
    warn_of_misspelt(spec, writer.columns)
    return Manifest(
        id=job_id,
        spec=spec,
        model=spec.model,
        revision=spec.revision,
        task=spec.task,
        job_seed=job_seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=trbatch.__version__,
        input=state,
        rows=len(writer.ids),
        rows_failed=writer.errors.total(),
        errors=dict(writer.errors),
        unnamed_rows=writer.unnamed_rows,
        generation=generation,
        chunk_folder=writer.folder,
        chunk_samples=tuple(writer.chunk_samples),
    )


def batches(spec: JobSpec, template: str) -> Iterator[Batch]:
    """The checked rows of a resolved spec's input, a chunk at a time.

    Args:
        spec: resolved.
        template: what messages call its template; see `named_template`.
    """
    return read_batches(
        spec.input,
        spec.chunk_size,
        prompt_column=spec.prompt_column,
        id_column=spec.id_column,
        sampling=spec.sampling,
        max_row_bytes=spec.max_row_bytes,
        shaping=Shaping.of(spec, template),
    )


@contextmanager
def _removed_on_error(job: Folder, name: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        job.remove(name)
        job.prune(name.partition("/")[0])
        raise
