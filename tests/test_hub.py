"""`collect --push hf://…` with the real client of the hub, against a stand-in of its HTTP API."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hub_server import Hub
from job_tools import decode, prompts, write_lines

from trbatch import card
from trbatch.config import JobSpec
from trbatch.job import JobFolder
from trbatch.masking import mask_text, mask_url

ROOT = Path(__file__).parent.parent
URL = "hf://datasets/me/answers"
DATA = "data/night.parquet"
BEFORE = {".gitattributes": b"*.parquet filter=lfs\n"}
ROWS = ({"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}, {"id": "c"})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(datasets={"me/answers": dict(BEFORE)}).running() as found:
        yield found


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    path = write_lines(tmp_path / "in.jsonl", *ROWS)
    spec = JobSpec(input=str(path), out=str(tmp_path / "store"), model="org/m", name="night")
    made = JobFolder.submit(spec)
    decode(made, 0)
    return made


class Pushing:
    """`trbatch collect --push`, each in a process: the client reads its environment only once."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub = hub
        self.output = folder / "out.parquet"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.environment = os.environ | hub.environment
        self.environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf")}
        self.environment["TMPDIR"] = str(self.temporary)

    def __call__(
        self, job: JobFolder, *flags: str, url: str = URL, token: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = dict(self.environment)
        if token is not None:
            environment["HF_TOKEN"] = token
        command = [sys.executable, "-m", "trbatch", "collect", job.path, "--push", url]
        done = subprocess.run(
            [*command, "-o", str(self.output), *flags],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert self.hub.token not in done.stdout + done.stderr
        assert not list(self.temporary.iterdir()), "a copy of the dataset stays behind"
        return done


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Pushing:
    return Pushing(hub, tmp_path)


def test_a_dataset_arrives_whole_with_its_card(hub: Hub, job: JobFolder, push: Pushing) -> None:
    done = push(job)
    assert done.returncode == 3, done.stderr  # one row is bad
    assert done.stderr == "", "neither a bar nor a warning"
    assert f"pushed to               {URL}/{DATA}\n" in done.stdout
    files = hub.datasets["me/answers"]
    assert set(files) == {*BEFORE, DATA, card.NAME}
    assert files[DATA] == push.output.read_bytes()
    assert pd.read_parquet(io.BytesIO(files[DATA]))["custom_id"].tolist() == ["a", "b", "c"]
    text = files[card.NAME].decode()
    assert card.is_ours(text) and f"`{DATA}`" in text
    (config,) = yaml.safe_load(text.split("---\n", 2)[1])["configs"]
    assert config["data_files"] == [{"split": "train", "path": "data/*.parquet"}]


@pytest.mark.long
def test_a_second_push_of_the_same_changes_nothing(hub: Hub, job: JobFolder, push: Pushing) -> None:
    assert push(job).returncode == 3
    before = dict(hub.datasets["me/answers"])
    done = push(job, "--json")
    told = json.loads(done.stdout)
    assert (told["pushed"], told["card"]) == (f"{URL}/{DATA}", f"{URL}/{card.NAME}")
    assert hub.datasets["me/answers"] == before
    assert len([path for verb, path in hub.requests if verb == "PUT"]) == 1, "sent once"


@pytest.mark.long
def test_jobs_add_up_to_one_dataset(
    hub: Hub, job: JobFolder, push: Pushing, tmp_path: Path
) -> None:
    push(job)
    path = write_lines(tmp_path / "more.jsonl", *prompts(2))
    spec = JobSpec(input=str(path), out=str(tmp_path / "store"), model="org/m", name="next")
    second = JobFolder.submit(spec)
    decode(second, 0)
    assert push(second).returncode == 0
    files = hub.datasets["me/answers"]
    assert set(files) == {*BEFORE, DATA, "data/next.parquet", card.NAME}
    assert "`data/next.parquet`" in files[card.NAME].decode()


def test_the_hubs_own_card_stays(hub: Hub, job: JobFolder, push: Pushing) -> None:
    hub.datasets["me/answers"][card.NAME] = b"# Mine\n"
    done = push(job, "--json", url=f"{URL}/")
    told = json.loads(done.stdout)
    assert (told["pushed"], told["card"]) == (f"{URL}/{DATA}", "")
    assert hub.datasets["me/answers"][card.NAME] == b"# Mine\n"
    assert "stays as it is" in done.stderr


ABSENT = "the hub has no such dataset or revision, or none for this token"
LET_IN = "set HF_TOKEN to a token that may write there"


@pytest.mark.parametrize(
    ("url", "token", "faults", "said", "cure"),
    [
        (URL, "hf_wrong", {}, "401, Invalid credentials in Authorization header", LET_IN),
        (URL, "hf_reader", {}, "403, this token may only read", LET_IN),
        (URL, "", {}, ABSENT, LET_IN),
        ("hf://datasets/me/nothing", None, {}, ABSENT, "hf repos create NAME/DATASET"),
        (f"{URL}@v2", None, {}, ABSENT, "hf repos create NAME/DATASET"),
        (URL, None, {"commit": 500}, "500, Internal Server Error", "the same command pushes it"),
        (URL, None, {"answers": 502}, "502, Bad Gateway", "the same command pushes it"),
    ],
    ids="token reader nobody absent revision commit hub".split(),
)
def test_a_push_that_fails_says_what_to_do_and_loses_nothing(
    hub: Hub, job: JobFolder, push: Pushing,
    url: str, token: str | None, faults: dict[str, int], said: str, cure: str,
) -> None:  # fmt: skip
    hub.faults = faults
    done = push(job, url=url, token=token)
    assert done.returncode == 75
    error, hint = done.stderr.splitlines()
    unread = token == "hf_wrong" or "answers" in faults  # what lies there is looked at first
    asked = f"cannot read {url}/{card.NAME}" if unread else f"cannot write {url}/{DATA}"
    assert error == f"error: {asked}: {said}"
    assert hint.startswith("hint: ") and cure in hint
    assert f"the dataset is whole in {push.output}" in hint
    assert pd.read_parquet(push.output)["custom_id"].tolist() == ["a", "b", "c"]
    assert hub.datasets == {"me/answers": BEFORE}
    hub.faults = {}
    assert push(job).returncode == 3, "the same command, once the cause is gone"
    assert hub.datasets["me/answers"][DATA] == push.output.read_bytes()


@pytest.mark.long
def test_a_card_that_fails_leaves_the_data_that_arrived(
    hub: Hub, job: JobFolder, push: Pushing
) -> None:
    hub.faults = {"validate-yaml": 500}
    done = push(job)
    assert done.returncode == 75 and f"cannot write {URL}/{card.NAME}: 500" in done.stderr
    assert hub.datasets["me/answers"][DATA] == push.output.read_bytes()
    hub.faults = {}
    assert push(job).returncode == 3
    assert card.NAME in hub.datasets["me/answers"]


@pytest.mark.long
def test_a_hub_that_is_busy_for_a_moment_is_asked_again(
    hub: Hub, job: JobFolder, push: Pushing
) -> None:
    hub.faults = {"batch": 503}
    hub.passing = 2
    done = push(job)
    assert done.returncode == 3, done.stderr
    assert hub.datasets["me/answers"][DATA] == push.output.read_bytes()


def test_a_hub_that_is_away_is_told(job: JobFolder, push: Pushing) -> None:
    push.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # where nobody listens
    done = push(job)
    assert done.returncode == 75
    assert "Connection refused" in done.stderr
    assert f"the dataset is whole in {push.output}" in done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "me/answers", f"{URL}/data/train.parquet", "hf://datasets/me", "hf://datasets", "hf://me/m",
        "hf://datasets/me@v2/answers",
    ],
)  # fmt: skip
def test_what_names_no_dataset_is_refused_before_anything_is_collected(
    hub: Hub, job: JobFolder, push: Pushing, url: str
) -> None:
    done = push(job, url=url)
    assert done.returncode == 2
    assert "hint: " in done.stderr
    assert not push.output.exists() and not hub.requests


def test_only_parquet_and_only_a_complete_dataset_is_pushed(
    hub: Hub, job: JobFolder, push: Pushing, tmp_path: Path
) -> None:
    push.output = tmp_path / "out"
    assert push(job, "--format", "jsonl").returncode == 2
    path = write_lines(tmp_path / "more.jsonl", *prompts(3))
    spec = JobSpec(input=str(path), out=str(tmp_path / "store"), model="m", name="unfinished")
    done = push(JobFolder.submit(spec))
    assert "not pushed: the dataset is not complete" in done.stderr
    assert not hub.requests and hub.datasets == {"me/answers": BEFORE}


def test_a_revision_is_no_password() -> None:
    pushed = f"{URL}@refs/pr/1/{DATA}"
    assert mask_url(pushed) == pushed
    assert mask_text(f"pushed to {pushed}") == f"pushed to {pushed}"
    assert mask_url("hf://me:secret@hub.example/x") == "hf://me:***@hub.example/x"
    for told in (f"{pushed}/data?password=secret", "hf://user/secret@datasets/me/x"):
        assert "secret" not in mask_url(told)
