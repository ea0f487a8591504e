"""The matrices of tasks: kept between runs, never mixed up, evicted when idle."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from task_tools import VOCAB, Room, cold

from trbatch import matrices
from trbatch.engine.engine import MAX_TASKS
from trbatch.engine.model import LoadedModel, from_network
from trbatch.engine.sequence import TaskKey
from trbatch.engine_events import Finished, Ready
from trbatch.engine_thread import EngineThread
from trbatch.errors import ModelError
from trbatch.matrices import SavedMatrix, matrix_file
from trbatch.queue_names import ModelKey


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny.loaded("llama")


def test_a_saved_matrix_comes_back_row_for_row(tmp_path: Path) -> None:
    first, second = Room(), Room(places=3)
    task = first.tasks.open(TaskKey("news", tmp_path), busy=set())
    assert task.age_s is None
    first.write(task.index, 7, 20)
    first.write(task.index, VOCAB - 1, 30)
    first.tasks.save()
    second.tasks.open(TaskKey("other", tmp_path), busy=set())
    again = second.tasks.open(TaskKey("news", tmp_path), busy=set())
    assert again.index != task.index
    assert torch.equal(second.rows(again.index), first.rows(task.index))
    keys = first.matrix.pair_keys[task.index]
    assert torch.equal(second.matrix.pair_keys[again.index], keys)
    assert (keys >= 0).sum() == 2
    pairs = (room.matrix.pair_rows[i] for room, i in ((first, task.index), (second, again.index)))
    assert torch.equal(*(rows[keys >= 0] for rows in pairs))
    assert again.age_s is not None and 0 <= again.age_s < 60


def test_the_file_opens_with_any_safetensors_reader_and_is_written_whole(tmp_path: Path) -> None:
    room = Room()
    task = room.tasks.open(TaskKey("a task/with: odd letters", tmp_path), busy=set())
    room.write(task.index, 7, 20)
    room.tasks.save()
    file = matrix_file(tmp_path, "model", "a task/with: odd letters")
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - {file.parent / ".lock"}
    assert left == {file}, "scratch is left"
    kept = load_file(file)
    assert set(kept) == {
        "rows", "pair_keys", "pair_rows", "calibration", "paths", "path_counts",
    }  # fmt: skip
    assert kept["rows"].dtype == torch.int32
    assert kept["rows"].shape == (VOCAB, room.matrix.candidates)
    assert kept["rows"][7].tolist() == list(range(20, 20 + room.matrix.candidates))
    assert kept["rows"][8].tolist() == [-1] * room.matrix.candidates


def test_opening_twice_is_harmless(tmp_path: Path) -> None:
    room = Room()
    task = room.tasks.open(TaskKey("news", tmp_path), busy=set())
    room.write(task.index, 7, 20)
    room.tasks.save()
    room.write(task.index, 7, 30)
    assert room.tasks.open(TaskKey("news", tmp_path), busy=set()) is task
    assert room.rows(task.index)[7, 0] == 30, "what was learned since is gone"


def test_only_a_changed_matrix_is_written(tmp_path: Path) -> None:
    room = Room()
    task = room.tasks.open(TaskKey("news", tmp_path), busy=set())
    file = matrix_file(tmp_path, "model", "news")
    room.tasks.save()
    assert not file.exists()
    room.write(task.index, 7, 20)
    room.tasks.save()
    os.utime(file, (1000, 1000))
    room.tasks.save()
    assert file.stat().st_mtime == 1000
    room.write(task.index, 7, 21)
    room.tasks.save()
    assert file.stat().st_mtime > 1000


def test_a_task_without_a_folder_stays_in_memory(tmp_path: Path) -> None:
    room = Room()
    task = room.tasks.open(TaskKey("news", None), busy=set())
    room.write(task.index, 7, 20)
    room.tasks.save()
    assert list(tmp_path.rglob("*")) == []


def test_cold_begins_empty_and_replaces_the_file_when_saved(tmp_path: Path) -> None:
    old, new = Room(), Room()
    old.write(old.tasks.open(TaskKey("news", tmp_path), busy=set()).index, 7, 20)
    old.tasks.save()
    task = new.tasks.open(cold("news", tmp_path), busy=set())
    assert task.age_s is None
    assert (new.rows(task.index) == -1).all()
    new.write(task.index, 8, 30)
    new.tasks.save()
    rows = load_file(matrix_file(tmp_path, "model", "news"))["rows"]
    assert rows[7, 0] == -1 and rows[8, 0] == 30


def test_a_task_that_is_open_is_cold_for_a_job_that_wants_it_cold(tmp_path: Path) -> None:
    room = Room(places=3)
    warm = room.tasks.open(TaskKey("news", tmp_path), busy=set())
    room.write(warm.index, 7, 20)
    one = room.tasks.open(cold("news", tmp_path), busy={warm.index})
    assert one.index != warm.index
    assert (room.rows(one.index) == -1).all()
    assert room.tasks.open(cold("news", tmp_path), busy=set()) is one, "one job, one matrix"
    room.write(one.index, 8, 30)
    # Who comes later goes on from what the cold job has left, whoever still reads what was there.
    later = room.tasks.open(TaskKey("news", tmp_path), busy={warm.index})
    assert later.index not in (warm.index, one.index)
    room.write(warm.index, 9, 20)
    room.tasks.save()
    kept = load_file(matrix_file(tmp_path, "model", "news"))["rows"]
    assert (kept[[7, 8, 9], 0] >= 0).tolist() == [False, True, False], "the cold one's alone"
    assert torch.equal(room.rows(later.index), kept)
    assert not room.tasks.can_open(cold("news", tmp_path, "one more"), {0, 1, 2})
    other = room.tasks.open(cold("news", tmp_path, "another job"), busy=set())
    assert (room.rows(other.index) == -1).all()


def test_stores_with_a_task_of_one_name_have_two_matrices(tmp_path: Path) -> None:
    room, folders = Room(), [tmp_path / "one", tmp_path / "two"]
    for first, folder in enumerate(folders):
        task = room.tasks.open(TaskKey("news", folder), busy=set())
        assert (room.rows(task.index) == -1).all()
        room.write(task.index, 7, 20 + first)
    room.tasks.save()
    files = [matrix_file(folder, "model", "news") for folder in folders]
    assert [int(load_file(file)["rows"][7, 0]) for file in files] == [20, 21]


def test_models_and_tasks_never_share_a_file(tmp_path: Path) -> None:
    names = ["a b", "a-b", "a/b", "A b", "", "a" * 200, "a" * 200 + "b", "../a b", "新闻", "新聞"]
    files = {matrix_file(tmp_path, model, name) for model in ("one", "two") for name in names}
    assert len(files) == 2 * len(names)
    for file in files:
        assert file.resolve().is_relative_to(tmp_path.resolve())
        assert len(file.name.encode()) < 128


def test_the_idle_task_unused_for_longest_makes_room_and_is_saved(tmp_path: Path) -> None:
    room = Room(places=2)
    first = room.tasks.open(TaskKey("first", tmp_path), busy=set())
    second = room.tasks.open(TaskKey("second", tmp_path), busy=set())
    room.write(first.index, 7, 20)
    room.write(second.index, 7, 30)
    room.tasks.open(TaskKey("first", tmp_path), busy=set())  # used again
    third = room.tasks.open(TaskKey("third", tmp_path), busy=set())
    assert third.index == second.index
    assert (room.rows(third.index) == -1).all(), "it sees what another task learned"
    assert room.rows(first.index)[7, 0] == 20
    back = room.tasks.open(TaskKey("second", tmp_path), busy={third.index})
    assert back.index == first.index
    assert room.rows(back.index)[7, 0] == 30


def test_a_task_that_runs_is_never_evicted(tmp_path: Path) -> None:
    room = Room(places=2)
    first = room.tasks.open(TaskKey("first", tmp_path), busy=set())
    second = room.tasks.open(TaskKey("second", tmp_path), busy=set())
    third = room.tasks.open(TaskKey("third", tmp_path), busy={first.index})
    assert third.index == second.index
    with pytest.raises(ModelError, match="tasks"):
        room.tasks.open(TaskKey("fourth", tmp_path), busy={0, 1})


@pytest.fixture(scope="module")
def varied_model() -> LoadedModel:
    """Its next token hangs mostly on the last one, and it seldom repeats itself by then."""
    network = tiny.network("llama", vocab_size=997)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
    return from_network(network, tiny.NumberTokenizer(), name="varied")


def forwards(model: LoadedModel, folder: Path, *, cold: bool = False) -> tuple[int, int]:
    """Decode forwards and tokens of some prompts, and their matrix is saved."""
    engine = tiny.engine(model, max_num_seqs=2)
    task = TaskKey("news", folder, "job" if cold else "", cold)
    engine.open_task(task)
    prompts = tiny.prompts(8, seed=21, longest=12)
    done = tiny.decode(
        engine, [tiny.request(i, ids, task=task, max_tokens=24) for i, ids in enumerate(prompts)]
    ).values()
    engine.save_tasks()
    return sum(c.num_spec_steps for c in done), sum(c.completion_tokens for c in done)


def test_a_warm_matrix_is_right_more_often_on_prompts_it_has_seen(
    varied_model, tmp_path: Path
) -> None:
    first, tokens = forwards(varied_model, tmp_path)
    file = matrix_file(tmp_path, varied_model.fingerprint, "news")
    assert (load_file(file)["rows"] >= 0).any()
    warm, warm_tokens = forwards(varied_model, tmp_path)
    cold, cold_tokens = forwards(varied_model, tmp_path, cold=True)
    assert tokens == warm_tokens == cold_tokens == 8 * 24
    assert warm < 0.7 * first, f"{warm} forwards from the warm matrix, {first} from none"
    assert cold == first, "cold took something from the file"


def test_rows_of_more_tasks_than_there_are_matrices_are_all_decoded(model) -> None:
    count = MAX_TASKS + 2
    engine = tiny.engine(model, max_num_seqs=count)
    requests = [tiny.request(i, [5, 6, 7], task=TaskKey(f"task {i}")) for i in range(count)]
    done = tiny.decode(engine, requests)
    assert {c.finish_reason for c in done.values()} == {"length"}
    assert len({tuple(c.token_ids) for c in done.values()}) == 1


def test_a_task_whose_rows_still_wait_keeps_its_folder(model, tmp_path: Path) -> None:
    """A worker opens a task with its folder when a chunk comes, long before its rows run."""
    engine = tiny.engine(model)
    engine.open_task(TaskKey("waits", tmp_path))
    engine.add(tiny.request(0, [5, 6, 7], task=TaskKey("waits", tmp_path)))
    for other in range(MAX_TASKS):
        engine.open_task(TaskKey(f"other {other}", tmp_path))
    tiny.decode(engine, [])
    engine.save_tasks()
    assert matrix_file(tmp_path, model.fingerprint, "waits").is_file()


def test_rows_of_more_tasks_than_have_a_place_wait_for_one(model: LoadedModel) -> None:
    """As a worker adds them, which makes each task ready first."""
    count = MAX_TASKS + 3
    thread = EngineThread(lambda _: tiny.engine(model, max_num_seqs=count, tree_size=4))
    thread.start()
    thread.load(ModelKey("tiny"))
    done: list[str] = []
    try:
        for i, ids in enumerate(tiny.prompts(count, seed=3)):
            row = tiny.request(i, ids, max_tokens=60, task=TaskKey(f"t{i}"))
            thread.add([replace(row, key=("lease", i))])
        while len(done) < count:
            for event in thread.next_events(30.0):
                assert isinstance(event, Ready | Finished), event
                if isinstance(event, Finished):
                    done += [one.finish_reason for one in event.completions]
        assert set(done) == {"length"}
    finally:
        assert thread.stop(10)


def test_a_few_rows_are_drafted_without_the_matrix_and_counted_apart(
    varied_model, tmp_path: Path
) -> None:
    """What the matrix brings is measured beside it, not claimed; what comes out is the same."""

    def decoded(seed: int) -> tuple[list[list[int]], SavedMatrix]:
        engine = tiny.engine(varied_model, max_num_seqs=2)
        task = TaskKey("news", tmp_path)
        engine.open_task(task)
        prompts = tiny.prompts(8, seed=21, longest=12)
        asked = [
            tiny.request(i, ids, task=task, max_tokens=24, seed=seed)
            for i, ids in enumerate(prompts)
        ]
        done = tiny.decode(engine, asked)
        engine.save_tasks()
        file = matrix_file(tmp_path, varied_model.fingerprint, "news")
        return [done[i].token_ids for i in range(8)], matrices.read(file)

    plain, first = decoded(seed=0)
    assert first.facts.with_it.tokens == 8 * 23, "the token of prefill counts for no forward"
    assert first.facts.without_it.forwards == 0
    warm, second = decoded(seed=0)
    alone, third = decoded(seed=31)
    assert plain == warm == alone
    assert third.facts.with_it == second.facts.with_it
    assert third.facts.without_it.tokens == 8 * 23
    gain = second.facts.with_it.forwards - first.facts.with_it.forwards
    assert gain < 0.8 * third.facts.without_it.forwards, "the matrix was read all the same"
