"""The parent of workers: starts them, watches them, replaces them, and sees how they died.

Each worker is a process of its own around one engine and one GPU. The parent imports no torch and
holds nothing that a crash could take along. When a worker dies it puts the worker's chunks back
into the queue at once, by the flight record, with the rows that may be to blame.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trbatch import gpus
from trbatch.aftermath import Settling
from trbatch.config import WorkerConfig
from trbatch.deaths import STOPPED, Death, MemoryWatch, is_stopped, judge
from trbatch.errors import Unreachable, WorkerError
from trbatch.flight import FlightRecord
from trbatch.stopping import SAME_SIGNAL_S, signals_to

logger = logging.getLogger("trbatch.worker")

COMMAND = (sys.executable, "-m", "trbatch", "worker")  # of a worker; this process' is the same
POLL_S = 0.1
LOOK_S = 1.0  # between looks at a worker's memory and pulse
HUNG_S = 120.0  # without a sign of life in the middle of rows; steps that were slow before get more
STARTS = 5  # so many deaths in a row before a model stood are enough
FRUITLESS = 20  # and so many without a single finished row: it is not the rows
FIRST_BREAK_S = 0.5
LONGEST_BREAK_S = 30.0
SETTLE_S = 3.0  # for a dead worker's chunks, when somebody waits for the end of this process
LEAVE_S = 90.0  # beyond the grace, for the last step and the saving of the matrices

_STOPPED_ALONE = STOPPED - {128 + signal.SIGINT}
_OWNER = "TRBATCH_OWNER"  # in the environment: the process without which this one is to end
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Post:
    """A place for a worker: what is particular about it."""

    title: str  # for the log
    arguments: tuple[str, ...] = ()  # beside those that all have
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Worker:
    """The process at a post, and the record of its predecessors."""

    post: Post
    process: subprocess.Popen[bytes] | None = None
    flight: FlightRecord | None = None
    memory: MemoryWatch | None = None
    death: Death | None = None  # of the last one, while its chunks are put back
    settling: Settling | None = None
    due: float = 0.0  # when to start the next one
    failed_starts: int = 0  # in a row
    fruitless: int = 0  # the same, but of those that finished no row
    breaks: int = 0  # how often it waited longer and longer
    worked: bool = False  # whether any of them had its model standing
    exit_code: int | None = None  # once there will be no other
    error: WorkerError | None = None  # why there will be no other
    stalled_s: float = 0.0
    pulse: float = 0.0
    hung: bool = False


class Supervisor:
    """Keeps one worker at each post until all are done or somebody stops them.

    Args:
        posts: one a worker.
        arguments: of `trbatch worker`, the same for all.
        redis_url: the queue.
        grace_s: what workers are given to finish when they are asked to stop.
        patient: whether to go on while the queue or the storage is away, once a worker has worked.
        owner: the parent process without which to hand everything back and end; 0: none.
    """

    def __init__(
        self,
        posts: Sequence[Post],
        arguments: Sequence[str],
        *,
        redis_url: str = "",
        grace_s: float = 60.0,
        patient: bool = True,
        owner: int = 0,
    ) -> None:
        self._arguments = list(arguments)
        self._redis_url = redis_url
        self._grace_s = grace_s
        self._patient = patient
        self._owner = owner
        self._workers = [_Worker(post) for post in posts]
        self._stops = 0
        self._stop_code = 0
        self._asked_at = 0.0
        self._told = 0  # how many of the stops the workers were told of
        self._told_at = 0.0
        self._looked_at = time.monotonic()

    def run(self) -> int:
        """Watch until no worker is left.

        Returns:
            The workers' exit code, the worst of several; after a signal 128 plus its number.

        Raises:
            WorkerError: a worker died again and again and did nothing else.
        """
        with signals_to(self._ask):
            try:
                while any(worker.exit_code is None for worker in self._workers):
                    self._look_at_owner()
                    self._pass_on_stops()
                    for worker in self._workers:
                        self._attend(worker)
                    self._look()
                    time.sleep(POLL_S)
            finally:
                self._kill_all()
        for worker in self._workers:
            if worker.error is not None:
                raise worker.error
        codes = [worker.exit_code or 0 for worker in self._workers]
        worst = max(codes, key=lambda code: (code != 0 and code not in STOPPED, code))
        stopped = worst == 0 or worst in STOPPED
        return self._stop_code if self._stop_code and stopped else worst

    def _ask(self, number: int) -> None:
        """Stop: called in a signal's handler, so only noted."""
        now = time.monotonic()
        if now - self._asked_at >= SAME_SIGNAL_S:
            self._asked_at = now
            self._stops += 1
            self._stop_code = 128 + number

    def _look_at_owner(self) -> None:
        """Whoever had us started is gone (`kill -9`): nobody waits for what is in flight."""
        if self._owner and os.getppid() != self._owner:
            logger.warning("process %d, for which this worker works, is gone", self._owner)
            self._owner, self._asked_at = 0, time.monotonic()
            self._stops, self._stop_code = max(self._stops, 2), 128 + signal.SIGTERM

    def _pass_on_stops(self) -> None:
        """One at a time: a worker takes two at once for the same one."""
        now = time.monotonic()
        if self._told < self._stops and now - self._told_at > 1.2 * SAME_SIGNAL_S:
            self._told, self._told_at = self._told + 1, now
            for worker in self._workers:
                if worker.process is not None:
                    worker.process.send_signal(signal.SIGTERM)
        if self._stops and now - self._asked_at > self._grace_s + LEAVE_S:
            logger.warning("a worker did not stop in time and is killed")
            self._kill_all()

    def _attend(self, worker: _Worker) -> None:
        """Start the next one if it is time, bury the last one if it died."""
        if worker.exit_code is not None:
            return
        if worker.settling is not None:
            if worker.settling.over or (self._stops and worker.settling.seconds > SETTLE_S):
                self._follow(worker)
        elif worker.process is None:
            if self._stops:
                worker.exit_code = 0
            elif time.monotonic() >= worker.due:
                self._start(worker)
        elif (code := worker.process.poll()) is not None:
            self._bury(worker, code)

    def _start(self, worker: _Worker) -> None:
        worker.flight = FlightRecord.create()
        worker.memory = MemoryWatch()
        worker.hung, worker.stalled_s = False, 0.0
        environment = os.environ | dict(worker.post.environment) | worker.flight.environment()
        try:
            # In a group of its own: a terminal's Ctrl-C reaches it only through this process.
            worker.process = subprocess.Popen(
                [*COMMAND, *self._arguments, *worker.post.arguments],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=(worker.flight.fd,),
                process_group=0,
            )
        except OSError as error:
            worker.flight.close()
            raise WorkerError(f"cannot start a worker process: {error}") from error

    def _bury(self, worker: _Worker, code: int) -> None:
        """See how it died, and begin to put back what it held."""
        assert worker.flight is not None and worker.memory is not None
        worker.death = judge(code, hung=worker.hung, out_of_memory=worker.memory.killed())
        if not worker.death.on_purpose:
            logger.error("%s died: %s", worker.post.title, worker.death.cause)
        worker.settling = Settling(self._redis_url, worker.flight, worker.death)
        worker.process = None

    def _follow(self, worker: _Worker) -> None:
        """What it held is back in the queue, or its leases run out: decide about a successor."""
        flight, death, settling = worker.flight, worker.death, worker.settling
        assert flight is not None and death is not None and settling is not None
        pulse, code = flight.pulse, death.code
        suspected = settling.suspects + pulse.accused
        final = self._is_final(worker, death, was_ready=pulse.was_ready)
        worker.worked = worker.worked or pulse.was_ready
        if death.own and not (death.code == WorkerError.exit_code and worker.worked):
            worker.failed_starts = 0 if pulse.was_ready else worker.failed_starts + 1
            worker.fruitless = 0 if pulse.fruitful else worker.fruitless + 1
        at_once = suspected or pulse.fruitful or (code < 0 and not death.own)
        worker.breaks = 0 if at_once else worker.breaks + 1
        if settling.over:
            flight.close()
        else:
            logger.warning("the queue does not answer; chunks come back when their leases run out")
        worker.flight = worker.settling = None
        if self._stops or final:
            worker.exit_code = 0 if self._stops and code < 0 else max(code, 0)
            return
        break_s = min(FIRST_BREAK_S * 2 ** min(worker.breaks, 10), LONGEST_BREAK_S)
        worker.due = time.monotonic() + break_s
        self._give_up_if_hopeless(worker, death)

    def _give_up_if_hopeless(self, worker: _Worker, death: Death) -> None:
        if worker.failed_starts < STARTS and worker.fruitless < FRUITLESS:
            return
        times = f"{worker.failed_starts} times before its model stood"
        if worker.failed_starts < STARTS:
            times = f"{worker.fruitless} times without finishing a row"
        worker.exit_code = WorkerError.exit_code
        worker.error = WorkerError(
            f"{worker.post.title} died {times}, at last by {death.cause}",
            hint="what it wrote above says why; a smaller model or another --device may do",
        )
        logger.error("%s", worker.error)

    def _is_final(self, worker: _Worker, death: Death, *, was_ready: bool) -> bool:
        """Whether a successor would do no better."""
        if death.code in _STOPPED_ALONE:  # somebody stopped it, and not through us
            return False
        if death.code == Unreachable.exit_code:
            return not (self._patient and worker.worked)
        if death.code == WorkerError.exit_code and worker.worked and not was_ready:
            return False  # the model could be loaded before, so it is the machine
        return death.on_purpose

    def _look(self) -> None:
        """Once a second: how big each worker is, and whether its engine gives signs of life."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        # A step that this process slept through itself counts as one second.
        passed, self._looked_at = min(now - self._looked_at, 2 * LOOK_S), now
        for worker in self._workers:
            if worker.process is None or worker.flight is None or worker.memory is None:
                continue
            worker.memory.look(worker.process.pid)
            pulse = worker.flight.pulse
            still = pulse.stepping and pulse.since == worker.pulse
            if not still:
                worker.pulse, worker.stalled_s = pulse.since, 0.0
            elif not is_stopped(worker.process.pid):
                worker.stalled_s += passed
            if worker.stalled_s > pulse.allowed(HUNG_S):
                logger.error("%s: no sign of life for %.0f s", worker.post.title, worker.stalled_s)
                worker.hung, worker.stalled_s = True, 0.0
                worker.process.kill()

    def _kill_all(self) -> None:
        for worker in self._workers:
            if worker.process is not None and worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()


def owned() -> dict[str, str]:
    """What the environment of a supervisor needs to end when this process does, however it does."""
    return {_OWNER: str(os.getpid())}


def die_with_parent() -> None:
    """Have this process killed when its parent dies: nobody else would free its GPU."""
    parent = os.getppid()
    try:
        failed = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # no Linux
        failed = -1
    if failed:
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGKILL)


def supervise(config: WorkerConfig, gpu: str, arguments: Sequence[str]) -> int:
    """Be the parent of workers with these arguments until they are done. Returns an exit code.

    Args:
        config: the workers'.
        gpu: as `--gpu` was given; "": one worker, on whatever device its arguments name.
        arguments: of `trbatch worker`, without those of one GPU.

    Raises:
        WorkerError: a worker died again and again and did nothing else.
    """
    if config.redis_url:
        os.environ["TRBATCH_REDIS_URL"] = config.redis_url
    supervisor = Supervisor(
        [_post(config, one, at) for at, one in enumerate(gpus.chosen(gpu))]
        if gpu
        else [Post("the worker")],
        arguments,
        redis_url=config.redis_url,
        grace_s=config.grace_s,
        patient=not config.burst,
        owner=int(os.environ.pop(_OWNER, "0")),  # no business of our own children
    )
    return supervisor.run()


def _post(config: WorkerConfig, gpu: str, place: int) -> Post:
    """A worker that sees one GPU and no other; its metrics are at the port that is its own."""
    safe = "".join(c if c.isalnum() else "-" for c in gpu)
    name = f"{config.name or socket.gethostname()}-gpu{safe}"
    arguments: tuple[str, ...] = ("--device=cuda:0", f"--name={name}")
    if config.metrics_port:
        arguments += (f"--metrics-port={config.metrics_port + place}",)
    return Post(f"the worker on GPU {gpu}", arguments, {gpus.VISIBLE: gpu})
