"""CUDA graphs: work recorded once for each shape and replayed with one call of the host."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch

from trbatch.flight import declared

logger = logging.getLogger(__name__)

_WARM_UPS = 2  # runs before a capture: kernels are compiled and libraries make their plans
Given = TypeVar("Given")


class Replay(Generic[Given]):
    """Work of one shape: its graph and what that leaves in memory; without one, the work itself."""

    def __init__(self, work: Callable[[], Given]) -> None:
        self.work = work
        self.graph: Any = None
        self.given: Given | None = None

    def run(self) -> Given:
        """Start it. What it gives is overwritten when it is started again."""
        if self.graph is None:
            return self.work()
        self.graph.replay()
        return cast(Given, self.given)


class Graphs:
    """All graphs of one engine: they share memory, since one runs at a time.

    Args:
        wanted: whether to capture at all.
    """

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        self._device = device
        self.wanted = wanted  # False also when work turned out to be such that it cannot be
        self._pool: Any = None
        self._keeper: Any = None  # the first graph in it, whoever needs that: without any it ends

    @declared()  # it takes seconds, and may come in the middle of rows
    @torch.inference_mode()
    def record(self, work: Callable[[], Given], *, what: str) -> Replay[Given]:
        """Record work that may be run at any time and changes nothing yet.

        Args:
            work: reads and writes the same memory each time; must not wait for the device.
            what: for people.

        Raises:
            torch.OutOfMemoryError: another time, or for a smaller shape, memory may suffice.
            torch.AcceleratorError: the device failed.
        """
        replay = Replay(work)
        if not self.wanted:
            return replay
        start = time.perf_counter()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        pool = self._pool or torch.cuda.graph_pool_handle()
        failure = None
        try:
            # Where the end of a capture fails, torch leaves its stream behind as the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                replay.given = work()
        except RuntimeError as error:
            failure = _of_the_device(error)
            if failure is None:
                # Such as a mixture of experts that looks on the host which expert gets which token.
                logger.warning(
                    "steps of this model cannot be captured, they are launched: %s", _said(error)
                )
                self.wanted = False
                return replay
        if failure is not None:
            try:
                raise failure  # out here, or it and what was raised behind it would hold each other
            finally:
                del failure  # or it and this frame would, and so the memory that ran out
        if self._keeper is None:  # not sooner: what fails leaves nothing that keeps the pool
            self._pool, self._keeper = pool, graph
        replay.graph = graph
        logger.debug("captured %s in %.2f s", what, time.perf_counter() - start)
        return replay


def _of_the_device(error: RuntimeError) -> RuntimeError | None:
    """What says nothing of the work itself: that memory did not suffice, a device's failure.

    Whatever fails in a capture may make its end fail, too; so what led to the error counts as well.
    """
    chain: list[BaseException] = [error]
    while (before := chain[-1].__context__) is not None:
        chain.append(before)
    for one in chain:
        if isinstance(one, torch.OutOfMemoryError):
            return one
        if isinstance(one, torch.AcceleratorError) and "out of memory" in _said(one):
            return torch.OutOfMemoryError(_said(one))  # a graph itself needs some
    for one in chain:
        # Most that cannot be captured is told as an error of the device: "operation not permitted
        # when stream is capturing", "… due to a previous error during capture".
        if isinstance(one, torch.AcceleratorError) and "captur" not in _said(one):
            return one
    return None


def _said(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
