"""`trbatch matrix`: look at the matrices that tasks have learned, and move them about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.tree import Tree

from trbatch import cli_options as options
from trbatch import matrices
from trbatch.cli_fields import epilog, example, grouped
from trbatch.cli_help import HelpGroup
from trbatch.cli_output import print_json, print_pairs, print_rows
from trbatch.config import default_store
from trbatch.engine.sequence import TaskKey
from trbatch.errors import UsageError
from trbatch.matrices import Place, SavedMatrix
from trbatch.matrix_stream import connect, forget
from trbatch.naming import MATRICES, slug
from trbatch.queue import JobQueue

_MOST_NODES = 127


@click.group("matrix", cls=HelpGroup, epilog=epilog("trbatch matrix list"))
def matrix_group() -> None:
    """Look at what tasks have learned, and move it about.

    A task's matrix holds the tokens that followed each token. It is saved in the store at the end
    of each job and warms the drafts of the next one; what the model says never depends on it.
    """


_model_option = click.option(
    "--model",
    default="",
    metavar="MODEL",
    help="Name or fingerprint, where the task has matrices of several.",
)
_force_option = click.option(
    "--force", is_flag=True, help="Even over a file that is there, or while workers live."
)


_of_a_task = grouped(click.argument("task"), _model_option, options.store_option)


@matrix_group.command("list", **example("trbatch matrix list --json"))
@options.store_option
@options.json_option
def matrix_list(out: str, as_json: bool) -> None:
    """List every task's matrix: size, rows filled, age, acceptance with and without it.

    Acceptance is in tokens for each forward. One row in 32 is drafted without the task's matrix,
    so that the two can be compared.
    """
    found = matrices.all_in(_folder(out))
    if as_json:
        print_json([saved.to_dict() for saved in found])
        return
    print_rows([_row(saved) for saved in found], "no matrix yet: the first job saves one")


@matrix_group.command("show", **example("trbatch matrix show mails --nodes 40"))
@_of_a_task
@click.option(
    "--nodes",
    type=click.IntRange(1, _MOST_NODES),
    default=24,
    show_default=True,
    help="Nodes of the learned tree to draw, the likeliest ones.",
)
@options.json_option
def matrix_show(task: str, model: str, out: str, nodes: int, as_json: bool) -> None:
    """Show one task's matrix, and the draft tree that was learned from it.

    A node is the rank of a candidate in its row; behind it the share of places at which the whole
    path from the root came true.
    """
    saved = matrices.find(_folder(out), task, model)
    if as_json:
        tree = [{"path": path, "chance": chance} for path, chance in saved.facts.tree]
        print_json(saved.to_dict() | {"tree": tree})
        return
    print_pairs(_row(saved) | {"fingerprint": saved.facts.model, "file": str(saved.file)})
    click.echo()
    Console(highlight=False, markup=False).print(_drawn(saved, nodes))


@matrix_group.command("export", **example("trbatch matrix export mails -o m.safetensors"))
@_of_a_task
@click.option(
    "output",
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write. Without it: named after the task, here.",
)
@_force_option
def matrix_export(task: str, model: str, out: str, output: Path | None, force: bool) -> None:
    """Copy a task's matrix to a file, to be imported elsewhere. Prints the file."""
    saved = matrices.find(_folder(out), task, model)
    target = output or Path(f"{slug(task)}.safetensors")
    matrices.export(saved, target, force=force)
    click.echo(target)


@matrix_group.command("import", **example("trbatch matrix import m.safetensors"))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--task",
    default="",
    metavar="TASK",
    help="The task that it shall warm. Without it: the one that it came from.",
)
@_force_option
@options.store_option
@options.redis_option
def matrix_import(file: Path, task: str, force: bool, out: str, redis_url: str) -> None:
    """Put an exported matrix into the store, for the same model. Prints its new place."""
    facts = matrices.read(file).facts
    _alone(redis_url, facts.model, TaskKey(task or facts.task, _folder(out)), force=force)
    click.echo(matrices.import_file(file, _folder(out), task=task, force=force))


@matrix_group.command("reset", **example("trbatch matrix reset mails"))
@_of_a_task
@_force_option
@options.redis_option
def matrix_reset(task: str, model: str, out: str, force: bool, redis_url: str) -> None:
    """Forget what a task has learned: its next job begins cold."""
    saved = matrices.find(_folder(out), task, model)
    _alone(redis_url, saved.facts.model, TaskKey(task, _folder(out)), force=force)
    matrices.remove(saved)
    click.echo(f"{task}: forgotten, {saved.facts.rows + saved.facts.pairs:,} rows")


def _alone(redis_url: str, model: str, task: TaskKey, *, force: bool) -> None:
    """See to it that the file will be the truth: no worker holds another, nor does the server.

    Raises:
        UsageError: workers live, and they would write what they hold in memory.
    """
    with JobQueue.connect(redis_url) as jobs:
        workers = [worker.name for worker in jobs.workers()]
        if workers and not force:
            raise UsageError(
                f"workers live and may hold this matrix: {', '.join(workers)}",
                hint="stop them first; --force if they hold other tasks",
            )
        connection = connect(jobs)
        forget(connection, model, task)
        connection.close()


def _folder(out: str) -> Place:
    return matrices.below(out or default_store(), MATRICES)


def _row(saved: SavedMatrix) -> dict[str, Any]:
    facts = saved.facts
    return {
        "task": facts.task,
        "model": Path(facts.model_name).name or facts.model,
        "rows": f"{facts.rows:,}",
        "pairs": f"{facts.pairs:,}",
        "size": f"{saved.size / 1e6:.1f} MB",
        "saved": f"{matrices.describe_age(saved.age_s)} ago",
        "acceptance with it": _length(facts.with_it.mean_length),
        "and without": _length(facts.without_it.mean_length),
    }


def _length(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _drawn(saved: SavedMatrix, nodes: int) -> Tree:
    """The first nodes of the learned tree."""
    drawn: dict[tuple[int, ...], Tree] = {(): Tree(f"last token ({nodes} likeliest nodes)")}
    for path, chance in saved.facts.tree[:nodes]:
        label = f"rank {path[-1]}  {chance:.1%}"
        drawn[tuple(path)] = drawn[tuple(path[:-1])].add(label)
    return drawn[()]
