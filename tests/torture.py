"""Torture: workers and the server are killed, stopped and cut off at random, and no row may suffer.

    python tests/torture.py --seconds 60 --seed 1

Three supervised workers with a tiny model decode a job while a seeded hand does its worst. At the
end every row must be there exactly once and say what an undisturbed run says, none of them poison,
and the receipt must say so. What happened is printed as a table and as a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import redis

from trbatch import server
from trbatch.config import JobSpec, SamplingParams
from trbatch.errors import TrbatchError
from trbatch.job import JobFolder
from trbatch.lease import LEASE_S
from trbatch.queue import JobQueue
from trbatch.results import collect

MODEL = "maker/tiny"
WORKER = Path(__file__).with_name("torture_worker.py")
ROOT = Path(__file__).parent.parent
WORKERS = 3
ROWS_A_SECOND = 8.4  # 5,000 rows in ten minutes
STEP_S = 0.15  # of an engine under torture, so that rows take as long as it lasts
BREAKS_S = (1.0, 5.0)  # between two deeds, at least and at most
CALM_S = 240.0  # for what is left when the hand has let go


class Worker:
    """A supervisor and its child, started again by whoever kills the supervisor."""

    def __init__(self, number: int, url: str, folder: Path, step_s: float = STEP_S) -> None:
        self.number, self.url, self.step_s = number, url, step_s
        self.log = folder / f"worker-{number}.log"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        surroundings = {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRBATCH_REDIS_URL": self.url,
            "TORTURE_STEP_S": str(self.step_s), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, str(WORKER), "worker", f"--name=w{self.number}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*command, "--publish-seconds=1", "--grace=5"],
                stdin=subprocess.DEVNULL, stderr=log, env=os.environ | surroundings,
            )  # fmt: skip

    def child(self) -> int:
        """Pid of the process that decodes; 0 while there is none."""
        pid = self.process.pid
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return 0

    def kill_supervisor(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def stop(self) -> int:
        """End it as an operator would. Returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


# What can be done, and for how many seconds, at least and at most.
WORKER_KILLED = "kill -9 of a worker"
SUPERVISOR_KILLED = "kill -9 of a supervisor"
SERVER_KILLED = "kill -9 of the server, for a moment"
SERVER_AWAY = "kill -9 of the server, for longer than a lease"
WORKER_STOPPED = "SIGSTOP for longer than a lease"
DISK_FULL = "full disk"
CUT_OFF = "all connections cut"
KINDS = {
    WORKER_KILLED: (0.0, 0.0),
    SUPERVISOR_KILLED: (0.0, 0.0),
    SERVER_KILLED: (0.0, 3.0),
    SERVER_AWAY: (LEASE_S + 3.0, LEASE_S + 6.0),
    WORKER_STOPPED: (LEASE_S + 2.0, LEASE_S + 6.0),
    DISK_FULL: (2.0, 6.0),
    CUT_OFF: (0.0, 0.0),
}
MORE = [WORKER_KILLED] * 4 + [SUPERVISOR_KILLED, WORKER_STOPPED, CUT_OFF]
DECK_S = 120.0  # a deck is done in about half of it on an idle machine


@dataclass(frozen=True)
class Deed:
    """One thing to do, and for how long."""

    kind: str
    seconds: float


def deck_of(chance: random.Random) -> list[Deed]:
    """What is done in about a minute: first one of each kind, then some more."""
    kinds = [*chance.sample(list(KINDS), len(KINDS)), *chance.sample(MORE, len(MORE))]
    return [Deed(kind, chance.uniform(*KINDS[kind])) for kind in kinds]


@dataclass
class Hand:
    """What does the harm: one thing every few seconds, and what undoes it later.

    The same seed does the same things in the same order; whom they hit depends on who is busy then.
    What finds nobody to hit is tried again.
    """

    chance: random.Random
    aim: random.Random
    workers: list[Worker]
    url: str
    done: Counter[str] = field(default_factory=Counter)
    deck: list[Deed] = field(default_factory=list)
    later: list[tuple[float, Callable[[], Any]]] = field(default_factory=list)

    def act(self) -> None:
        """Do one thing."""
        self.deck = self.deck or deck_of(self.chance)
        deed = self.deck[0]
        do = {
            WORKER_KILLED: self.kill_worker, SUPERVISOR_KILLED: self.kill_supervisor,
            SERVER_KILLED: self.kill_server, SERVER_AWAY: self.kill_server,
            WORKER_STOPPED: self.stop_worker, DISK_FULL: self.fill_disk,
            CUT_OFF: self.cut_connections,
        }  # fmt: skip
        if do[deed.kind](deed.seconds):
            self.done[deed.kind] += 1
            del self.deck[0]

    @property
    def owes(self) -> bool:
        """Whether a kind of harm has not been done yet."""
        return any(not self.done[kind] for kind in KINDS)

    def undo(self, *, all_of_it: bool = False) -> None:
        """Undo what is due."""
        now = time.monotonic()
        due = [deed for when, deed in self.later if all_of_it or when <= now]
        self.later = [] if all_of_it else [one for one in self.later if one[0] > now]
        for deed in due:
            deed()

    def victim(self) -> int:
        """Pid of a worker, of one with chunks in flight if there is any; 0 if none lives."""
        pids = [pid for worker in self.workers if (pid := worker.child())]
        with contextlib.suppress(TrbatchError), JobQueue.connect(self.url) as jobs:
            busy = [one.pid for one in jobs.workers() if one.chunks and one.pid in pids]
            pids = busy or pids
        return self.aim.choice(sorted(pids)) if pids else 0

    def kill_worker(self, seconds: float) -> bool:
        return self._signal(self.victim(), signal.SIGKILL)

    def kill_supervisor(self, seconds: float) -> bool:
        self.aim.choice(self.workers).kill_supervisor()
        return True

    def kill_server(self, seconds: float) -> bool:
        pid = server.status().pid
        if pid:
            os.kill(pid, signal.SIGKILL)
            self.done["seconds without a server"] += round(seconds)
            time.sleep(seconds)
        server.ensure()
        return bool(pid)

    def stop_worker(self, seconds: float) -> bool:
        pid = self.victim()
        self.later.append((time.monotonic() + seconds, lambda: self._signal(pid, signal.SIGCONT)))
        return self._signal(pid, signal.SIGSTOP)

    def fill_disk(self, seconds: float) -> bool:
        """By a limit on the size of files: every write fails."""
        pid = self.victim()
        unlimited = resource.RLIM_INFINITY
        self.later.append((time.monotonic() + seconds, lambda: self._limit(pid, unlimited)))
        return self._limit(pid, 0)

    def cut_connections(self, seconds: float) -> bool:
        with contextlib.suppress(redis.RedisError), redis.Redis.from_url(self.url) as connection:
            return bool(connection.client_kill_filter(_type="normal", skipme=True))
        return False

    def _signal(self, pid: int, number: int) -> bool:
        if not pid:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def _limit(self, pid: int, size: int) -> bool:
        if not pid:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
            return True
        return False


def write_prompts(file: Path, rows: int, chance: random.Random) -> None:
    """Prompts of random tokens; every fourth row is sampled, with its own temperature."""
    with file.open("w") as lines:
        for number in range(rows):
            ids = [chance.randrange(3, 97) for _ in range(chance.randrange(1, 24))]
            row: dict[str, Any] = {"id": f"r{number}", "prompt": " ".join(map(str, ids))}
            row["max_tokens"] = chance.randrange(8, 40)
            if number % 4 == 0:
                row |= {"temperature": 0.8, "seed": number}
            lines.write(json.dumps(row) + "\n")


def submit(jobs: JobQueue, file: Path, name: str) -> JobFolder:
    spec = JobSpec(
        input=str(file), name=name, model=MODEL, chunk_size=16, seed=0,
        out=str(file.parent / "store"), sampling=SamplingParams(ignore_eos=True),
    )  # fmt: skip
    job = JobFolder.submit(spec)
    jobs.enqueue(job, job.missing_chunks())
    return job


def decode_undisturbed(jobs: JobQueue, file: Path, folder: Path, url: str) -> dict[str, str]:
    """What each row says when nobody disturbs."""
    job = submit(jobs, file, "calm")
    worker = Worker(0, url, folder, step_s=0.0)
    wait_until_complete(job, url, 1200.0)
    assert worker.stop() == 143
    return texts_of(job, folder / "calm.parquet")


def texts_of(job: JobFolder, output: Path) -> dict[str, str]:
    receipt = collect(JobFolder.open(job.path), str(output))
    assert receipt.complete, str(receipt)
    table = pq.read_table(output)
    return dict(zip(table["custom_id"].to_pylist(), table["text"].to_pylist(), strict=True))


def wait_until_complete(job: JobFolder, url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not job.progress().complete:
        assert time.monotonic() < deadline, f"not complete after {seconds:.0f} s more"
        with JobQueue.connect(url) as jobs:
            failures = jobs.failures(job)
        assert not failures, f"{len(failures)} chunks failed: {set(failures.values())}"
        time.sleep(0.2)


def wait_until_all_decode(job: JobFolder) -> None:
    deadline = time.monotonic() + CALM_S
    files = Path(job.path) / "segments"
    while len({file.name.partition("-")[0] for file in files.glob("*.parquet")}) < WORKERS:
        assert time.monotonic() < deadline and not job.progress().complete, "they do not start"
        time.sleep(0.1)


def torture(seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """One whole run. Returns what happened.

    Args:
        seconds: of torture; a row for about every eighth of them.
        seed: of the prompts and of the harm.
        folder: for everything; its home of trbatch is the environment's.
    """
    chance = random.Random(seed)
    rows = max(int(seconds * ROWS_A_SECOND), 64)
    file = folder / "prompts.jsonl"
    write_prompts(file, rows, chance)
    url = server.ensure()
    with JobQueue.connect(url) as jobs:
        expected = decode_undisturbed(jobs, file, folder, url)
        job = submit(jobs, file, "torture")
    workers = [Worker(number, url, folder) for number in range(1, WORKERS + 1)]
    hand = Hand(random.Random(seed), random.Random(seed), workers, url)
    wait_until_all_decode(job)
    begin = time.monotonic()
    while time.monotonic() - begin < seconds or hand.owes:
        if job.progress().complete:
            break
        time.sleep(chance.uniform(*BREAKS_S))
        hand.undo()
        hand.act()
    tortured_s = time.monotonic() - begin
    hand.undo(all_of_it=True)
    let_go = time.monotonic()
    wait_until_complete(job, url, CALM_S + seconds)
    drained_s = time.monotonic() - let_go
    codes = [worker.stop() for worker in workers]
    found = texts_of(job, folder / "torture.parquet")
    happened = {"seconds of torture": round(tortured_s), "seconds until done": round(drained_s)}
    return happened | hand.done | report(job, folder, expected, found) | {
        "exit codes": codes, "seed": seed,
    }  # fmt: skip


def report(
    job: JobFolder, folder: Path, expected: dict[str, str], found: dict[str, str]
) -> dict[str, Any]:
    """What became of the rows, and what it took."""
    receipt = collect(JobFolder.open(job.path), str(folder / "torture.parquet"))
    table = pq.read_table(folder / "torture.parquet")
    attempts = table["attempts"].to_pylist()
    words = "".join(file.read_text() for file in folder.glob("worker-*.log"))
    errors = [code for code in table["error_code"].to_pylist() if code]
    return {
        "rows": len(expected),
        "rows equal to the undisturbed run": sum(found[i] == expected[i] for i in expected),
        "error rows": len(errors),
        "of these poison": errors.count("poison"),
        "duplicates left out": receipt.duplicates,
        "most attempts of a row": max(attempts),
        "mean attempts of a row": round(statistics.mean(attempts), 2),
        "workers that had to be replaced": words.count("died:"),
        "tracebacks in the workers' logs": words.count("Traceback"),
        "receipt": str(receipt),
    }


def check(result: dict[str, Any], seconds: float) -> None:
    """What must be true after any torture of so many seconds; that it was one is a part of it."""
    least = max(1, int(seconds / DECK_S))
    missing = {kind: result.get(kind, 0) for kind in KINDS if result.get(kind, 0) < least}
    assert not missing, f"at least {least} of each kind of harm: {missing}"
    assert result["workers that had to be replaced"] >= least, result
    assert result["rows equal to the undisturbed run"] == result["rows"], result
    assert result["error rows"] == result["of these poison"] == 0, result
    assert result["receipt"].startswith("complete:"), result
    assert set(result["exit codes"]) == {143}, result
    assert result["tracebacks in the workers' logs"] == 0, result


@click.command()
@click.option("--seconds", default=60.0, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--keep", is_flag=True, help="Leave the folder with jobs and logs.")
def main(seconds: float, seed: int, keep: bool) -> None:
    """Torture workers and server, and check that nothing is lost."""
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir="/tmp"))
    os.environ["TRBATCH_HOME"] = str(folder / "home")
    for name in ("TRBATCH_REDIS_URL", "REDIS_URL", "TRBATCH_STORE", "TRBATCH_MODEL"):
        os.environ.pop(name, None)
    passed = False
    try:
        result = torture(seconds, seed, folder)
        for name, value in result.items():
            click.echo(f"{name:36} {value}")
        click.echo(json.dumps(result))
        check(result, seconds)
        passed = True
    finally:
        with contextlib.suppress(TrbatchError):
            server.stop()
        if passed and not keep:
            shutil.rmtree(folder)
        else:
            click.echo(f"jobs and logs are in {folder}", err=True)


if __name__ == "__main__":
    main()
