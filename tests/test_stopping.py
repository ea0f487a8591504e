"""When a worker stops, and which GPUs it gets."""

from __future__ import annotations

import datetime
import signal
import subprocess
from typing import Any

import pytest

from trbatch import gpus
from trbatch.errors import UsageError
from trbatch.stopping import Stops

NOW = datetime.datetime(2026, 11, 22, 23, 30)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 5000.0
        monkeypatch.setattr("trbatch.stopping.time", self)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return NOW.timestamp() + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_second_request_or_the_end_of_the_grace_hands_back(clock: Clock) -> None:
    stops = Stops(60.0)
    assert stops.look() == 0
    stops.ask(signal.SIGTERM)
    assert (stops.look(), stops.exit_code) == (1, 143)
    clock.now += 0.1
    stops.ask(signal.SIGTERM)
    assert stops.look() == 1, "the same one, passed on twice"
    clock.now += 59.0
    assert stops.look() == 1
    clock.now += 1.0
    assert stops.look() == 2
    stops = Stops(60.0)
    for _ in range(2):
        clock.now += 1.0
        stops.ask(signal.SIGINT)
    assert (stops.look(), stops.exit_code) == (2, 130)
    clock.now += 1.0
    with pytest.raises(KeyboardInterrupt):
        stops.ask(signal.SIGINT)


def test_the_hour_is_like_a_first_request_and_a_good_end(clock: Clock) -> None:
    later = datetime.datetime.fromtimestamp(clock.time() + 30)
    stops = Stops(60.0, later.isoformat())
    assert stops.look() == 0
    clock.now += 31
    assert (stops.look(), stops.exit_code) == (1, 0)
    clock.now += 60
    assert (stops.look(), stops.exit_code) == (2, 0)


def test_gpus_are_counted_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    assert gpus.chosen("3") == ["3"]
    assert gpus.chosen("0, 2") == ["0", "2"]
    monkeypatch.setenv(gpus.VISIBLE, "GPU-a,5")
    assert gpus.chosen("1") == ["5"]
    assert gpus.chosen("all") == ["GPU-a", "5"]
    with pytest.raises(UsageError, match="only 2 GPUs are visible"):
        gpus.chosen("2")


@pytest.mark.parametrize("text", ["x", "0,", "-1", "0;1", "1.5"])
def test_what_is_no_gpu_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    with pytest.raises(UsageError, match="--gpu"):
        gpus.chosen(text)


def test_all_gpus_are_those_that_the_driver_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpus.VISIBLE, raising=False)

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, stdout="0\n1\n")

    monkeypatch.setattr(gpus.subprocess, "run", answer)
    assert gpus.chosen("all") == ["0", "1"]
    monkeypatch.setattr(gpus, "_present", list)
    with pytest.raises(UsageError, match="no GPU"):
        gpus.chosen("all")
