"""Whose the time is, while steps are read one late and rows come and go between them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from trbatch.engine.charging import Charges

MS = 1e-3


@dataclass
class Host:
    """A host and a device on one clock, as `LaggedDecoder` and the engine use them."""

    work_s: float  # of the host, for each step
    device_s: float  # of the device, for each step
    others_s: float = 0.0  # of the host between steps, for rows that come and go
    prompts_s: float = 0.0  # of the device, for a prefill
    every: int = 4  # steps from one prefill to the next
    now: float = 100.0
    free: float = 0.0  # when the device is through with all that was started
    charges: Charges = field(default_factory=Charges)
    steps: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)

    def start(self, seconds: float) -> float:
        """Give the device something; when it will be through with it."""
        self.free = max(self.free, self.now) + seconds
        return self.free

    def run(self, count: int) -> Host:
        """Make so many steps, each of which is started before the one before is read."""
        self.charges.begin(self.now)
        under_way = self.start(self.device_s)
        self.charges.work(self.now)
        for step in range(count):
            self.now += self.others_s
            prompts = step % self.every == 0 and self.prompts_s
            ends = self.start(self.prompts_s) if prompts else 0.0
            self.charges.aside(self.now)
            self.now += self.work_s
            later = self.start(self.device_s)
            self.now = max(self.now, under_way)
            self.steps.append(self.charges.step(self.now, self.device_s))
            if prompts:
                self.charges.work(self.now)
                self.now = max(self.now, ends)
                self.prompts.append(self.charges.prompts(self.now))
            self.charges.work(self.now)
            under_way = later
        return self


@pytest.mark.parametrize("others_s", [0.0, 0.4 * MS, 3 * MS])
@pytest.mark.parametrize("prompts_s", [0.0, 2 * MS])
def test_where_the_host_is_slower_a_step_takes_what_the_host_did_for_it(
    others_s: float, prompts_s: float
) -> None:
    host = Host(work_s=2 * MS, device_s=1 * MS, others_s=others_s, prompts_s=prompts_s).run(40)
    assert host.steps[1:] == pytest.approx([2 * MS] * 39)


@pytest.mark.parametrize("others_s", [0.0, 1 * MS, 2.5 * MS])
@pytest.mark.parametrize("prompts_s", [0.0, 4 * MS])
def test_where_the_device_is_slower_a_step_takes_what_the_device_did(
    others_s: float, prompts_s: float
) -> None:
    """The host's other work is hidden behind it, as far as it can be."""
    host = Host(work_s=1 * MS, device_s=3 * MS, others_s=others_s, prompts_s=prompts_s).run(40)
    assert host.steps[1:] == pytest.approx([3 * MS] * 39)


@pytest.mark.parametrize("work_s", [0.5 * MS, 2 * MS])
@pytest.mark.parametrize("others_s", [0.0, 0.4 * MS, 5 * MS])
def test_all_time_is_charged_once(work_s: float, others_s: float) -> None:
    host = Host(work_s=work_s, device_s=1 * MS, others_s=others_s, prompts_s=2 * MS, every=1)
    host.run(200)
    passed = host.now - 100.0
    assert sum(host.steps) + sum(host.prompts) == pytest.approx(passed, rel=0.02)


def test_what_passed_while_nothing_was_under_way_is_nobodys() -> None:
    charges = Charges()
    charges.begin(10.0)
    charges.aside(10.5)
    charges.begin(20.0)
    assert charges.step(20.25, 0.125) == pytest.approx(0.25)
    assert charges.prompts(20.5) == pytest.approx(0.25)
