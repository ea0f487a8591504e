"""Whose fault a death is: only a worker's own doing may make rows suspect."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from child import Child

from trbatch.deaths import MemoryWatch, is_stopped, judge


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE],
)
def test_a_signal_from_outside_is_nobodys_fault(number: int) -> None:
    death = judge(-number)
    assert not death.own
    assert death.cause == f"{signal.Signals(number).name} from outside"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL])
def test_a_signal_of_the_processor_or_the_library_is_its_own_doing(number: int) -> None:
    death = judge(-number)
    assert death.own and death.cause == signal.Signals(number).name


def test_an_exit_code_that_no_worker_gives_is_its_own_doing() -> None:
    assert judge(9).own and not judge(9).on_purpose
    assert judge(1).own
    assert not any(judge(code).own for code in (0, 75, 129, 130, 143)), "the machine's, or nobody's"
    assert all(judge(code).on_purpose for code in (2, 4, 75, 129, 130, 143))


def test_a_kill_for_memory_and_a_hang_are_its_own_doing() -> None:
    assert judge(-signal.SIGKILL, out_of_memory=True).own
    assert judge(-signal.SIGKILL, hung=True).own
    assert not judge(-signal.SIGTERM, out_of_memory=True).own


def test_a_real_time_signal_has_a_name_too() -> None:
    assert judge(-(signal.SIGRTMIN + 3)).cause == f"signal {signal.SIGRTMIN + 3} from outside"


class Machine:
    """The files of a kernel, as far as a `MemoryWatch` reads them. Sizes in MiB."""

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/1").mkdir()
        self.write("proc/meminfo", f"MemTotal: {1000 << 10} kB\nMemFree: 1 kB\n")
        for name, text in files.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def resident(self, size: int) -> None:
        pages = (size << 20) // os.sysconf("SC_PAGE_SIZE")
        self.write("proc/1/statm", f"{2 * pages} {pages} 0 0 0 0 0")


V2 = {
    "proc/self/cgroup": "0::/jobs/one\n",
    "sys/fs/cgroup/jobs/one/memory.events": "oom 0\noom_kill 0\n",
    "sys/fs/cgroup/jobs/one/memory.max": f"{100 << 20}\n",
}
V1 = {
    "proc/self/cgroup": "4:memory:/nowhere\n3:cpu:/\n",  # as in a container
    "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\noom_kill 0\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{100 << 20}\n",
}
BARE = {"proc/self/cgroup": "0::/\n", "proc/vmstat": "nr_free 1\noom_kill 0\n"}


@pytest.mark.parametrize(
    ("files", "counter", "limit"),
    [
        (V2, "sys/fs/cgroup/jobs/one/memory.events", 100),
        (V1, "sys/fs/cgroup/memory/memory.oom_control", 100),
        (BARE, "proc/vmstat", 1000),
    ],
    ids=["version 2", "version 1", "no group"],
)
def test_a_kill_for_memory_is_known_by_the_kernels_count_and_the_size(
    tmp_path: Path, files: dict[str, str], counter: str, limit: int
) -> None:
    machine = Machine(tmp_path, files)
    watch = MemoryWatch(tmp_path)
    machine.resident(int(0.6 * limit))
    watch.look(1)
    assert not watch.killed(), "somebody else's SIGKILL"
    machine.write(counter, files[counter].replace("oom_kill 0", "oom_kill 1"))
    assert watch.killed()
    machine.resident(int(0.3 * limit))
    watch.look(1)
    assert not watch.killed(), "too small to have filled the memory: another one was meant"
    machine.resident(int(0.9 * limit))
    for _ in range(2):
        watch.look(1)
    assert not watch.killed(), "that kill was long ago"


def test_a_kernel_that_counts_nothing_blames_nobody(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {})
    machine.resident(990)
    watch = MemoryWatch(tmp_path)
    watch.look(1)
    watch.look(2)  # it is gone
    assert not watch.killed()


def test_this_machine_can_be_watched() -> None:
    watch = MemoryWatch()
    watch.look(os.getpid())
    assert watch._resident > 1 << 20
    assert 0 < watch._limit < float("inf")
    assert not watch.killed()


def test_a_stopped_process_is_known_as_such() -> None:
    with Child([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while not is_stopped(process.pid):
            assert time.monotonic() < deadline
        process.kill()
    assert not is_stopped(process.pid), "it is gone"
