"""The command line with an engine that echoes: what `trbatch run` and the tests start as a worker.

    python echo_worker.py worker --burst …

A row's text is its prompt in capitals. The prompt `refuse` gives an error row; `die` kills the
process, as a failing driver would, `raise` fails in Python and `hang` never ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from trbatch.config import WorkerConfig
from trbatch.engine.sequence import Completion, Request, TaskKey
from trbatch.errors import WorkerError
from trbatch.queue_names import ModelKey


class EchoEngine:
    """Finishes up to `capacity` requests a step; a step takes `step_s` seconds."""

    capacity = 4
    copies = None  # it has no matrices
    steps: Mapping[tuple[int, int], int] = {}  # nobody asks of what kind

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.tasks: list[str] = []
        self._requests: deque[Request] = deque()

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    def open_task(self, key: TaskKey) -> None:
        self.tasks.append(key.name)

    def add(self, request: Request) -> None:
        self._requests.append(request)

    def add_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.add(request)

    def step(self) -> list[Completion]:
        time.sleep(self.step_s)
        count = min(self.capacity, len(self._requests))
        running = [self._requests.popleft() for _ in range(count)]
        for request in running:
            misbehave(text_of(request))
        return [self._echo(request) for request in running]

    def abort(self, keys: Iterable[Hashable]) -> None:
        gone = set(keys)
        self._requests = deque(r for r in self._requests if r.key not in gone)

    def save_tasks(self) -> None: ...

    def stats(self) -> dict[str, Any]:
        return {}

    def _echo(self, request: Request) -> Completion:
        text = text_of(request)
        known = {"key": request.key, "seed": request.seed, "sample_index": request.sample_index}
        if text == "refuse":
            return Completion(
                finish_reason="error", error_code="refused", error_message="as asked", **known
            )
        tokens = [1] * (len(text.split()) + 1)
        return Completion(
            finish_reason="stop",
            text=text.upper(),
            token_ids=tokens,
            prompt_tokens=len(tokens),
            decode_s=0.01,
            baseline_decode_s=0.02,
            num_spec_steps=len(tokens) - 1,
            acceptance_histogram=[len(tokens) - 1],
            **known,
        )


def text_of(request: Request) -> str:
    return request.prompt or " ".join(str(m["content"]) for m in request.messages or [])


def misbehave(text: str) -> None:
    """What a row can do to its process; `die9` by a signal of this number."""
    if text.startswith("die"):
        number = text.removeprefix("die")
        if not number:
            os._exit(9)
        signal.pthread_kill(threading.get_ident(), int(number))  # dies here and not a step later
    if text == "raise":
        raise RuntimeError("device on fire")
    if text == "hang":
        time.sleep(3600)


def load_echo(config: WorkerConfig, model: ModelKey) -> EchoEngine:
    """Stands in for `trbatch.worker.load_engine`."""
    if log := os.environ.get("ECHO_LOADS"):  # a line a start
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
        if str(len(open(log).readlines())) in os.environ.get("ECHO_REFUSE_LOADS", "").split():
            raise WorkerError("no memory left")
    misbehave(os.environ.get("ECHO_LOADING", ""))
    return EchoEngine(float(os.environ.get("ECHO_STEP_S", "0")))


if __name__ == "__main__":
    from trbatch import cli, supervisor, worker

    supervisor.COMMAND = (sys.executable, __file__, "worker")
    supervisor.HUNG_S = float(os.environ.get("ECHO_HUNG_S", supervisor.HUNG_S))
    supervisor.FIRST_BREAK_S = 0.05
    worker.load_engine = load_echo
    cli.main()
