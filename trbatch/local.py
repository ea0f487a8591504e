"""A job and its worker in one process tree: `trbatch run`.

The worker is a child process, as any other worker would be: it takes chunks from the queue, and
when it dies this process and the job's finished rows do not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from trbatch.errors import JobFailed, Unreachable
from trbatch.job_handle import POLL_S, Job, Report
from trbatch.job_status import JobStatus, job_failure
from trbatch.supervisor import owned

WORKER_COMMAND = (sys.executable, "-m", "trbatch", "worker")
LEAVE_S = 15.0  # for a worker in burst mode to notice that nothing is left, and to save
HAND_BACK_S = 20.0  # for a worker that was asked twice to stop, before it is killed


class WorkerProcess:
    """A worker as a child process; leaving the context ends it.

    It has a session of its own, so that a terminal's Ctrl-C reaches it only through this process.
    Should this process be killed, it hands back what it took and ends.

    Args:
        arguments: of `trbatch worker`.
        redis_url: handed over in the environment: arguments are visible to every user.
        on_line: is given each line that the worker writes, from a thread of its own.
    """

    def __init__(
        self, arguments: Sequence[str], redis_url: str, on_line: Callable[[str], None]
    ) -> None:
        environment = os.environ | owned()
        if redis_url:
            environment["TRBATCH_REDIS_URL"] = redis_url
        self._process = subprocess.Popen(
            [*WORKER_COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self._on_line = on_line
        self._reader = threading.Thread(target=self._read, name="worker-output", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
            else:
                self.stop(patience_s=None if kind is KeyboardInterrupt else LEAVE_S)
        finally:
            self._kill()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """The worker's exit code, or None while it lives."""
        return self._process.poll()

    def finish(self) -> None:
        """Let a worker in burst mode end by itself; stop it if it goes on with other jobs."""
        if not self._ended_within(LEAVE_S):
            self.stop(patience_s=LEAVE_S)

    def stop(self, *, patience_s: float | None) -> None:
        """Ask the worker to finish what it took; after `patience_s`, to hand it back; then kill.

        `patience_s` None waits for as long as it takes. A Ctrl-C meanwhile ends the patience.
        """
        self._signal()
        try:
            if self._ended_within(patience_s):
                return
        except KeyboardInterrupt:
            self._on_line("stopping now: what is in flight goes back to the queue")
        self._signal()
        self._ended_within(HAND_BACK_S)

    def _signal(self) -> None:
        if self.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _kill(self) -> None:
        if self.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=5.0)
        if not self._reader.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()

    def _ended_within(self, seconds: float | None) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _read(self) -> None:
        assert self._process.stdout is not None, "the worker's output is a pipe"
        for line in self._process.stdout:
            with contextlib.suppress(OSError):  # a terminal that is gone must not stop the worker
                self._on_line(line.rstrip("\n"))


def run(
    job: Job, arguments: Sequence[str], *, report: Report, on_line: Callable[[str], None]
) -> JobStatus:
    """Decode a submitted job with a worker of its own; other workers may help.

    Args:
        arguments: of `trbatch worker`; it should stop when the queue is empty.
        report: is given the job's status about twice a second.
        on_line: is given each line that the worker writes.

    Returns:
        The status of the job once it is completed, cancelled or expired.

    Raises:
        JobFailed: the worker ended and rows are missing.
        Unreachable: the same, since the queue or the storage was away for minutes.
    """
    status = job.status()
    if status.finished and status.state != "failed":
        return status
    with WorkerProcess(arguments, job.redis_url, on_line) as worker:
        while True:
            code = worker.poll()  # before the status: what it did last must show there
            status = job.status()
            report(status)
            if status.finished and status.state != "failed":
                return status
            if status.state == "failed":
                raise job_failure(status)
            if code is not None:
                _check_helped(status, code)
            time.sleep(POLL_S)


def _check_helped(status: JobStatus, code: int) -> None:
    """Go on without a worker of our own only while another one holds the model."""
    if code == 0 and status.workers and not status.paused:
        return
    progress = status.progress
    if status.paused:
        raise JobFailed(
            f"job {status.id} is paused; {progress.rows_done} of {progress.rows} rows are done",
            hint=f"trbatch continue {status.path}, then the same command again",
        )
    kind = Unreachable if code == Unreachable.exit_code else JobFailed
    raise kind(
        f"the worker ended with exit code {code}; job {status.id} has "
        f"{progress.rows_done} of {progress.rows} rows",
        hint="its last lines say why; the same command again goes on where it stopped",
    )
