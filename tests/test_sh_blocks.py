"""Every `sh` block of the README and the guides is run, with the stand-ins of sh_recipes.py."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pandas as pd
import pytest
import redis
import s3_server
import sh_blocks
import trustme
from doc_pages import LEFT_OUT, ROOT, Session
from hub_server import Hub
from job_tools import decode, prompts, write_lines
from redis_server import Terminator, redis_server
from sh_blocks import Recipe
from sh_recipes import IDS, RECIPES

from trbatch.config import JobSpec
from trbatch.job import JobFolder

Play = Callable[..., str]


# --- that there is a test for every block ---


def test_every_block_is_run_by_a_test() -> None:
    written = [(page, sh_blocks.first_command(script)) for page, script in sh_blocks.all_blocks()]
    for page, command in written:
        of_it = [one for one in RECIPES.values() if one.page == page]
        keys = [key for one in of_it for key in one.keys if command.startswith(key)]
        assert len(keys) == 1, f"{page} has a block that RECIPES must have once: {command}"
    assert len(written) == sum(len(one.keys) for one in RECIPES.values()), "one is gone"
    for name, recipe in RECIPES.items():
        if recipe.elsewhere:
            text = (ROOT / "tests" / recipe.elsewhere).read_text()
            assert f'"{recipe.keys[0]}"' in text, f"{recipe.elsewhere} does not run {name}"
        else:
            assert callable(globals().get(f"test_{name}")), f"no test runs {name}"


def test_words_that_a_page_has_no_more_are_found() -> None:
    with pytest.raises(AssertionError, match="'URL' is not on the page any more"):
        sh_blocks.replaced("git clone https://example.org/trbatch", {"URL": "{url}"}, {"url": "x"})


def test_a_block_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo begun\nsleep 100 # beside\nfalse\necho not reached"
    monkeypatch.setattr(sh_blocks, "all_blocks", lambda: iter([("page.md", script)]))
    session = Session(tmp_path, tmp_path, clone=False)
    try:
        recipe = Recipe("page.md", ("echo begun",), beside=("sleep",))
        with pytest.raises(AssertionError, match=r"ends with 1:\nbegun\n"):
            sh_blocks.run(recipe, session, {}, {})
    finally:
        session.close()


# --- what they need ---


@contextmanager
def session_at(cache: Path, *, clone: bool = True) -> Iterator[Session]:
    """A shell in a clean clone, or in an empty folder of the same name."""
    home = Path(tempfile.mkdtemp(prefix="trs-", dir="/tmp"))
    session = Session(home, cache, clone=clone)
    try:
        yield session
    finally:
        session.close()
        shutil.rmtree(home)


@pytest.fixture
def session(small_model: Path) -> Iterator[Session]:
    with session_at(small_model.parent.parent) as found:
        yield found


@pytest.fixture
def empty(small_model: Path) -> Iterator[Session]:
    with session_at(small_model.parent.parent, clone=False) as found:
        yield found


@pytest.fixture
def play(request: pytest.FixtureRequest) -> Play:
    """Runs the recipe of the test's own name; what it prints."""
    recipe = RECIPES[request.node.name.removeprefix("test_")]

    def run(session: Session, environment: dict[str, str] | None = None, **places: object) -> str:
        return sh_blocks.run(recipe, session, places, environment or {})

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is decoded in no time, for benchmarks of a real one's hours."""
    from tiny_files import write_model  # it imports torch

    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_model(folder)
    return folder


@pytest.fixture
def tiny_as_default(tiny: Path) -> dict[str, str]:
    """The environment in which it is the model, and what its steps cost is kept beside it."""
    return {"TRBATCH_MODEL": str(tiny), "TRBATCH_CACHE": str(tiny.parent / "cache")}


@pytest.fixture(scope="module")
def pip_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """pip as the user has set it up, with the pinned versions, and one cache for all tests."""
    kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.endswith("_PROXY")}
    python = Path(sys.base_prefix) / "bin"
    return kept | {
        "PATH": f"{python}:{os.environ['PATH']}",
        "PYTHONPATH": "",
        "PIP_CACHE_DIR": str(tmp_path_factory.mktemp("pip")),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_COMPILE": "1",  # most of an installation's time, and next to nothing is imported
        "PIP_QUIET": "1",
    }


def into_new_environment(session: Session, pip: dict[str, str]) -> dict[str, str]:
    """A clone beside a new, empty environment; the variables with which it is the active one."""
    shutil.copytree(
        ROOT, session.folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True
    )
    made = session.folder.parent / "environment"
    venv.create(made, with_pip=True)
    return pip | {"PATH": f"{made}/bin:{pip['PATH']}", "VIRTUAL_ENV": str(made)}


@pytest.fixture(scope="module")
def installed(
    small_model: Path, pip_environment: dict[str, str]
) -> Iterator[tuple[Session, dict[str, str]]]:
    """A clone whose environment the README's own block has filled; torch comes once."""
    with session_at(small_model.parent.parent, clone=False) as session:
        environment = into_new_environment(session, pip_environment)
        sh_blocks.run(RECIPES["readme_pip"], session, {}, environment)
        yield session, environment


@pytest.fixture
def queue_port(tmp_path: Path) -> Iterator[int]:
    """A server with a port and a user of its own, as another host has it."""
    users = "--user trbatch on >PASSWORD ~* &* +@all --user default off"
    with redis_server(tmp_path, *users.split()) as port:
        yield port


def ids_of(path: Path) -> list[str]:
    rows = pd.read_parquet(path)
    assert rows["text"].notna().all() and (rows["completion_tokens"] > 0).all()
    return list(rows["custom_id"])


# --- the blocks ---


@pytest.mark.long
def test_readme_speed(session: Session, play: Play, tiny: Path) -> None:
    printed = play(session, {"TRBATCH_CACHE": str(tiny.parent / "cache")}, tiny=tiny)
    assert [line.split()[0] for line in table(printed, "by_batch")] == ["1", "8", "32"]
    assert (session.folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def table(printed: str, name: str) -> list[str]:
    """The lines of a table of `trbatch bench`, without its header."""
    return printed.partition(f"\n{name}\n")[2].partition("\n\n")[0].splitlines()[1:]


@pytest.mark.long
def test_tuning_speed(session: Session, play: Play, tiny_as_default: dict[str, str]) -> None:
    printed = play(session, tiny_as_default)
    assert [line.split()[0] for line in table(printed, "by_batch")] == ["1", "8", "32"]
    assert (session.folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_performance_speed(session: Session, play: Play, tiny_as_default: dict[str, str]) -> None:
    printed = play(session, tiny_as_default)
    found = json.loads(printed.strip().splitlines()[-1])
    assert [one["batch"] for one in found["by_batch"]] == [1, 8]
    assert len((session.folder / "prompts.jsonl").read_text().splitlines()) == 2000
    assert (session.folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_performance_acceptance(
    session: Session, play: Play, tiny_as_default: dict[str, str]
) -> None:
    printed = play(session, tiny_as_default)
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [(one["train"], one["forget"]) for one in found] == [
        (None, ""), ("rest.jsonl", "rows"), ("rest.jsonl", ""), ("rest.jsonl", "rows"),
    ]  # fmt: skip
    assert [one["temperature"] for one in found] == [0, 0, 0, 0.7]
    sizes = [size for one in found for size in one["by_tree_size"]]
    assert [one["tree_size"] for one in sizes] == [8, 4] * 4
    assert all(one["different_from_plain"] == 0 for one in sizes)
    assert all(one["prompt_count"] == 12 for one in found)


@pytest.mark.long
def test_performance_scripts(session: Session, play: Play, tiny_as_default: dict[str, str]) -> None:
    printed = play(session, tiny_as_default)
    assert sh_blocks.GPU or "steps are captured on a GPU" in printed
    parted, jobs = (
        json.loads((session.folder / name).read_text()) for name in ("parted.json", "jobs.json")
    )
    assert "recycled, batch 2, 4 tokens" in json.dumps(parted)
    assert [one["rows"] for one in jobs["jobs"].values()] == [6, 6, 6]


@pytest.mark.long
def test_readme_pip(installed: tuple[Session, dict[str, str]]) -> None:
    session, environment = installed  # the block was run for this
    code = "import torch, trbatch; print(torch.__version__.partition('+')[0], trbatch.__file__)"
    done = subprocess.run(
        ["python", "-c", code], env=session.environment | environment, cwd=session.folder.parent,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    version, place = done.stdout.split()
    assert f"torch=={version}\n" in (ROOT / "constraints.txt").read_text()
    assert place.startswith(environment["VIRTUAL_ENV"])


@pytest.mark.long
def test_formats_pip(empty: Session, play: Play, pip_environment: dict[str, str]) -> None:
    play(empty, into_new_environment(empty, pip_environment))
    assert json.loads((empty.folder / "preview.json").read_text())["prompt_tokens"] > 10
    frozen = (empty.folder / "frozen").read_text()
    assert "tokenizers==" in frozen and "torch" not in frozen


@pytest.mark.long
def test_quickstart_install(
    empty: Session, play: Play, pip_environment: dict[str, str], tmp_path: Path
) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(ROOT, origin, ignore=shutil.ignore_patterns(*LEFT_OUT))
    git = ["git", "-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "All"]):
        subprocess.run([*git, *arguments], check=True)
    play(empty, pip_environment, url=origin)
    assert ids_of(empty.folder / "answers.parquet") == IDS


def test_formats_push(session: Session, play: Play, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", *prompts(2))
    spec = JobSpec(input=str(path), out=str(tmp_path / "store"), model="org/m", name="night")
    job = JobFolder.submit(spec)
    decode(job, 0)
    with Hub(datasets={"me/answers": {}}).running() as hub:
        printed = play(session, hub.environment, job=job.path)
    assert "pushed to" in printed
    (written,) = Path(job.path).glob("*.parquet")
    assert hub.datasets["me/answers"]["data/night.parquet"] == written.read_bytes()
    assert "README.md" in hub.datasets["me/answers"]


@pytest.mark.long
def test_nightly_cron(
    session: Session, play: Play, bucket: str, s3: s3_server.S3Server, tmp_path: Path
) -> None:
    printed = play(session, s3.environment, bucket=bucket)
    assert '"event":"submitted"' in printed.replace(" ", ""), "lines that programs read"
    fsspec.filesystem("s3").get(f"{bucket}/answers.parquet", str(tmp_path / "answers.parquet"))
    rows = pd.read_parquet(tmp_path / "answers.parquet")
    assert list(rows["custom_id"]) == [*IDS, "bad"]
    assert list(rows["text"].notna()) == [True, True, True, False], "one bad row costs no other"


def test_security_acl(session: Session, play: Play, tmp_path: Path) -> None:
    secret = {"client": secrets.token_hex(24), "worker": secrets.token_hex(24)}
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    front = Terminator(context, 0)
    rules = tmp_path / "users.acl"
    printed: list[str] = []
    with front.running():
        # The block writes the rules, then the server begins, then a worker's user asks it.
        asked = threading.Thread(
            target=lambda: printed.append(play(session, folder=tmp_path, port=front.port, **secret))
        )
        asked.start()
        try:
            wait_for_file(session.folder / "written", asked)
            with redis_server(tmp_path, "--aclfile", str(rules)) as port:
                front.target = port
                (session.folder / "started").touch()
                asked.join(60)
                url = f"redis://trbatch-client:{secret['client']}@127.0.0.1:{port}/0"
                with redis.Redis.from_url(url) as client:
                    assert client.exists("rq:queues") == 0, "let in, and an empty queue"
        finally:
            (session.folder / "started").touch()
            asked.join(60)
    assert rules.stat().st_mode & 0o777 == 0o600
    (said,) = printed
    assert f"rediss://trbatch-worker:***@localhost:{front.port}/0" in said
    assert secret["worker"] not in said


def wait_for_file(path: Path, asked: threading.Thread) -> None:
    while not path.exists():
        assert asked.is_alive(), "the block failed"
        asked.join(0.05)


def went_through(session: Session, bucket: str) -> None:
    """The job `nightly` lies in the bucket, and its answers are here."""
    assert ids_of(session.folder / "answers.parquet") == IDS
    assert fsspec.filesystem("s3").exists(f"{bucket}/trbatch/nightly/manifest.json")


@pytest.mark.long
def test_storage_hosts(
    installed: tuple[Session, dict[str, str]], play: Play,
    bucket: str, s3: s3_server.S3Server, queue_port: int,
) -> None:  # fmt: skip
    session, environment = installed
    shown = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    own = {k: v for k, v in s3.environment.items() if k not in (*shown, "AWS_ENDPOINT_URL")}
    credentials = " ".join(f"{name}={s3.environment[name]}" for name in shown)
    play(
        session, environment | own,
        bucket=bucket, port=queue_port, s3=s3.url, credentials=credentials,
    )  # fmt: skip
    went_through(session, bucket)


@pytest.mark.long
def test_workers_many_machines(
    installed: tuple[Session, dict[str, str]], play: Play,
    bucket: str, s3: s3_server.S3Server, queue_port: int,
) -> None:  # fmt: skip
    session, environment = installed
    play(session, environment | s3.environment, bucket=bucket, port=queue_port)
    went_through(session, bucket)


@pytest.mark.long
def test_workers_one_machine(session: Session, play: Play) -> None:
    play(session)
    assert ids_of(session.folder / "answers.parquet") == IDS
    ends = [path.read_text() for path in session.folder.glob("terminal-*")]
    assert len(ends) == 3 and all("tokens in" in end for end in ends)
