"""The engine: requests in, completions out, one forward a step.

    admit → prefill → draft → forward → verify → commit → learn → retire

Each verb is owned by another module; this one only lets them follow each other. On a GPU, steps run
wholly on the device and are read one late (`device_step`, `lagged`); rows whose next token the host
has to choose, and all rows on a CPU, go through `eager`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as ListLike
from dataclasses import replace
from typing import Any

import torch

from trbatch.config import EngineConfig
from trbatch.engine import sizing
from trbatch.engine.bigrams import rows_of
from trbatch.engine.budget import Budget
from trbatch.engine.busy import BusyTime
from trbatch.engine.calibration import Calibration
from trbatch.engine.costs import TIMED_SIZES, CostTable
from trbatch.engine.curve import STEP_SIZES
from trbatch.engine.device_prefill import DevicePrefiller
from trbatch.engine.device_step import DeviceStep, Operations, operations_for
from trbatch.engine.drafter import Drafter
from trbatch.engine.eager import EagerDecoder
from trbatch.engine.grammar import Grammars
from trbatch.engine.intake import Intake
from trbatch.engine.lagged import LaggedDecoder
from trbatch.engine.matrix import ORDERS, TASK_ORDERS, Matrix
from trbatch.engine.model import CausalModel, LoadedModel
from trbatch.engine.paths import PathCounts
from trbatch.engine.prefill import Prefiller
from trbatch.engine.prefix import Prefixes
from trbatch.engine.replica import Copies
from trbatch.engine.scheduler import Scheduler
from trbatch.engine.sequence import Completion, Request, Sequence, TaskKey
from trbatch.engine.step_timer import DeviceTimer
from trbatch.engine.tasks import Task, Tasks
from trbatch.engine.tree import Tree, fixed_tree
from trbatch.errors import RowError
from trbatch.flight import declared
from trbatch.trace import Steps

logger = logging.getLogger(__name__)

MAX_TASKS = 8  # matrices in memory
_NOBODY = MAX_TASKS  # one more, that stays empty
_TOLD = 512  # prompt tokens that are run at once where the model is to say of each what it thinks
_ALONE = 32


class Engine:
    """Decodes requests together on one device.

    Args:
        loaded: the model.
        config: sizes and the device's share.
        operations: what steps on the device are made of; None: kernels on a GPU, none on a CPU.
        tree: a fixed draft tree in nested order, of which `tree_size` nodes are used; None as
            `config.tree` says.
        orders: longest context that keys a sequence's own rows, tokens.
        task_orders: the same of a task's rows.
        costs: what steps take; None: they are timed, unless that was done before.
        alone: one row in so many is drafted without its task's rows, to tell what these bring;
            0: none, for measurements of the drafts themselves.

    Raises:
        ModelError: the model is not supported, or not even one sequence fits into memory.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig | None = None,
        *,
        operations: Operations | None = None,
        tree: Tree | None = None,
        orders: int = ORDERS,
        task_orders: int = TASK_ORDERS,
        costs: CostTable | None = None,
        alone: int = _ALONE,
    ) -> None:
        config = config or EngineConfig()
        config = replace(config, prefill_chunk=sizing.prefill_chunk(config, loaded))
        self.loaded, self.config, self._alone = loaded, config, alone
        self.capacity = sizing.max_num_seqs(config, loaded)
        self.max_model_len = sizing.max_model_len(config, loaded)
        # Tokens a step per sequence, at most: the root and its nodes.
        self._most = (config.tree_size or config.max_tree_size) if config.speculate else 1
        template = fixed_tree(config, tree)
        self._model = CausalModel(loaded, page_size=config.page_size)
        # Before the cache, which gets what is left.
        self._matrix = Matrix(
            slots=self.capacity, vocab_size=loaded.vocab_size, tasks=MAX_TASKS + 1,
            device=loaded.device, orders=orders, task_orders=task_orders,
        )  # fmt: skip
        slots = sizing.cache_slots(
            config, loaded, self._model.bytes_per_token,
            sequences=self.capacity, longest=self.max_model_len + self._most, spare=self._most,
            reserve=sizing.logits_bytes(config, loaded, sequences=self.capacity, most=self._most),
        )  # fmt: skip
        operations = operations or operations_for(loaded, config, template)
        self._cache = self._model.allocate(slots, adjacent=operations is None)
        shrinking = operations is not None and not config.tree_size
        self._scheduler = Scheduler(
            self._cache, slots=self.capacity, spare=self._most, window=config.admission_window,
            most_tokens=sizing.most_tokens(loaded) if shrinking else 0,
        )  # fmt: skip
        self._prompt_chunk = config.prefill_chunk
        if config.bigrams and self._most > 1:
            bigrams = rows_of(self._model, candidates=self._matrix.candidates)
            if bigrams is not None:
                self._matrix.bigrams.copy_(bigrams)
        self._calibration = Calibration(MAX_TASKS + 1, loaded.device)
        self._paths = [PathCounts() for _ in range(MAX_TASKS + 1)]
        self._tasks = Tasks(
            self._matrix, self._calibration, self._paths,
            places=MAX_TASKS, model=loaded.fingerprint, model_name=loaded.name,
        )  # fmt: skip
        self.copies = Copies(self._matrix, self._tasks)
        self._grammars = Grammars(loaded)
        self._intake = Intake(loaded, self._grammars, longest=self.max_model_len)
        self._finished: list[Completion] = []
        self._busy, self._forwards, self._tokens = BusyTime(), 0, 0
        self._turnover = False  # whether rows came or went since the last step
        recycling = self._most > 1
        self._prefixes = Prefixes(
            self._cache, sharing=config.prefix_sharing,
            candidates=self._matrix.candidates if recycling and config.recycle_prompts else 0,
        )  # fmt: skip
        self._stepper = self._make_stepper(operations)
        self.budget = Budget(
            costs or self._step_costs(), most=self._most, most_tokens=sizing.most_tokens(loaded)
        )
        # Beside steps on the device the host's own teach another.
        hosts = self.budget if self._stepper is None else self.budget.beside()
        drafter = Drafter(
            self._matrix, self._calibration, self._paths, hosts, config,
            most=self._most, template=template,
        )  # fmt: skip
        if self._stepper is not None:
            size = self._most if config.tree_size or not recycling else 0
            self._lagged = LaggedDecoder(self._stepper, self.budget, size=size, paths=self._paths)
            self._device_prefiller = DevicePrefiller(
                self._stepper, self._lagged, self._tasks, self._prefixes, config,
                recycling=recycling,
            )  # fmt: skip
            self._device_prefiller.prepare()
        self._prefiller = Prefiller(
            self._model, self._matrix, self._tasks, hosts, self._prefixes, config,
            recycling=recycling,
        )  # fmt: skip
        self._eager = EagerDecoder(
            self._model, self._matrix, self._tasks, hosts, drafter, config,
            recycling=recycling,
        )  # fmt: skip

    def _make_stepper(self, operations: Operations | None) -> DeviceStep | None:
        if operations is None:
            return None
        return DeviceStep(
            self._model, self._matrix, self._calibration, operations,
            capacity=self.capacity, most=self._most, longest=self.max_model_len + self._most,
            spine=self.config.spine, kept=self._prefixes.candidates,
            capture=not self.config.enforce_eager,
        )  # fmt: skip

    def timer(self) -> sizing.Timer:
        """What times steps as this engine makes them. Use it while nothing is admitted."""
        longest = sizing.timed_context(self._cache, self.capacity, self._most)
        longest = max(1, min(longest, self.max_model_len - 1))
        if self._stepper is None:
            return sizing.StepTimer(self._model, self.loaded, longest)
        return DeviceTimer(self._stepper, task=_NOBODY, longest=longest)

    def _step_costs(self) -> CostTable:
        """Time the steps that will be made, or read what was timed before."""
        config, stepper = self.config, self._stepper
        fixed = self._most if config.tree_size or not config.speculate else 0
        return sizing.step_costs(
            self.timer(), self.loaded, self._most, self.capacity, fixed=fixed,
            how=stepper.kind if stepper else "", grid=STEP_SIZES if stepper else TIMED_SIZES,
        )  # fmt: skip

    @property
    def unfinished(self) -> int:
        """Requests that were added and not yet returned by `step`."""
        return len(self._scheduler) + len(self._finished)

    def open_task(self, key: TaskKey) -> Task | None:
        """Make a task's matrix ready, from its saved file if there is one. Harmless twice.

        Returns:
            The task; None if running rows use all places. It is opened when its first row begins,
            which waits for a place.
        """
        if (task := self._tasks.ready(key)) is not None:
            return task
        if not self._tasks.can_open(key, self._busy_tasks()):
            return None
        self._absorb()
        with declared():  # a store may be slow
            return self._tasks.open(key, busy=self._busy_tasks())

    def save_tasks(self) -> None:
        """Write the matrices of tasks that changed since the last time."""
        self._absorb()
        self._tasks.save()

    def add(self, request: Request) -> None:
        """Queue a request. One that cannot run comes back from the next `step` as an error."""
        self.add_all([request])

    def add_all(self, requests: ListLike[Request]) -> None:
        """Queue requests; quicker than one by one. If this raises, none of them was taken."""
        self._turnover = True
        with self._busy.working(device_until=self._device_until()):
            for one in self._intake.prepare(requests):
                if isinstance(one, Sequence):
                    one.lagged = self._stepper is not None and self._stepper.knows_all(one)
                    self._scheduler.add(one)
                else:
                    self._finished.append(one)

    def abort(self, keys: Iterable[Hashable]) -> None:
        """Drop requests; they are not returned."""
        unwanted = set(keys)
        self._drain()
        for sequence in self._scheduler.drop(unwanted):
            self._release(sequence.slot)
        self._finished = [done for done in self._finished if done.key not in unwanted]

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Prefill a piece of the prompts that wait, then decode once. Returns who finished."""
        with self._busy.working(device_until=self._device_until()):
            return self._step()

    def _step(self) -> list[Completion]:
        too_much, in_prompts = "", True
        try:
            self._admit()
            if prefilling := self._scheduler.prefilling():
                self._turnover = True
                self._prefill(prefilling)
            in_prompts = False
            self._decode()
        except torch.OutOfMemoryError as error:
            too_much = str(error)  # not the error itself: it holds what was on its way
        if too_much:
            self._run_less(too_much, in_prompts=in_prompts)
        self._retire_ended()
        finished, self._finished = self._finished, []
        return finished

    def _device_until(self) -> float:
        """The clock when the device is through with what is under way, nearly; 0: nothing is."""
        if self._stepper is None or not self._lagged.under_way:
            return 0.0
        return self._lagged.done_at

    def _admit(self) -> None:
        while (waits := self._scheduler.next()) is not None:
            if (task := self.open_task(waits.request.task)) is None:
                break
            self._scheduler.admit(waits)
            self._begin(waits, task)
        if self._stepper is not None:
            self._stepper.write_admitted()

    def _prefill(self, sequences: list[Sequence]) -> None:
        """Run a piece of the prompts: those that decode wait for it, so it is not all at once."""
        if self._stepper is None:
            self._tokens += len(self._prefiller.run(sequences, self._prompt_chunk))
            return
        decoding = len(self._scheduler.running) > len(sequences)
        told = [s for s in sequences if s.wants_prompt_logprobs]
        sequences = [s for s in sequences if not s.wants_prompt_logprobs]
        if told:
            self._drain()  # what is said of each token is for the host, and takes much memory
            self._tokens += len(self._prefiller.run(told, min(self._prompt_chunk, _TOLD)))
        if sequences and self._device_prefiller.is_worth_it(sequences, decoding=decoding):
            self._tokens += self._device_prefiller.run(sequences, self._prompt_chunk)

    def _decode(self) -> None:
        """One step of those on the device, one of the others."""
        if self._stepper is not None:
            self._lagged.begin_step(others=self._turnover)
            self._turnover = False
        late, now = self._decoding()
        size = self._lagged.next_size(late) if late else 0
        if self._make_room(size):
            late, now = self._decoding()
        if self._stepper is not None:
            self._tokens += self._lagged.run(late, size)
            for task in {sequence.task for sequence in late}:
                self._tasks.touch(task)
        if now:
            self._drain()
            self._tokens += self._eager.run(now)
        self._forwards += bool(late) + bool(now)

    def _decoding(self) -> tuple[list[Sequence], list[Sequence]]:
        """Those that decode: whose steps are read late, and the others."""
        sequences = self._scheduler.decoding()
        late = [sequence for sequence in sequences if sequence.lagged]
        now = [sequence for sequence in sequences if not sequence.lagged]
        return late, now

    def _make_room(self, size: int) -> bool:
        """Pages for the next step of all that decode. Whoever came last gives way if need be.

        Args:
            size: tokens of each sequence whose steps are read late.

        Returns:
            Whether somebody who decoded does so no longer.
        """
        changed = False
        for sequence in list(self._scheduler.running):
            if sequence.room is not None and self._scheduler.has_room(sequence, size):
                continue  # nearly always
            while sequence.decodes and not self._scheduler.grow(sequence, size):
                changed = True
                self._free_some()
        if self._stepper is not None:
            self._stepper.set_pages()
        return changed

    def _free_some(self) -> None:
        """Pages are missing: who has ended gives its own back; if nobody has, whoever came last."""
        under_way = self._stepper is not None and self._lagged.under_way
        self._drain()  # also, who got fewer tokens than it might have needs less
        if not self._retire_ended() and not under_way:
            assert len(self._scheduler.running) > 1, "one sequence alone always fits"
            self._preempt(self._scheduler.running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence.slot)
        self._scheduler.preempt(sequence)

    def _run_less(self, why: str, *, in_prompts: bool) -> None:
        """The device's memory did not suffice: go on with smaller prefills or steps, or fewer rows.

        All begin anew from their texts, since nobody knows how far the step had come.
        """
        self._drain()
        self._retire_ended()
        sizing.free_unused(self.loaded.device)
        running, chunk = list(self._scheduler.running), self._prompt_chunk
        if in_prompts and chunk > self.config.page_size:
            self._prompt_chunk = max(self.config.page_size, chunk // 2)
            logger.warning(
                "out of memory in prompts, going on with pieces of %d tokens: %s",
                self._prompt_chunk, why,
            )  # fmt: skip
        elif most := self._lagged.shrink() if self._stepper is not None else 0:
            logger.warning(
                "out of memory in a step with drafts, going on with steps of %d tokens at most (a "
                "lower --gpu-memory-utilization or --max-num-seqs leaves more for them): %s",
                most, why,
            )  # fmt: skip
        elif len(running) == 1:
            running[0].error = RowError("out_of_memory", f"it does not fit, even alone: {why}")
            return
        else:
            self._scheduler.most = max(1, len(running) // 2)
            logger.warning(
                "out of memory with %d sequences, going on with at most %d: %s",
                len(running), self._scheduler.most, why,
            )  # fmt: skip
        for sequence in reversed(running):
            self._preempt(sequence)

    def _drain(self) -> None:
        """Read the steps that are under way, before something else may touch what they do."""
        if self._stepper is not None:
            self._tokens += self._lagged.drain()

    def _absorb(self) -> None:
        if self._stepper is not None:
            self._stepper.absorb()

    def forget(self) -> None:
        """Empty all matrices in memory, as if nothing had been decoded. For measurements."""
        self._absorb()
        self._tasks.forget()
        self._prefixes.clear()

    def forget_rows(self) -> None:
        """Empty the matrices, but keep what was counted of how far candidates can be trusted."""
        self._absorb()
        self._tasks.forget(counts=False)
        self._prefixes.clear()

    @property
    def steps(self) -> Steps:
        """How many steps it has made, by their kind."""
        return self.budget.steps

    def stats(self) -> dict[str, Any]:
        """What the engine did since it was made (counts, seconds), and on what (texts)."""
        return {
            "tokens": self._tokens,
            "forwards": self._forwards,
            "busy_s": self._busy.seconds,
            "prefix_hit_tokens": self._prefixes.hit_tokens,
            "preemptions": self._scheduler.preemptions,
            "grammar_masks": self._grammars.masks,
            "grammar_mask_s": self._grammars.seconds,
            "grammar_compile_s": self._grammars.compile_seconds,
            "tree_sizes": dict(sorted(self.budget.chosen.items())),
            "kv_pages": self._cache.pool.pages,
            "kv_pages_used": self._cache.pool.pages - self._cache.pool.free,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "device": sizing.machine_name(self.loaded.device),
            "model_fingerprint": self.loaded.fingerprint,
        }

    def _busy_tasks(self) -> set[int]:
        return {sequence.task for sequence in self._scheduler.running if sequence.task >= 0}

    def _begin(self, sequence: Sequence, task: Task) -> None:
        sequence.figures.started = sequence.figures.started or time.perf_counter()
        sequence.task = task.index
        alone = self._alone > 0 and sequence.request.seed % self._alone == self._alone - 1
        sequence.reads = _NOBODY if alone else sequence.task
        if self._stepper is None:
            self._matrix.clear_slot(sequence.slot)
        else:
            self._stepper.admit(sequence)

    def _retire_ended(self) -> int:
        """Let go of who has ended, and is in nothing that is under way. Returns how many."""
        ended = [s for s in self._scheduler.running if not s.in_flight and s.ended]
        for sequence in ended:
            self._retire(sequence)
        return len(ended)

    def _release(self, slot: int) -> None:
        if self._stepper is not None:
            self._stepper.release(slot)

    def _retire(self, sequence: Sequence) -> None:
        self._turnover = True
        self._release(sequence.slot)
        self._scheduler.retire(sequence)
        alone = sequence.reads != sequence.task
        self._tasks.count(sequence.task, sequence.figures.acceptance(), alone=alone)
        completion = self._grammars.checked(sequence.completion(), sequence.request)
        self._finished.append(completion)
