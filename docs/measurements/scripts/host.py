"""What the host does for each row and each step, with a device that answers at once.

    python docs/measurements/scripts/host.py --rows 1000 --batch 128 --size 1,8 --repeat 5

Steps whose results are read one late wait for the host where it takes longer than the device. Here
a step is no more than numbers that were made before: what is left is the host's own work, to take
prompts in (their template, their tokens) and for each step (who runs, room, reading, figures).
Needs no GPU; what it takes to start a graph and to copy to a GPU is not in it.

Only figures of one run can be compared. Of several repetitions the median is told.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from typing import Any

import torch
from measuring import deliver, numbers, parser_of, say
from torch import Tensor

from trbatch.config import EngineConfig, SamplingParams
from trbatch.engine.costs import CostTable
from trbatch.engine.device_state import REPORT_NUMBERS, Accepted
from trbatch.engine.device_step import Batch, Prompts, State
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sampling import Kind
from trbatch.engine.sequence import Request
from trbatch.engine_thread import MOST_TOGETHER
from trbatch.models import load_model, small_model

LONGEST, DEEPEST, MADE = 512, 12, 8  # tokens; levels of a tree; reports of each shape
PLAIN_S, SLOPE_S = 1e-3, 1e-6  # of a step: what it costs decides nothing here


class Instant:
    """Operations that give random tokens, made before they are asked for.

    Args:
        mean: tokens that a step with drafts gives a row.
    """

    captures = False

    def __init__(self, vocab_size: int, *, mean: float = 2.0) -> None:
        self._vocab_size, self._mean, self._random = vocab_size, mean, random.Random(0)
        self._made: dict[tuple[int, int], list[Accepted]] = {}
        self._logits = torch.zeros(64, vocab_size)
        self.seconds = 0.0  # that were spent here

    def admit(self, state: State, packed: Tensor, count: int) -> None:
        """Nobody looks at the slots."""

    def step(self, state: State, batch: Batch, size: int, *, sampling: Kind) -> Accepted:
        """A report that was made before."""
        return self._one_of(len(batch.rows), size)

    def prefill(self, state: State, prompts: Prompts, *, learning: bool) -> Tensor:
        """Nothing in particular."""
        return self._logits[: len(prompts.rows)]

    def recall(self, state: State, prompts: Prompts) -> None:
        """Nothing to be done."""

    def first(self, state: State, rows: Tensor, logits: Tensor, *, sampling: Kind) -> Accepted:
        """One token each."""
        return self._one_of(len(rows), 1)

    def _one_of(self, rows: int, size: int) -> Accepted:
        begin = time.perf_counter()
        if (rows, size) not in self._made:
            self._made[rows, size] = [self._make(rows, size) for _ in range(MADE)]
        found = self._random.choice(self._made[rows, size])
        self.seconds += time.perf_counter() - begin
        return found

    def _make(self, rows: int, size: int) -> Accepted:
        deepest = min(size - 1, DEEPEST)
        accepted = Accepted.nothing(rows, size, deepest, torch.device("cpu"))
        for report in accepted.report:
            count = 1
            while count <= deepest and self._random.random() < 1 - 1 / self._mean:
                count += 1
            report[0], report[2] = count, count - 1
            report[REPORT_NUMBERS : REPORT_NUMBERS + count] = torch.randint(
                self._vocab_size // 2, self._vocab_size - 1, (count,)
            )
            ranks = REPORT_NUMBERS + deepest + 1
            report[ranks : ranks + count] = torch.randint(-1, 6, (count,))
        return accepted


def engine_of(loaded: LoadedModel, batch: int, size: int) -> Engine:
    """An engine whose device answers at once."""
    config = EngineConfig(
        max_num_seqs=batch, max_model_len=LONGEST, speculate=size > 1,
        tree_size=size if size > 1 else 0,
    )  # fmt: skip
    costs = {(rows, tokens): PLAIN_S + SLOPE_S * rows * tokens
             for rows in {1, batch} for tokens in {1, size}}  # fmt: skip
    table = CostTable(costs, context=LONGEST // 2, per_context=1e-9)
    return Engine(loaded, config, operations=Instant(loaded.vocab_size), costs=table)


def requests_of(rows: int, max_tokens: int) -> list[Request]:
    """Chats of one question."""
    sampling = SamplingParams(max_tokens=max_tokens)
    question = "Write a short note about the towns number {} and {} for a friend who likes gardens."
    return [
        Request(key=i, order=i, seed=i, sampling=sampling,
                messages=[{"role": "user", "content": question.format(i, 7 * i)}])
        for i in range(rows)
    ]  # fmt: skip


def once(loaded: LoadedModel, batch: int, size: int, requests: list[Request]) -> dict[str, float]:
    """Microseconds to take a row in, milliseconds a step, microseconds a token."""
    engine = engine_of(loaded, batch, size)
    # Arithmetic here, but a handful of launches where there is a device to do it.
    engine._calibration.absorb = lambda *_, **__: None  # type: ignore[method-assign]
    operations = engine._stepper.operations  # type: ignore[union-attr]
    begin = time.perf_counter()
    for at in range(0, len(requests), MOST_TOGETHER):
        engine.add_all(requests[at : at + MOST_TOGETHER])
    added = time.perf_counter()
    steps = tokens = 0
    while engine.unfinished:
        tokens += sum(one.completion_tokens for one in engine.step())
        steps += 1
    seconds = time.perf_counter() - added - operations.seconds  # type: ignore[attr-defined]
    return {
        "add_us_a_row": 1e6 * (added - begin) / len(requests),
        "ms_a_step": 1e3 * seconds / steps,
        "us_a_token": 1e6 * seconds / tokens,
    }


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each size."""
    torch.set_num_threads(1)
    loaded = load_model(options.model or str(small_model()), device="cpu", dtype="float32")
    requests = requests_of(options.rows, options.max_tokens)
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in options.size}
    for _ in range(options.repeat):  # interleaved: the machine's pace changes
        for size in options.size:
            runs[size].append(once(loaded, options.batch, size, requests))
            say(f"{options.batch} x {size}: {runs[size][-1]}")
    return {
        **{name: getattr(options, name) for name in ("rows", "batch", "max_tokens", "repeat")},
        "sizes": {
            size: {
                name: round(statistics.median(one[name] for one in found), 3) for name in found[0]
            }
            for size, found in runs.items()
        },
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--rows", type=int, default=1000, help="rows of a job; default: 1000")
    add("--batch", type=int, default=128, help="rows decoded together; default: 128")
    add("--size", type=numbers, default=[1, 8], help="tokens a row of each step; default: 1,8")
    add("--max-tokens", type=int, default=128, help="tokens of a text; default: 128")
    add("--repeat", type=int, default=3, help="times; the median is told; default: 3")
    add("--model", default="", help="hub name, folder or GGUF file; default: the small model")
    return deliver(measured, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
