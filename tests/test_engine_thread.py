"""The engine's thread by itself: nothing holds up its steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest
from waiting import wait_for
from worker_tools import MODEL, EchoEngine

from trbatch.config import SamplingParams
from trbatch.engine.sequence import Completion, Request
from trbatch.engine_events import Broken, Finished, Ready
from trbatch.engine_thread import MOST_LENGTH, MOST_TOGETHER, EngineThread
from trbatch.flight import FlightRecord
from trbatch.queue_names import ModelKey


def request(number: int, text: str = "one") -> Request:
    return Request(key=("lease", number), order=number, prompt=text, sampling=SamplingParams())


class Slow(EchoEngine):
    """Adding a request takes a while, as encoding it does."""

    def __init__(self) -> None:
        super().__init__(capacity=2)
        self.added: list[Request] = []
        self.steps_before: list[int] = []  # of each request, when it was added

    def add(self, request: Request) -> None:
        time.sleep(0.005)
        self.added.append(request)
        self.steps_before.append(len(self.batches))
        super().add(request)


@pytest.fixture
def flight() -> FlightRecord:
    return FlightRecord.create()


@pytest.fixture
def started(request: pytest.FixtureRequest, flight: FlightRecord) -> Callable[..., EngineThread]:
    def start(engine: Callable[[], EchoEngine]) -> EngineThread:
        thread = EngineThread(lambda _: engine(), flight=flight)
        thread.start()
        request.addfinalizer(lambda: thread.stop(10))
        thread.load(ModelKey(MODEL, ""))
        assert isinstance(thread.events.get(timeout=10), Ready)
        return thread

    return start


def finished(thread: EngineThread, count: int) -> list[Completion]:
    done: list[Completion] = []
    while len(done) < count:
        event = thread.events.get(timeout=10)
        assert isinstance(event, Finished)
        done += event.completions
    return done


def test_hundreds_of_requests_do_not_hold_up_the_steps(
    started: Callable[..., EngineThread],
) -> None:
    engines: list[Slow] = []
    thread = started(lambda: engines.append(Slow()) or engines[-1])
    thread.add([request(number) for number in range(100)])
    done = finished(thread, 100)
    (engine,) = engines
    assert [one.key[1] for one in done] == list(range(100)), "in the order in which they came"
    assert engine.steps_before[:4] == [0] * 4, "what it needs, it gets at once"
    late = engine.steps_before[8:]
    assert all(b - a >= 1 for a, b in zip(late, late[4:], strict=False)), "then a few at a time"


class Quick(EchoEngine):
    """Takes requests in at once, as many as come."""

    def __init__(self) -> None:
        super().__init__(capacity=2)
        self.together: list[int] = []

    def add_all(self, requests: Sequence[Request]) -> None:
        self.together.append(len(requests))
        super().add_all(requests)


def test_a_quick_engine_gets_many_requests_at_once(started: Callable[..., EngineThread]) -> None:
    engines: list[Quick] = []
    thread = started(lambda: engines.append(Quick()) or engines[-1])
    thread.add([request(number) for number in range(1000)])
    done = finished(thread, 1000)
    assert [one.key[1] for one in done] == list(range(1000)), "in the order in which they came"
    (engine,) = engines
    assert engine.together[0] == 1
    assert max(engine.together) == MOST_TOGETHER


def test_few_requests_say_nothing_of_how_many_an_engine_takes_at_once(
    started: Callable[..., EngineThread],
) -> None:
    """They trickle in one by one; then there are many, and they are long."""
    engines: list[Quick] = []
    thread = started(lambda: engines.append(Quick()) or engines[-1])
    for number in range(20):
        thread.add([request(number)])
        finished(thread, 1)
    (engine,) = engines
    thread.add([request(number) for number in range(20, 60)])
    finished(thread, 40)
    assert engine.together[20] <= 2
    engine.together.clear()
    thread.add([request(number, "x" * (MOST_LENGTH // 2)) for number in range(100, 120)])
    finished(thread, 20)
    assert max(engine.together) == 2, "long ones are read a few at a time"


def test_the_record_says_who_is_decoded_in_each_step_and_who_is_not_any_more(
    started: Callable[..., EngineThread], flight: FlightRecord
) -> None:
    """The rows in the engine's hands are the suspects if the process dies."""
    seen: list[tuple[list[int], list[int]]] = []  # in each step: said by the record, decoded

    class Watched(EchoEngine):
        def step(self) -> list[Completion]:
            waiting = [one.order for one in self.waiting]
            held = [one.order for one, _ in self.running.values()] + waiting
            noted = [order for order, _ in flight.running()["lease"]]
            seen.append((noted, held[: self.capacity]))
            return super().step()

    thread = started(lambda: Watched(capacity=3))
    thread.add([request(number, "of " * (1 + number % 3)) for number in range(20)])
    thread.abort([("lease", 18)])
    finished(thread, 19)
    assert all(noted == held for noted, held in seen), seen
    assert {order for noted, _ in seen for order in noted} >= set(range(18)) | {19}
    wait_for(lambda: not flight.running())  # who has ended is to blame for nothing


class Panic(BaseException):
    """As a tokenizer's library raises it."""


def test_a_request_that_no_engine_takes_is_known_among_others(
    started: Callable[..., EngineThread], flight: FlightRecord
) -> None:
    class Picky(Quick):
        def add_all(self, requests: Sequence[Request]) -> None:
            if any(one.order == 200 for one in requests):
                raise Panic("not this one")
            super().add_all(requests)

    thread = started(Picky)
    thread.add([request(number) for number in range(400)])
    events = [thread.events.get(timeout=10)]
    while not isinstance(events[-1], Broken):
        events.append(thread.events.get(timeout=10))
    assert isinstance(events[-1].error, Panic)
    assert flight.running() == {"lease": [(200, 0)]}


def test_an_idle_engine_that_hangs_over_a_prompt_is_not_idle_any_more(
    started: Callable[..., EngineThread], flight: FlightRecord
) -> None:
    reading, read = threading.Event(), threading.Event()

    class Stuck(Slow):
        def add(self, request: Request) -> None:
            reading.set()
            assert read.wait(10)
            super().add(request)

    thread = started(Stuck)
    wait_for(lambda: not flight.pulse.stepping)
    thread.add([request(0)])
    assert reading.wait(10)
    assert flight.pulse.stepping, "who watches it takes it for idle"
    assert flight.running() == {"lease": [(0, 0)]}
    read.set()
    finished(thread, 1)
    wait_for(lambda: not flight.pulse.stepping)


def test_requests_that_wait_for_the_engine_can_be_dropped(
    started: Callable[..., EngineThread],
) -> None:
    thread = started(Slow)
    thread.add([request(number) for number in range(60)])
    thread.abort([("lease", number) for number in range(1, 60)])
    thread.add([request(99)])
    keys = {one.key[1] for one in finished(thread, 1)}
    while 99 not in keys:
        keys |= {one.key[1] for one in finished(thread, 1)}
    assert len(keys) < 30, "what waited is gone"
    assert thread.events.empty()


def test_an_engine_that_fails_while_requests_wait_says_so(
    started: Callable[..., EngineThread],
) -> None:
    def broken() -> Slow:
        engine = Slow()
        engine.fail_at_step = 2
        return engine

    thread = started(broken)
    thread.add([request(number) for number in range(30)])
    events = [thread.events.get(timeout=10)]
    while not isinstance(events[-1], Broken):
        events.append(thread.events.get(timeout=10))
    assert "device on fire" in str(events[-1].error)
