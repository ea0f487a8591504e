"""`trbatch matrix`: what saved matrices say of themselves, moved about and forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from trbatch import matrices
from trbatch.cli import commands
from trbatch.engine import saved
from trbatch.engine.sequence import TaskKey
from trbatch.errors import InputError, UsageError
from trbatch.lease import LeaseWorker
from trbatch.matrices import Acceptance, Facts, matrix_file
from trbatch.matrix_stream import MatrixStream, connect, stream_key
from trbatch.queue import JobQueue

TREE = [([0], 0.5), ([0, 0], 0.3), ([1], 0.1)]


def facts(task: str = "mails", model: str = "f00d", **values) -> Facts:
    return Facts(
        task=task, model=model, model_name="small", rows=3, pairs=2, candidates=8, tree=TREE,
        **values,
    )  # fmt: skip


def put(store: Path, *, value: int = 7, anew: bool = False, **values) -> Path:
    made = facts(**values)
    file = matrix_file(store / "matrices", made.model, made.task)
    parts = {
        "rows": torch.full((4, 8), value, dtype=torch.int32),
        "pair_keys": torch.full((2,), -2), "pair_rows": torch.full((2, 8), -1, dtype=torch.int32),
    }  # fmt: skip
    saved.save(file, parts, made, anew=anew)
    return file


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(commands, ["matrix", *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_list_shows_every_task_and_reads_no_rows(store: Path) -> None:
    put(store, with_it=Acceptance(300, 100), without_it=Acceptance(20, 10))
    file = put(store, task="news", model="beef")
    with file.open("r+b") as stream:  # the rows are gone, the header is whole
        stream.truncate(file.stat().st_size - 64)
    text = run("list", "--store", store)
    assert "mails" in text and "3.00" in text and "2.00" in text
    assert "news" in text
    listed = json.loads(run("list", "--store", store, "--json"))
    assert [(one["task"], one["fingerprint"]) for one in listed] == [
        ("mails", "f00d"), ("news", "beef"),
    ]  # fmt: skip
    assert listed[0]["acceptance_with_it"] == 3.0
    assert listed[0]["acceptance_without_it"] == 2.0
    assert listed[1]["acceptance_with_it"] is None
    assert listed[0]["rows"] == 3 and listed[0]["pairs"] == 2
    assert listed[0]["bytes"] == matrix_file(store / "matrices", "f00d", "mails").stat().st_size


def test_an_empty_store_says_what_fills_it(store: Path) -> None:
    assert "first job" in run("list", "--store", store)
    assert json.loads(run("list", "--store", store, "--json")) == []


@pytest.mark.parametrize(
    "damage", [b"", b"\x00" * 4, b"\xff" * 99, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"]
)
def test_a_damaged_file_is_named_and_the_others_are_listed(
    store: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(store)
    broken = store / "matrices" / "f00d" / "broken.safetensors"
    broken.write_bytes(damage)
    found = matrices.all_in(store / "matrices")
    assert [one.facts.task for one in found] == ["mails"]
    assert str(broken) in caplog.text
    with pytest.raises(InputError, match=r"broken\.safetensors"):
        matrices.read(broken)


def test_show_draws_the_learned_tree(store: Path) -> None:
    put(store)
    text = run("show", "mails", "--store", store)
    lines = [line.rstrip() for line in text.splitlines() if "rank" in line]
    assert [line.split("rank ")[1] for line in lines] == ["0  50.0%", "0  30.0%", "1  10.0%"]
    assert lines[1].index("rank") > lines[0].index("rank"), "the child stands under its parent"
    assert run("show", "mails", "--store", store, "--nodes", "1").count("rank") == 1
    tree = json.loads(run("show", "mails", "--store", store, "--json"))["tree"]
    assert tree == [{"path": path, "chance": chance} for path, chance in TREE]


def test_an_unknown_task_is_an_error_that_names_the_known(store: Path) -> None:
    put(store)
    with pytest.raises(UsageError) as caught:
        matrices.find(store / "matrices", "mail")
    assert "mails" in str(caught.value.hint)


def test_a_task_of_two_models_needs_a_choice(store: Path) -> None:
    put(store)
    put(store, model="beef")
    with pytest.raises(UsageError) as caught:
        matrices.find(store / "matrices", "mails")
    assert "--model" in str(caught.value.hint)
    assert matrices.find(store / "matrices", "mails", "be").facts.model == "beef"


def test_what_is_exported_can_be_imported_under_another_name(store: Path, tmp_path: Path) -> None:
    file = put(store, with_it=Acceptance(300, 100), position="5-1")
    target = tmp_path / "m.safetensors"
    assert run("export", "mails", "--store", store, "-o", target).strip() == str(target)
    assert target.read_bytes() == file.read_bytes()
    other = tmp_path / "other"
    made = Path(run("import", target, "--task", "letters", "--store", other).strip())
    assert made == matrix_file(other / "matrices", "f00d", "letters")
    assert torch.equal(load_file(made)["rows"], load_file(file)["rows"])
    read = matrices.read(made).facts
    assert (read.task, read.position, read.with_it) == ("letters", "", Acceptance(300, 100))
    assert read.tree == TREE


def test_nothing_is_overwritten_unless_asked(store: Path, tmp_path: Path) -> None:
    put(store)
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"precious")
    refused = run("export", "mails", "--store", store, "-o", target, code=2)
    assert f"{target} is there already" in refused and "--force" in refused
    assert target.read_bytes() == b"precious"
    exported = tmp_path / "e.safetensors"
    run("export", "mails", "--store", store, "-o", exported)
    put(store, value=9)
    assert "is there already" in run("import", exported, "--store", store, code=2)
    file = matrix_file(store / "matrices", "f00d", "mails")
    assert load_file(file)["rows"][0, 0] == 9
    run("import", exported, "--store", store, "--force")
    assert load_file(file)["rows"][0, 0] == 7


def test_another_kind_of_file_is_not_imported(store: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file({"rows": torch.zeros(2, 2)}, weights)
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        matrices.import_file(weights, store / "matrices")


def test_reset_forgets_the_file_and_leaves_other_tasks(store: Path) -> None:
    file, other = put(store), put(store, task="news")
    assert "5 rows" in run("reset", "mails", "--store", store)
    assert not file.exists() and other.exists()


def test_nothing_is_forgotten_under_a_worker_that_would_write_it_again(
    store: Path, redis_url: str
) -> None:
    file = put(store)
    with JobQueue.connect(redis_url) as jobs:
        worker = LeaseWorker(jobs.connection, "busy-worker", [])
        worker.open()
        refused = run("reset", "mails", "--store", store, "--redis-url", redis_url, code=2)
        assert "busy-worker" in refused and "--force" in refused
        assert file.exists()
        run("reset", "mails", "--store", store, "--redis-url", redis_url, "--force")
        worker.close()
    assert not file.exists()


def test_reset_forgets_what_workers_share_too(store: Path, redis_url: str) -> None:
    put(store)
    with JobQueue.connect(redis_url) as jobs:
        key = stream_key("f00d", TaskKey("mails", store / "matrices"))
        connection = connect(jobs)
        MatrixStream(connection, key).join(b"rows")
        assert connection.exists(f"{key}:snapshot")
        run("reset", "mails", "--store", store, "--redis-url", redis_url)
        assert connection.keys(f"{key}*") == [f"{key}:forgotten".encode()]
        connection.close()


def test_a_later_state_of_the_same_stream_is_never_replaced(store: Path) -> None:
    file = put(store, value=2, position="20-0", with_it=Acceptance(10, 5))
    for position, value in (("9-0", 1), ("19-7", 1), ("20-0", 3), ("100-0", 4), ("", 5)):
        put(store, value=value, position=position, with_it=Acceptance(10, 5))
        kept = int(load_file(file)["rows"][0, 0])
        assert kept == (2 if value == 1 else value), f"position {position!r}"
    # Those that were written counted on from what the file held, the others did not count.
    assert matrices.read(file).facts.with_it == Acceptance(40, 20)


def test_what_was_counted_long_ago_counts_less_and_cold_forgets_it(store: Path) -> None:
    many = Acceptance(150_000, 75_000)
    file = put(store, with_it=many, without_it=Acceptance(8, 8))
    put(store, with_it=many)
    read = matrices.read(file).facts
    assert read.with_it == Acceptance(150_000, 75_000)
    assert read.without_it == Acceptance(4, 4)
    put(store, anew=True, with_it=Acceptance(2, 1))
    assert matrices.read(file).facts.with_it == Acceptance(2, 1)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 minute"), (7200, "2 hours"), (200_000, "2 days")],
)
def test_ages_are_told_in_their_largest_unit(seconds: float, words: str) -> None:
    assert matrices.describe_age(seconds) == words


def test_nothing_is_imported_that_is_cut_short_or_lacks_a_part(store: Path, tmp_path: Path) -> None:
    whole = put(store).read_bytes()
    cut, part = tmp_path / "cut.safetensors", tmp_path / "part.safetensors"
    cut.write_bytes(whole[:-8])
    save_file({"rows": torch.zeros(4, 8)}, part, metadata=facts().to_metadata())
    for file, words in ((cut, "bytes where"), (part, "no pair_keys, pair_rows")):
        with pytest.raises(InputError, match=words) as caught:
            matrices.import_file(file, store / "matrices", task="other")
        assert str(file) in str(caught.value)
    assert len(matrices.all_in(store / "matrices")) == 1


@pytest.mark.parametrize("model", ["../../outside", "/tmp/outside", "..", ""])
def test_an_imported_file_names_no_place_outside_the_store(
    store: Path, tmp_path: Path, model: str
) -> None:
    file = tmp_path / "evil.safetensors"
    put(store).rename(file)
    parts, said = load_file(file), facts(model=model)
    save_file(parts, file, metadata=said.to_metadata())
    with pytest.raises(InputError, match="fingerprint"):
        matrices.import_file(file, store / "matrices")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.safetensors", "store"]


@pytest.mark.parametrize(
    "change", [{"rows": "many"}, {"rows": True}, {"task": 3}, {"cold_jobs": "job"}, {"with_it": 1}]
)
def test_facts_of_another_type_are_none(store: Path, change: dict, caplog) -> None:
    put(store, task="good")
    bad = put(store, task="bad")
    said = json.loads(facts(task="bad").to_metadata()[matrices.METADATA]) | change
    save_file(load_file(bad), bad, metadata={matrices.METADATA: json.dumps(said)})
    assert [one.facts.task for one in matrices.all_in(store / "matrices")] == ["good"]
    assert str(bad) in caplog.text


def test_a_position_of_another_life_says_nothing_of_which_state_is_later(store: Path) -> None:
    file = put(store, position="9999999999999-0/aaaa")
    put(store, value=1, position="5-0/aaaa")
    assert load_file(file)["rows"][0, 0] == 7, "an earlier state of the same stream"
    put(store, value=2, position="5-0/bbbb")
    assert load_file(file)["rows"][0, 0] == 2


@pytest.mark.parametrize("spelled", ["~/st", "file://{home}/st", "{home}/x/../st"])
def test_one_store_is_one_stream_however_it_is_spelled(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = stream_key("m", TaskKey("t", tmp_path / "st" / "matrices"))
    other = matrices.below(spelled.format(home=tmp_path), "matrices")
    assert stream_key("m", TaskKey("t", other)) == usual
