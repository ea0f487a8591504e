"""Timing steps on the device as they will run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trbatch.engine.admission import Newcomer
from trbatch.engine.device_step import DeviceStep
from trbatch.engine.sampling import Kind
from trbatch.engine.step_shapes import Key, Shape, bucket_of
from trbatch.engine.transfer import OnItsWay


class DeviceTimer:
    """Times steps as they will run: captured, on texts of a given length that say anything.

    Call it before anything is admitted. Rows of the matrix `task` are overwritten.

    Args:
        task: whose matrix drafts and learns.
        longest: see `sizing`.
    """

    def __init__(self, stepper: DeviceStep, *, task: int, longest: int) -> None:
        self._stepper, self._task, self.longest = stepper, task, longest

    def __call__(self, batch: int, size: int, context: int) -> float:
        """Seconds of one step of (batch, T) with `context` committed tokens a sequence."""
        with self.step(batch, size, context) as shape:
            self._stepper.wait()
            start = time.perf_counter()
            report = OnItsWay(shape.replay.run().report)
            report.wait()
            return time.perf_counter() - start

    def fits(self, batch: int, size: int, context: int) -> bool:
        """See `sizing.Timer`."""
        cache = self._stepper.state.model.cache
        assert cache is not None
        return cache.pool.can_take(self._rows(batch) * cache.pages_for(context + 1 + size))

    def _rows(self, batch: int) -> int:
        return min(bucket_of(batch, self._stepper.capacity), self._stepper.capacity)

    @contextmanager
    def step(self, batch: int, size: int, context: int, *, times: int = 1) -> Iterator[Shape]:
        """A step of (batch, T), and texts of `context` tokens that it may be run on.

        Args:
            times: how often it may be run: as often, the texts can grow by `size` tokens.
        """
        stepper = self._stepper
        with torch.inference_mode():
            bucket = bucket_of(batch, stepper.capacity)
            shape = stepper.shapes.get(Key(bucket, size, Kind.GREEDY))
            rooms = self._take_slots(self._rows(batch), size * times, context)
            shape.fill(range(len(rooms)), [self._task] * len(rooms))
            try:
                yield shape
            finally:
                self._give_back(rooms)

    def _take_slots(self, count: int, more: int, context: int) -> list[Any]:
        cache = self._stepper.state.model.cache
        assert cache is not None
        # Random words, of which each text repeats its own: drafts have something to find.
        vocab = self._stepper.state.matrix.vocab_size
        words = torch.randint(vocab, (32,), generator=torch.Generator().manual_seed(0)).tolist()
        rooms, newcomers = [], []
        for slot in range(count):
            text = [words[(slot + i * i) % len(words)] for i in range(context + 1)]
            room = cache.take_room(context + 1 + more)
            newcomers.append(
                Newcomer(slot, text, 1 << 20, [], room.pages, task=self._task, turn=slot)
            )
            rooms.append(room)
        self._stepper.write(newcomers)
        return rooms

    def _give_back(self, rooms: list[Any]) -> None:
        state = self._stepper.state
        assert state.model.cache is not None
        for slot, room in enumerate(rooms):
            state.slots.active[slot].fill_(False)
            state.matrix.clear_slot(slot)
            state.model.cache.give_back(room)
        state.matrix.clear_task(self._task)
        state.fresh.zero_()
