"""What is on its way between host and device. Without a GPU: events are stand-ins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trbatch.engine.transfer import Clock, _on_host, send, to_device


class _Event:
    """An event that the device is not through with until somebody waits for it."""

    now = 0.0  # the device's clock in ms

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.through = False

    def record(self) -> None:
        _Event.now += 250
        self.at = _Event.now

    def synchronize(self) -> None:
        self.through = True

    def elapsed_time(self, end: Any) -> float:
        if not end.through:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return float(end.at - self.at)


def test_the_time_of_a_step_is_waited_for_also_when_its_report_is_there_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event that ends it comes behind the one that says that the report is there."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    clock = Clock(torch.device("cuda"))
    clock.stop()
    assert clock.seconds == 0.25


def test_without_a_gpu_the_time_is_the_hosts() -> None:
    clock = Clock(torch.device("cpu"))
    clock.stop()
    assert 0 <= clock.seconds < 60


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("values", [[3, -1, 7], np.array([3, -1, 7], np.int32)])
def test_numbers_come_as_a_list_or_as_an_array(values: Any, device: str) -> None:
    """torch pins no tensor that it makes of an array."""
    on_host = _on_host(values, torch.device(device), torch.int64)
    assert on_host.is_pinned() == (device == "cuda")
    there = to_device(values, torch.device(device), torch.int64)
    assert there.device.type == device
    assert there.tolist() == [3, -1, 7] and there.dtype == torch.int64
    target = torch.zeros(2, 3, dtype=torch.int32, device=device)
    send(values, target[1])
    assert target.tolist() == [[0, 0, 0], [3, -1, 7]]
