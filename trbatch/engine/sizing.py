"""How much fits and how long a step takes on this machine."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from trbatch import storage
from trbatch.config import LONGEST_BY_DEFAULT, EngineConfig, cache_folder
from trbatch.engine.attention import Span
from trbatch.engine.costs import TIMED_SIZES, CostTable, cells_of, least_seconds, time_steps
from trbatch.engine.kv_cache import KVCache
from trbatch.engine.likeliest import argmax, blocks_of, topk
from trbatch.engine.model import CausalModel, LoadedModel
from trbatch.errors import Unreachable, WorkerError

logger = logging.getLogger(__name__)

_CPU_SEQS, _GPU_SEQS = 8, 128
_CPU_PREFILL, _GPU_PREFILL = 512, 2048
_CPU_CONTEXT = 2048  # tokens a sequence that the CPU's cache is made for
_TIMED_CONTEXT = 256
# However few pages there are: between shorter texts no slope could be measured.
_LEAST_CONTEXT = 32
_GPU_BATCHES = (8, 32, 64, 128)  # timed, beside one sequence and all that can run
_FORMAT = 3  # of the saved cost tables
_DRIFT = 1.25  # a saved step may be off by so much more or less than all are
_LOOKS = 2  # at a saved table before it is given up: something may have disturbed the first
# Steps of more tokens are extrapolated: on a CPU they cost what their arithmetic costs.
_CPU_TIMED, _GPU_TIMED = 64, 4096


def max_num_seqs(config: EngineConfig, loaded: LoadedModel) -> int:
    """Sequences decoded together."""
    return config.max_num_seqs or (_CPU_SEQS if loaded.device.type == "cpu" else _GPU_SEQS)


def prefill_chunk(config: EngineConfig, loaded: LoadedModel) -> int:
    """Prompt tokens of one prefill, over all its sequences."""
    return config.prefill_chunk or (_CPU_PREFILL if loaded.device.type == "cpu" else _GPU_PREFILL)


def max_model_len(config: EngineConfig, loaded: LoadedModel) -> int:
    """Prompt and output together, tokens.

    Raises:
        WorkerError: more was asked for than the model was made for.
    """
    if config.max_model_len > loaded.max_positions:
        raise WorkerError(
            f"--max-model-len {config.max_model_len} is more than the {loaded.max_positions} "
            f"tokens that {loaded.name} was made for"
        )
    return config.max_model_len or min(loaded.max_positions, LONGEST_BY_DEFAULT)


def logits_bytes(config: EngineConfig, loaded: LoadedModel, *, sequences: int, most: int) -> int:
    """What the logits of the largest step or prefill take.

    Twice: a step's own, which its graph keeps, and as many for what comes beside them: the copy of
    a model that scales or caps its logits, a step that runs before its capture, the host's own.

    Args:
        most: tokens of one sequence's step, at most.
    """
    tokens = sequences * most
    if not config.tree_size:
        tokens = max(min(tokens, most_tokens(loaded)), sequences * min(2, most))
    tokens = max(tokens, prefill_chunk(config, loaded))
    return 2 * tokens * loaded.vocab_size * loaded.dtype.itemsize


def cache_slots(
    config: EngineConfig,
    loaded: LoadedModel,
    bytes_per_token: int,
    *,
    sequences: int,
    longest: int,
    spare: int = 0,
    reserve: int = 0,
) -> int:
    """Tokens that the K/V cache is made for: what is free, and never more than can be used.

    Of use is room for all sequences at their longest, and as much again for what is known of
    prompts that nobody runs just now.

    Args:
        longest: tokens of the longest sequence with its tree.
        spare: tokens of room that no sequence gets.
        reserve: bytes that steps need beside it. It is half of what is free at most, and takes
            nothing from one such sequence: with less memory, steps get smaller (`step_costs`).

    Raises:
        WorkerError: not even one such sequence fits.
    """
    page = config.page_size
    one, spare = (-(-tokens // page) * page for tokens in (longest, spare))
    if loaded.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(loaded.device)
        usable = max(0, free - int(total * (1 - config.gpu_memory_utilization)))
        needed = (one + spare) * bytes_per_token
        if usable < needed:
            raise WorkerError(
                f"{one + spare} tokens of keys and values need {needed / 2**30:.2f} GiB, "
                f"{usable / 2**30:.2f} GiB are left for them on {loaded.device}",
                hint=_more_room(config, sequences),
            )
        usable -= min(reserve, usable // 2, usable - needed)
        most = sequences * one * (2 if config.prefix_sharing else 1)
        slots = min(usable // bytes_per_token - spare, most)
    else:
        slots = max(one, min(sequences * one, sequences * (_CPU_CONTEXT + page)))
    return slots + spare


def _more_room(config: EngineConfig, sequences: int) -> str:
    """What leaves more for the longest sequence: prompts and steps take none of its room."""
    cures = ["lower --max-model-len"]
    if sequences > 1:
        cures.append("lower --max-num-seqs (each sequence has rows of its own beside the cache)")
    if config.gpu_memory_utilization < 1:
        cures.append("raise --gpu-memory-utilization")
    return ", or ".join(cures)


def free_unused(device: torch.device) -> None:
    """Give memory back that nobody needs, after some was missing: the next to ask needs it whole.

    What failed may have left tensors that hold each other, through the frames of its error.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class Timer(Protocol):
    """Times steps."""

    longest: int  # committed tokens that a sequence can have while all run

    def __call__(self, batch: int, size: int, context: int) -> float:
        """Seconds of one step of (batch, T) with `context` committed tokens a sequence."""
        ...

    def fits(self, batch: int, size: int, context: int) -> bool:
        """Whether there are pages for such a step."""
        ...


def timed_context(cache: KVCache, capacity: int, most: int) -> int:
    """Committed tokens a sequence for which a step of the whole batch can be timed.

    Where there are hardly any pages for it, so many that smaller batches tell what texts cost.
    """
    pages = cache.pool.free // capacity
    return max(_LEAST_CONTEXT, (pages - 1) * cache.page_size - most)


def most_tokens(loaded: LoadedModel) -> int:
    """Tokens a step: more never pay, and their logits would need much memory."""
    return _CPU_TIMED if loaded.device.type == "cpu" else _GPU_TIMED


def step_costs(
    run: Timer,
    loaded: LoadedModel,
    most: int,
    capacity: int,
    *,
    fixed: int = 0,
    how: str = "",
    grid: Sequence[int] = TIMED_SIZES,
) -> CostTable:
    """The cost table of this model on this machine, timed once and kept in the cache folder.

    A machine that is merely slower or quicker than it was does not make it untrue.

    Args:
        most: tokens a step per sequence, at most.
        fixed: the only such number that will be used, beside plain steps; 0: any up to `most`.
        how: what kind of steps these are, where there is more than one.
        grid: sizes that are timed, those up to the largest that is used.
    """
    largest = fixed or most
    between = () if fixed else [size for size in grid if size < largest]
    sizes = sorted({1, *between, largest})
    others = () if loaded.device.type == "cpu" else _GPU_BATCHES
    batches = sorted({1, capacity, *(batch for batch in others if batch < capacity)})
    context = min(_TIMED_CONTEXT, run.longest)
    cells = cells_of(
        batches, sizes, most_tokens=most_tokens(loaded),
        fits=lambda batch, size: run.fits(batch, size, context),
    )  # fmt: skip
    careful = _Careful(run, loaded.device)
    file = _costs_file(loaded, sizes, capacity, how)
    kept = _read_costs(file)
    if kept is None:
        logger.info("timing steps on this machine, once …")
    elif not kept.timed.keys() >= set(cells):
        logger.info("timing steps on this machine again, there is room for larger ones now …")
    else:
        for _ in range(_LOOKS):
            if (costs := _at_todays_pace(kept, careful, sizes)) is not None:
                return costs.up_to(careful.most_tokens)
        logger.info("timing steps on this machine again, they no longer cost what they did …")
    costs = time_steps(careful, cells, context=context)
    if careful.most_tokens:
        return costs.up_to(careful.most_tokens)  # and not kept: next time there may be more memory
    _keep_costs(file, costs)
    return costs


class _Careful:
    """A timer that lowers what is asked for when memory does not suffice.

    A step that is too large takes for ever.
    """

    def __init__(self, run: Timer, device: torch.device) -> None:
        self._run, self._device = run, device
        self.longest, self.fits = run.longest, run.fits
        self.most_tokens = 0  # of a step that memory suffices for; 0: as many as were asked for

    def __call__(self, batch: int, size: int, context: int) -> float:
        """See `Timer`.

        Raises:
            OutOfMemoryError: of a step of a single token.
        """
        tokens = batch * size
        if 0 < self.most_tokens < tokens:
            return math.inf
        try:
            return self._run(batch, size, context)
        except torch.OutOfMemoryError as error:
            if tokens == 1:
                raise
            why = str(error)  # not the error itself: it holds what was on its way
        self.most_tokens = tokens // 2
        free_unused(self._device)
        logger.warning(
            "out of memory while timing a step of %d tokens, going on with steps of %d at most "
            "(a lower --gpu-memory-utilization or --max-num-seqs leaves more for them): %s",
            tokens, self.most_tokens, why,
        )  # fmt: skip
        return math.inf


class StepTimer:
    """Runs one decode forward of (batch, T, context) over whatever lies in the cache.

    Args:
        longest: see `Timer`.
    """

    def __init__(self, model: CausalModel, loaded: LoadedModel, longest: int) -> None:
        self._model, self._loaded, self.longest = model, loaded, longest

    def fits(self, batch: int, size: int, context: int) -> bool:
        """See `Timer`."""
        cache = self._model.cache
        assert cache is not None
        return cache.pool.can_take(batch * cache.pages_for(context + size))

    @torch.inference_mode()
    def __call__(self, batch: int, size: int, context: int) -> float:
        cache, device = self._model.cache, self._loaded.device
        assert cache is not None
        rooms = [cache.take_room(context + size) for _ in range(batch)]
        inner = torch.ones(size, size, dtype=torch.bool, device=device).tril() if size > 1 else None
        positions = torch.arange(context, context + size, device=device)
        positions.clamp_(max=self._loaded.max_positions - 1)
        spans = [Span(room, context, size, positions, inner) for room in rooms]
        tokens = torch.arange(batch * size, device=device) % self._loaded.vocab_size
        self._wait()
        start = time.perf_counter()
        try:
            logits = self._model.forward(tokens, spans)
            blocks = blocks_of(logits)
            (topk(blocks, min(8, logits.shape[-1])) if size > 1 else argmax(blocks))
            self._wait()
            return time.perf_counter() - start
        finally:
            for room in rooms:
                cache.give_back(room)

    def _wait(self) -> None:
        if self._loaded.device.type == "cuda":
            torch.cuda.synchronize(self._loaded.device)


def machine_name(device: torch.device) -> str:
    """The GPU's name, or what of the CPU decides its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()}-core CPU, {torch.get_num_threads()} threads, {capability}"


def _costs_file(loaded: LoadedModel, sizes: list[int], capacity: int, how: str) -> Path:
    """One file for each thing that changes the cost of a step."""
    parts = [
        _FORMAT, loaded.fingerprint, str(loaded.dtype), machine_name(loaded.device),
        torch.__version__, sizes, capacity, how,
    ]  # fmt: skip
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
    return cache_folder() / "costs" / f"{digest}.json"


def _at_todays_pace(kept: CostTable, run: Timer, sizes: list[int]) -> CostTable | None:
    """The table as fast as the machine is now; None if its steps no longer go by their ratios."""
    # The table may have been timed with a longer cache than there is now.
    tree, context = max(t for t in sizes if t <= 4), min(kept.context, run.longest)
    batches = sorted({1, max(batch for batch, _ in kept.timed)})
    cells = [(batch, size, context) for batch in batches for size in sorted({1, tree})]
    least = least_seconds(run, [cell for cell in cells if run.fits(*cell)])
    off = [
        math.log(seconds / kept.seconds(*cell))
        for cell, seconds in least.items()
        if seconds < math.inf
    ]
    if max(off) - min(off) > 2 * math.log(_DRIFT):
        return None
    return kept.scaled(math.exp((max(off) + min(off)) / 2))


def _read_costs(file: Path) -> CostTable | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        timed = {(int(b), int(t)): float(s) for b, t, s in kept["timed"]}
        return CostTable(timed, context=kept["context"], per_context=kept["per_context"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        # Whatever is wrong with it: it can be made again, and will be overwritten.
        return None


def _keep_costs(file: Path, costs: CostTable) -> None:
    kept = {
        "timed": [[b, t, s] for (b, t), s in sorted(costs.timed.items())],
        "context": costs.context,
        "per_context": costs.per_context,
    }
    try:
        storage.folder(file.parent).write(file.name, json.dumps(kept).encode())
    except (OSError, Unreachable) as error:  # it costs the next start some seconds
        logger.warning("what steps cost is not kept: %s", error)
