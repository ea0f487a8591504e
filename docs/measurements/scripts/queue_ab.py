"""A whole job through the queue, with and without speculation: what it gains, and what rows say.

    python docs/measurements/scripts/queue_ab.py --rows 2000 --max-tokens 128 --device cuda:0

The rows of jobs/make_prompts.py go through `trbatch submit`, `trbatch worker --burst` and `trbatch
collect`, on a queue and a store of their own, three times: recycled from an empty matrix, plain
(`--no-speculate`), and recycled with the matrix that the first time left.

- A job's tokens/s are all its tokens over the time from its first to its last: from the earliest
  end of a row without its decode and prefill seconds, to the latest end. The worker's start, and
  what it times at its first start on a machine, come before. Kernels that are compiled and steps
  that are captured at their first use are inside, unless --rehearse lets another job go first.
- The engine's busy share is that of the same time, by the worker's own metrics, which are read ten
  times a second and change twice a second: from the first change inside to the last. The worker
  knows of whole steps only, so that the share of a job of seconds may be off by some hundredths.
- The rows' `speedup` says what plain decoding would have taken over what decoding took. It is put
  beside what the plain job's rows really took, in all and row by row, in decode seconds a token.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from measuring import ROOT, deliver, make_prompts, parser_of, say
from queue_figures import Reading, job_figures, side_by_side

from trbatch.errors import JobFailed

POLL_S = 0.1
BUSY = re.compile(r"^trbatch_engine_busy_seconds_total (\S+)$", re.MULTILINE)
OUTSIDE = ("TRBATCH_REDIS_URL", "REDIS_URL", "TRBATCH_STORE")  # of the user, and not for us


class Queue:
    """A queue, a store and matrices of its own, in a folder that goes away.

    Args:
        options: of the command line.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        others = {name: value for name, value in os.environ.items() if name not in OUTSIDE}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {
            **others, "TRBATCH_HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(paths),
        }  # fmt: skip

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self._run("server", "stop")

    def job(
        self, name: str, prompts: Path, *worker: str, task: str = "recycled"
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Submit, decode and collect.

        Args:
            worker: more of the worker's options.
            task: jobs of the same share what was learned.

        Returns:
            The rows, and their figures.
        """
        dataset = self._folder / f"{name}.parquet"
        say(f"{name} …")
        self._run(
            "submit", str(prompts), "--name", name, "--task", task, "--chat",
            "--max-tokens", str(self._options.max_tokens), *self._model(),
        )  # fmt: skip
        readings = self._work(*worker)
        self._run("collect", name, "--output", str(dataset))
        rows = pq.read_table(dataset).to_pylist()
        figures = job_figures(rows, readings)
        say(f"{name}: {figures}")
        return rows, figures

    def _model(self) -> list[str]:
        model = self._options.model
        if not model:
            return []
        return ["--model", str(Path(model).resolve()) if Path(model).exists() else model]

    def _work(self, *more: str) -> list[Reading]:
        """Have a worker empty the queue, and read its metrics meanwhile."""
        options, port = self._options, _free_port()
        words = [
            "worker", "--profile", "none", "--burst", "--device", options.device,
            "--dtype", options.dtype, "--max-num-seqs", str(options.max_num_seqs),
            "--metrics-port", str(port), *more,
        ]  # fmt: skip
        log = self._folder / "worker.log"
        readings: list[Reading] = []
        with log.open("wb") as file:
            worker = subprocess.Popen(self._command(words), **self._place(), stderr=file)
            try:
                while worker.poll() is None:
                    time.sleep(POLL_S)
                    if reading := read_busy(port):
                        readings.append(reading)
            finally:
                worker.terminate()  # only if this is interrupted: it has ended by itself
                worker.wait()
        if worker.returncode:
            raise JobFailed(f"the worker ended with {worker.returncode}:\n{_end(log.read_text())}")
        return readings

    def _run(self, *words: str) -> None:
        done = subprocess.run(
            self._command(words), **self._place(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise JobFailed(f"{words[0]} ended with {done.returncode}:\n{_end(done.stderr)}")

    def _command(self, words: Any) -> list[str]:
        return [sys.executable, "-m", "trbatch", *words]

    def _place(self) -> dict[str, Any]:
        # In a folder without a trbatch.toml, whose settings would be others.
        return {"env": self._environment, "cwd": self._folder}


def read_busy(port: int) -> Reading | None:
    """For how long the worker's engine was busy by now; None if the worker does not say it."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as answer:
            found = BUSY.search(answer.read().decode())
    except OSError:  # it has not begun to listen, or has ended
        return None
    return (time.time(), float(found[1])) if found else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(text: str) -> str:
    return text[-2000:].strip()


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The three jobs, and what lies between them."""
    with tempfile.TemporaryDirectory(prefix="trb-") as name:
        folder = Path(name)
        prompts, others = folder / "prompts.jsonl", folder / "others.jsonl"
        make_prompts(prompts, options.rows)
        with Queue(folder, options) as queue:
            if options.rehearse:
                make_prompts(others, options.rehearse, seed=1)
                queue.job("rehearsal", others, task="rehearsal")
                queue.job("rehearsal-plain", others, "--no-speculate", task="rehearsal")
            cold, of_cold = queue.job("recycled", prompts)
            plain, of_plain = queue.job("plain", prompts, "--no-speculate", task="plain")
            warm, of_warm = queue.job("warm", prompts)
    asked = ("rows", "max_tokens", "device", "dtype", "max_num_seqs", "model", "rehearse")
    return {
        **{name: getattr(options, name) for name in asked},
        "jobs": {"recycled": of_cold, "plain": of_plain, "recycled, warm": of_warm},
        "recycled over plain": side_by_side(cold, plain, of_cold, of_plain),
        "recycled, warm, over plain": side_by_side(warm, plain, of_warm, of_plain),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--rows", type=int, default=2000, help="of each job; default: 2000")
    add("--max-tokens", type=int, default=128, help="most tokens of a text; default: 128")
    add("--device", default="auto", help="cpu, cuda:0, …; auto: the first GPU, else the CPU")
    add("--dtype", default="auto", help="numbers to compute with; default: as the worker does")
    add("--max-num-seqs", type=int, default=0, help="rows decoded together; 0: by the machine")
    add("--model", default="", help="hub name, folder or GGUF file; default: the small model")
    add("--rehearse", type=int, default=0, help="rows of a job before, which does not count")
    return deliver(measured, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
