"""Results that are read one step late, and the size of steps that are chosen whole."""

from __future__ import annotations

import time
from collections.abc import Sequence as ListLike
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_budget import costs

from trbatch.config import SamplingParams
from trbatch.engine import lagged
from trbatch.engine.budget import Budget
from trbatch.engine.costs import CostTable
from trbatch.engine.curve import STEP_SIZES
from trbatch.engine.lagged import LaggedDecoder, Outcome, Reading
from trbatch.engine.sequence import Figures, Sequence
from trbatch.engine.text import StopChecker


class Script:
    """A device that says known texts, a few tokens a step; it sees lengths, but no stop strings."""

    def __init__(self, texts: dict[int, list[int]], pace: list[int]) -> None:
        self.texts, self.pace = texts, pace
        self.said: dict[int, int] = {}
        self.under_way: list[int] = []
        self.launches = 0
        self.prepared = {(count, 4) for count in (1, 2)}

    def is_ready(self, members: ListLike[Sequence], size: int) -> bool:
        return (len(members), size) in self.prepared

    def prepare(self, members: ListLike[Sequence], size: int) -> None:
        assert not self.under_way, "something runs while a step is made ready"
        assert members, "nobody's step is made ready"
        self.prepared.add((len(members), size))

    def launch(self, members: ListLike[Sequence], size: int) -> int:
        assert len(self.under_way) < 3, "a step was started before the last but one was read"
        self.launches += 1
        self.under_way.append(self.launches)
        self._members = {self.launches: [int(s.request.key) for s in members]} | getattr(
            self, "_members", {}
        )
        return self.launches

    def read(self, handle: int) -> Reading:
        assert handle == self.under_way.pop(0), "steps are read in their order"
        outcomes = []
        for key in self._members[handle]:
            count = self.pace[(key + handle) % len(self.pace)]
            begin = self.said.setdefault(key, 0)
            tokens = self.texts[key][begin : begin + count]
            self.said[key] = begin + len(tokens)
            outcomes.append(Outcome(tokens, count, max(0, len(tokens) - 1)))
        return Reading(outcomes, 0.001)


def sequence(key: int, length: int, **sampling) -> Sequence:
    params = SamplingParams(max_tokens=length, ignore_eos=True, **sampling)
    return Sequence(
        request=tiny.request(key, [5]), tokens=[5], prompt_length=1, max_tokens=length,
        stop=StopChecker(tiny.NumberTokenizer(), params, frozenset()), figures=Figures(),
    )  # fmt: skip


def run(script: Script, batch: list[Sequence]) -> list[int]:
    """Decode all to their ends; the keys in the order in which they could be let go."""
    decoder, gone, running = decoder_of(script), [], list(batch)
    while True:
        decoder.run([s for s in running if not s.finish_reason])
        for one in [s for s in running if s.finish_reason and s.in_flight == 0]:
            running.remove(one)
            gone.append(int(one.request.key))
        if not running:
            assert decoder.drain() == 0
            return gone


def decoder_of(script: Script) -> LaggedDecoder:
    return LaggedDecoder(script, Budget(costs(1.0, 0.1), most=81), size=4)


def end_prompts(
    decoder: LaggedDecoder,
    script: Script,
    pieces: list[tuple[Sequence, int]],
    members: list[Sequence],
) -> None:
    began = time.perf_counter()
    decoder.after_prompts(pieces, members, script.launch(members, 0), began=began)


@pytest.mark.parametrize("pace", [[1], [1, 2, 3], [4, 1], [7]])
def test_every_text_is_whole_whatever_a_step_gives(pace: list[int]) -> None:
    texts = {key: list(range(10 * key, 10 * key + 5 + 3 * key)) for key in range(1, 5)}
    batch = [sequence(key, len(texts[key])) for key in texts]
    assert sorted(run(Script(texts, pace), batch)) == [1, 2, 3, 4]
    for one in batch:
        assert one.tokens[1:] == texts[int(one.request.key)]
        assert one.finish_reason == "length"


def test_what_comes_after_a_stop_string_is_thrown_away() -> None:
    """The device does not know it and goes on; the slot stays taken until that step is read."""
    texts = {1: list(range(20, 60)), 2: list(range(60, 100))}
    batch = [sequence(1, 40, stop=["27 "]), sequence(2, 40)]
    script = Script(texts, [2])
    decoder = decoder_of(script)
    kept_busy = 0
    for _ in range(30):
        decoder.run([s for s in batch if not s.finish_reason])
        kept_busy += bool(batch[0].finish_reason) and batch[0].in_flight > 0
    decoder.drain()
    assert batch[0].tokens[1:] == list(range(20, 28))
    assert batch[0].finish_reason == "stop"
    assert kept_busy == 1, "the step under way when it ended holds its slot, and only that one"
    assert batch[1].tokens[1:] == texts[2]


def test_the_device_has_the_next_step_before_the_host_reads_the_last() -> None:
    script = Script({1: list(range(20, 40))}, [1])
    one = sequence(1, 20)
    decoder = decoder_of(script)
    assert decoder.run([one]) == 0
    assert len(script.under_way) == 1
    decoder.run([one])
    assert len(script.under_way) == 1 and script.launches == 2
    assert one.in_flight == 1
    assert decoder.drain() == 1
    assert one.in_flight == 0 and decoder.drain() == 0


def test_nothing_is_made_ready_for_sequences_that_have_all_ended_meanwhile() -> None:
    script = Script({1: [20, 21], 2: [60, 61]}, [4])
    batch, decoder = [sequence(1, 2), sequence(2, 2)], decoder_of(script)
    decoder.run(batch)
    script.prepared.clear()  # what would come next has another shape, and waits for what runs
    assert decoder.run(batch) == 4, "both end in the step that is read first"
    assert script.launches == 1 and not script.prepared
    assert not decoder.under_way


def test_the_token_after_a_prompt_is_read_when_the_next_step_is_under_way() -> None:
    script = Script({1: list(range(20, 40))}, [1])
    one, decoder = sequence(1, 20), decoder_of(script)
    end_prompts(decoder, script, [(one, 7)], [one])
    assert decoder.run([]) == 0 and one.in_flight == 1, "nothing was started behind it yet"
    end_prompts(decoder, script, [(one, 1)], [])
    assert decoder.run([one]) == 1
    assert one.tokens == [5, 20] and one.in_flight == 1
    assert one.figures.prefill_s > 0 and one.figures.forwards == 0, "a prompt is no decode step"
    assert decoder.drain() == 1 and one.figures.forwards == 1


def test_prompts_that_the_host_starts_meanwhile_are_not_in_a_steps_time() -> None:
    script = Script({1: list(range(20, 40)), 2: list(range(60, 80))}, [1])
    one, two = sequence(1, 20), sequence(2, 20)
    decoder = LaggedDecoder(script, Budget(costs(0.003, 0.0), most=81), size=4)
    decoder.run([one])
    time.sleep(0.1)  # the host makes a prefill
    end_prompts(decoder, script, [(two, 7)], [two])
    decoder.begin_step()
    decoder.run([one, two])
    assert one.figures.decode_s < 0.01, "what a step took"
    assert two.figures.prefill_s > 0.09, "what passed else belongs to the prompts"
    before = one.figures.decode_s
    time.sleep(0.1)  # with nobody coming or going, it is only slow
    decoder.begin_step(others=False)
    decoder.run([one, two])
    assert one.figures.decode_s - before > 0.1


def test_what_passes_before_all_is_read_for_somebody_is_not_in_a_steps_time() -> None:
    script = Script({1: list(range(20, 40))}, [1])
    one, decoder = sequence(1, 20), decoder_of(script)
    decoder.run([one])
    time.sleep(0.1)
    assert decoder.drain() == 1
    assert one.figures.decode_s < 0.05


def test_a_step_teaches_what_its_kind_takes_if_those_around_it_are_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script({1: list(range(20, 60))}, [1])
    script.is_ready = lambda members, size: True  # type: ignore[method-assign]
    one, decoder, typical = sequence(1, 40), decoder_of(script), []
    monkeypatch.setattr(Budget, "count", lambda *_, **more: typical.append(more["typical"]))
    for size in (8, 8, 1, 1, 1, 8, 8, 8):
        decoder.run([one], size)
    end_prompts(decoder, script, [(one, 7)], [])
    decoder.run([one], 8)
    decoder.drain()
    # The first has none before it; prompts between them make no difference.
    assert typical == [False, False, False, True, False, False, True, True, True]


class Clockwork(Script):
    """The host waits so long for each step, by a clock that else stands still."""

    seconds = 0.02

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: list[int]) -> None:
        super().__init__({0: text}, [1])
        self.now = 100.0
        monkeypatch.setattr(lagged, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def read(self, handle: int) -> Reading:
        self.now += self.seconds
        return Reading(super().read(handle).outcomes, self.seconds)


def test_it_is_known_until_when_the_device_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Clockwork(monkeypatch, [1] * 50)
    decoder, one = decoder_of(script), sequence(0, 50)
    for _ in range(2):  # before anything was measured
        decoder.run([one])
    for _ in range(5):
        begin = script.now
        decoder.run([one])
        assert script.now < decoder.done_at <= script.now + script.seconds
        assert decoder.done_at >= begin + script.seconds
    decoder.drain()
    assert decoder.done_at <= script.now


class SlowHost:
    """A device that is quicker than the host, and a clock that says so.

    The host takes so long for what a step gave; now and then it has something else to do.
    """

    LAUNCH_S, DELAY_S, EVERY = 0.0002, 0.02, 40

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.now, self.owed, self.tokens, self.steps = 100.0, 0.0, tokens, 0
        self.done: dict[int, tuple[int, float, int]] = {}
        monkeypatch.setattr(lagged, "time", SimpleNamespace(perf_counter=lambda: self.now))

    @staticmethod
    def device_s(size: int) -> float:
        return 0.0005 + 0.00002 * size

    @staticmethod
    def host_s(size: int) -> float:
        return 0.001 if size == 1 else 0.0025

    def is_ready(self, members: ListLike[Sequence], size: int) -> bool:
        self.now, self.owed = self.now + self.owed, 0.0  # what was read before
        return True

    def prepare(self, members: ListLike[Sequence], size: int) -> None: ...

    def launch(self, members: ListLike[Sequence], size: int) -> int:
        self.now += self.LAUNCH_S
        self.steps += 1
        self.done[self.steps] = size, self.now + self.device_s(size), len(members)
        return self.steps

    def read(self, handle: int) -> Reading:
        size, done, count = self.done.pop(handle)
        self.now = max(self.now, done)
        self.owed = self.host_s(size) + self.DELAY_S * (handle % self.EVERY == 0)
        tokens = [7] * min(size, self.tokens)
        return Reading([Outcome(tokens, size - 1, len(tokens) - 1)] * count, self.device_s(size))


def test_a_step_takes_its_launch_too_where_nothing_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it is before each step while rows for the host run beside these."""
    host, one, two = SlowHost(monkeypatch, 1), sequence(0, 99), sequence(1, 99)
    decoder = LaggedDecoder(host, Budget(costs(0.001, 0.0), most=81), size=1)
    for _ in range(3):
        decoder.run([one])
        decoder.drain()
    step_s = host.LAUNCH_S + host.device_s(1)
    assert one.figures.decode_s == pytest.approx(3 * step_s)
    began = host.now
    decoder.after_prompts([(two, 7)], [two], host.launch([two], 1), began=began)
    decoder.drain()
    assert two.figures.prefill_s == pytest.approx(step_s)


def told_and_true(
    monkeypatch: pytest.MonkeyPatch, tokens: int, most: int, *, steps: int = 1500
) -> tuple[float, float, list[int]]:
    """The speed-up that figures say, that of the same host with plain steps alone; all sizes."""
    host, sizes = SlowHost(monkeypatch, tokens), []
    launch = host.launch

    def noted(members: ListLike[Sequence], size: int) -> int:
        sizes.append(size)
        return launch(members, size)

    host.launch = noted  # type: ignore[method-assign]
    one = sequence(0, 1 << 30)
    timed = {(1, size): host.device_s(size) for size in STEP_SIZES}
    budget = Budget(CostTable(timed, context=1, per_context=0.0), most=most)
    decoder = LaggedDecoder(host, budget)
    for _ in range(steps):
        decoder.run([one])
    decoder.drain()
    # Delays come with rows that end, so with tokens: as many in either case.
    said, figures = len(one.tokens) - 1, one.figures
    delays = steps // host.EVERY * host.DELAY_S
    plain_s = said * (host.host_s(1) + host.LAUNCH_S) + delays
    return figures.baseline_s / figures.decode_s, plain_s / (host.now - 100.0), sizes


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (2, 81), (3, 81), (1, 81)])
def test_figures_say_what_drafts_bring_where_the_host_is_the_slower_one(
    monkeypatch: pytest.MonkeyPatch, tokens: int, most: int
) -> None:
    told, true, _ = told_and_true(monkeypatch, tokens, most)
    assert told == pytest.approx(true, rel=0.05)
    assert true > 0.95, "drafts that bring nothing were made for too long"


def test_plain_steps_are_seldom_once_it_is_known_what_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, true, sizes = told_and_true(monkeypatch, 3, 81, steps=9000)
    assert told == pytest.approx(true, rel=0.05)
    early, late = sizes[:2000], sizes[2600:]
    assert early.count(1) / len(early) == pytest.approx(3 / 256, rel=0.1)
    assert 0.004 < late.count(1) / len(late) <= 0.005


@pytest.mark.parametrize("fails", ["prepare", "launch"])
def test_tokens_that_were_read_before_memory_ran_out_are_counted(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script({0: list(range(10, 20))}, [2])
    decoder, one = decoder_of(script), sequence(0, 10)
    decoder.run([one])

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    script.prepared.clear()
    with monkeypatch.context() as patch:
        patch.setattr(script, fails, full)
        with pytest.raises(torch.OutOfMemoryError):
            decoder.run([one])
    assert len(one.tokens) == 3 and decoder.drain() == 2
    assert decoder.run([one]) == 0 and decoder.drain() == 2
