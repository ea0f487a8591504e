"""The engine: requests in, completions out, one forward a step.

    admit → prefill → draft → forward → verify → commit → learn → retire

Each verb is owned by another module; this one only lets them follow each other.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from trbatch.config import EngineConfig
from trbatch.engine import drafting, sizing, spans, verify
from trbatch.engine.bigrams import rows_of
from trbatch.engine.budget import Budget
from trbatch.engine.calibration import Calibration
from trbatch.engine.choosing import choose_tokens
from trbatch.engine.drafter import Drafter
from trbatch.engine.drafting import Draft
from trbatch.engine.likeliest import Blocks, argmax, blocks_of, topk
from trbatch.engine.matrix import CANDIDATES, EMPTY, ORDERS, TASK_ORDERS, Matrix
from trbatch.engine.model import CausalModel, LoadedModel
from trbatch.engine.paths import PathCounts
from trbatch.engine.replica import Copies
from trbatch.engine.scheduler import Scheduler
from trbatch.engine.sequence import Completion, Figures, Request, Sequence, TaskKey
from trbatch.engine.tasks import Task, Tasks
from trbatch.engine.text import EncodingFailed, StopChecker, encode
from trbatch.engine.tree import Tree, fixed_tree
from trbatch.errors import RowError

MAX_TASKS = 8  # matrices in memory
_NOBODY = MAX_TASKS  # one more, that stays empty
_ALONE = 32  # one row in so many is drafted without its task's rows, to tell what these bring
_SMALL_TREE = 6.0  # tokens a step and sequence


class Engine:
    """Decodes requests together on one device.

    Args:
        loaded: the model.
        config: sizes and the device's share.
        tree: a fixed draft tree in nested order, of which `tree_size` nodes are used; None as
            `config.tree` says.
        orders: longest context that keys a sequence's own rows, tokens.
        task_orders: the same of a task's rows.

    Raises:
        ModelError: the model is not supported, or not even one sequence fits into memory.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig | None = None,
        *,
        tree: Tree | None = None,
        orders: int = ORDERS,
        task_orders: int = TASK_ORDERS,
    ) -> None:
        config = config or EngineConfig()
        self.loaded, self.config = loaded, config
        self.capacity = sizing.max_num_seqs(config, loaded)
        self.max_model_len = sizing.max_model_len(config, loaded)
        # Tokens a step per sequence, at most: the root and its nodes.
        self._most = (config.tree_size or config.max_tree_size) if config.speculate else 1
        self._model = CausalModel(loaded, page_size=config.page_size)
        slots = sizing.cache_slots(
            config, loaded, self._model.bytes_per_token,
            sequences=self.capacity, longest=self.max_model_len + self._most,
        )  # fmt: skip
        self._cache = self._model.allocate(slots)
        self._scheduler = Scheduler(self._cache, slots=self.capacity, spare=self._most)
        bigrams = None
        if config.bigrams and self._most > 1:
            bigrams = rows_of(self._model, candidates=min(CANDIDATES, loaded.vocab_size))
        self._matrix = Matrix(
            slots=self.capacity, vocab_size=loaded.vocab_size, tasks=MAX_TASKS + 1,
            device=loaded.device, orders=orders, task_orders=task_orders, bigrams=bigrams,
        )  # fmt: skip
        self._calibration = Calibration(MAX_TASKS + 1, loaded.device)
        self._paths = [PathCounts() for _ in range(MAX_TASKS + 1)]
        self._tasks = Tasks(
            self._matrix, self._calibration, self._paths,
            places=MAX_TASKS, model=loaded.fingerprint, model_name=loaded.name,
        )  # fmt: skip
        self.copies = Copies(self._matrix, self._tasks)
        self._finished: list[Completion] = []
        self._busy_s, self._forwards, self._tokens = 0.0, 0, 0
        fixed = self._most if config.tree_size or not config.speculate else 0
        costs = sizing.step_costs(self._model, loaded, self._most, self.capacity, fixed=fixed)
        self.budget = Budget(costs, most=self._most)
        self._drafter = Drafter(
            self._matrix, self._calibration, self._paths, self.budget, config,
            most=self._most, template=fixed_tree(config, tree),
        )  # fmt: skip

    @property
    def unfinished(self) -> int:
        """Requests that were added and not yet returned by `step`."""
        return len(self._scheduler) + len(self._finished)

    def open_task(self, key: TaskKey) -> Task:
        """Make a task's matrix ready, from its saved file if there is one. Harmless twice."""
        return self._tasks.open(key, busy=self._busy_tasks())

    def save_tasks(self) -> None:
        """Write the matrices of tasks that changed since the last time."""
        self._tasks.save()

    def add(self, request: Request) -> None:
        """Queue a request. One that cannot run comes back from the next `step` as an error."""
        try:
            ids = encode(self.loaded.tokenizer, request, self.loaded.vocab_size)
        except EncodingFailed as failed:
            self._refuse(request, failed.error)
            return
        if len(ids) >= self.max_model_len:
            self._refuse(request, RowError(
                "prompt_too_long",
                f"the prompt has {len(ids)} tokens; prompt and output together may have "
                f"{self.max_model_len} (--max-model-len)",
            ), len(ids))  # fmt: skip
            return
        self._scheduler.add(
            Sequence(
                request=request,
                tokens=ids,
                prompt_length=len(ids),
                max_tokens=min(request.sampling.max_tokens, self.max_model_len - len(ids)),
                stop=StopChecker(
                    self.loaded.tokenizer, request.sampling, self.loaded.eos_token_ids
                ),
                figures=Figures(added=time.perf_counter()),
            )
        )

    def abort(self, keys: Iterable[Hashable]) -> None:
        """Drop requests; they are not returned."""
        unwanted = set(keys)
        self._scheduler.drop(unwanted)
        self._finished = [done for done in self._finished if done.key not in unwanted]

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Prefill a piece of the prompts that wait, then decode once. Returns who finished."""
        start = time.perf_counter()
        while self._scheduler.can_admit() and self._tasks.can_open(
            self._scheduler.waiting[0].request.task, self._busy_tasks()
        ):
            self._begin(self._scheduler.admit())
        if prefilling := self._scheduler.prefilling():
            self._prefill(prefilling)
        if decoding := self._scheduler.decoding():
            self._decode(decoding)
        finished, self._finished = self._finished, []
        self._busy_s += time.perf_counter() - start
        return finished

    def forget(self) -> None:
        """Empty all matrices in memory, as if nothing had been decoded. For measurements."""
        self._tasks.forget()

    def forget_rows(self) -> None:
        """Empty the matrices, but keep what was counted of how far candidates can be trusted."""
        self._tasks.forget(counts=False)

    def stats(self) -> dict[str, Any]:
        """What the engine did since it was made (counts, seconds), and on what (texts)."""
        return {
            "tokens": self._tokens,
            "forwards": self._forwards,
            "busy_s": self._busy_s,
            "tree_sizes": dict(sorted(self.budget.chosen.items())),
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "device": sizing.machine_name(self.loaded.device),
            "model_fingerprint": self.loaded.fingerprint,
        }

    def _refuse(self, request: Request, error: RowError, prompt_tokens: int = 0) -> None:
        self._finished.append(
            Completion(
                key=request.key,
                finish_reason="error",
                error_code=error.code,
                error_message=error.message,
                prompt_tokens=prompt_tokens,
                seed=request.seed,
                sample_index=request.sample_index,
            )
        )

    def _busy_tasks(self) -> set[int]:
        return {sequence.task for sequence in self._scheduler.running if sequence.task >= 0}

    def _begin(self, sequence: Sequence) -> None:
        sequence.figures.started = time.perf_counter()
        sequence.task = self.open_task(sequence.request.task).index
        alone = sequence.request.seed % _ALONE == _ALONE - 1
        sequence.reads = _NOBODY if alone else sequence.task
        self._matrix.clear_slot(sequence.slot)

    def _prefill(self, sequences: list[Sequence]) -> None:
        """One forward over pieces of prompts, `prefill_chunk` tokens in all."""
        start, left = time.perf_counter(), self.config.prefill_chunk
        pieces: list[tuple[Sequence, int]] = []
        for sequence in sequences:
            count = min(left, sequence.prompt_length - sequence.cached)
            if count == 0:
                break
            pieces.append((sequence, count))
            left -= count
        where = [spans.of_prompt(sequence, count) for sequence, count in pieces]
        tokens = [
            token
            for sequence, count in pieces
            for token in sequence.tokens[sequence.cached : sequence.cached + count]
        ]
        learning = self._most > 1 and self.config.recycle_prompts
        everywhere = learning and self._wants_prompt_candidates()
        ends = torch.tensor([count for _, count in pieces]).cumsum(0) - 1
        ends = ends.to(self.loaded.device)
        logits = self._model.forward(self._ids(tokens), where, None if everywhere else ends)
        last = logits[ends] if everywhere else logits
        if learning:
            self._learn_prompts(pieces, logits if everywhere else None)
        for sequence, count in pieces:
            sequence.cached += count
        first = self._first_tokens([sequence for sequence, _ in pieces], last)
        seconds = time.perf_counter() - start
        for sequence, count in pieces:
            sequence.figures.prefill_s += seconds * count / len(tokens)
        for sequence, token in first:
            self._tokens += sequence.take([token])
            self._retire_if_finished(sequence)

    def _wants_prompt_candidates(self) -> bool:
        """Whether prompts are worth the output projection at each of their tokens.

        A GPU does it in passing. On a CPU it is a quarter of a prefill, and a tree of few nodes
        hardly ever asks for more than the prompt's own next token (docs/performance.md).
        """
        return self.loaded.device.type != "cpu" or self.budget.usual_size > _SMALL_TREE

    def _learn_prompts(self, pieces: list[tuple[Sequence, int]], logits: Tensor | None) -> None:
        """Recycle prompts: the candidates of each token, or None for the texts alone."""
        wide = self._matrix.candidates
        candidates = None if logits is None else topk(blocks_of(logits), wide)
        # The later row of the input wins, whatever the slots.
        for sequence, count in sorted(pieces, key=lambda piece: piece[0].turn):
            start = sum(c for s, c in pieces[: [s for s, _ in pieces].index(sequence)])
            end = sequence.cached + count
            drafting.learn_prompt(
                self._matrix, self._ids(sequence.tokens[: end + 1]), sequence.cached,
                count if candidates is None else candidates[start : start + count],
                sequence.slot, sequence.task,
            )  # fmt: skip
            self._tasks.touch(sequence.task)

    def _first_tokens(
        self, sequences: list[Sequence], logits: Tensor
    ) -> list[tuple[Sequence, int]]:
        """The token after each wholly prefilled prompt."""
        ready = [i for i, sequence in enumerate(sequences) if sequence.prefilled]
        if not ready:
            return []
        who = [sequences[i] for i in ready]
        chosen = choose_tokens(who, logits[ready], [[]] * len(ready))
        return list(zip(who, chosen.tolist(), strict=True))

    def _decode(self, batch: list[Sequence]) -> None:
        start = time.perf_counter()
        context = sum(len(sequence.tokens) for sequence in batch) / len(batch)
        plain_s = self.budget.plain_seconds(len(batch), context)
        slots = self._ids([sequence.slot for sequence in batch])
        reads = self._ids([sequence.reads for sequence in batch])
        recycling = self._most > 1 and (bool(self.config.tree_size) or self.budget.wants_draft())
        last = self._last_tokens(batch)
        plain = drafting.roots(last)
        ahead = self._drafter.look_ahead(batch) if recycling else None
        drafted = plain
        if recycling:
            drafted = self._drafter.draft(last, slots, reads, ahead, context) or plain
        logits = self._verify_forward(batch, drafted)
        blocks = blocks_of(logits)
        verdict = self._drafter.accept(drafted, self._chosen(batch, drafted, logits, blocks))
        taken = self._commit(batch, verdict)
        tokens = sum(drafted.sizes)
        if recycling:
            # Also where no node was worth it: what is not recycled now cannot be drafted later.
            self._keep_accepted(batch, verdict)
            # Before rows change.
            self._drafter.calibrate(batch, drafted, verdict, slots, reads, ahead)
            self._learn(batch, drafted, blocks, verdict, slots)
        seconds = time.perf_counter() - start
        self._forwards += 1
        for sequence, size, (count, accepted) in zip(batch, drafted.sizes, taken, strict=True):
            sequence.figures.count_forward(
                tokens=count, accepted=accepted, drafted=size - 1, seconds=seconds, plain_s=plain_s
            )
            self._retire_if_finished(sequence)
        self.budget.count(tokens, len(batch), context, seconds)

    def _last_tokens(self, batch: list[Sequence]) -> Tensor:
        rows = [([-1] * ORDERS + sequence.tokens)[: -ORDERS - 1 : -1] for sequence in batch]
        return torch.tensor(rows, device=self.loaded.device)

    def _verify_forward(self, batch: list[Sequence], drafted: Draft) -> Tensor:
        """Raw logits [N, V] of the drafted nodes, sequence after sequence."""
        nodes = [drafted.tokens[index, :size] for index, size in enumerate(drafted.sizes)]
        where = spans.of_trees(batch, drafted, self.loaded.max_positions)
        return self._model.forward(torch.cat(nodes).clamp_(min=0), where)

    def _chosen(
        self, batch: list[Sequence], drafted: Draft, logits: Tensor, blocks: Blocks
    ) -> Tensor:
        """[B, T] the model's own next token at each node; for sampled rows where the walk comes."""
        width = drafted.tokens.shape[1]
        likeliest = drafting.padded(argmax(blocks), drafted.sizes, width, verify.NOT_CHOSEN)
        plain = [s.request.sampling.greedy and not s.request.logits_processors for s in batch]
        if all(plain):
            return likeliest
        is_plain = torch.tensor(plain, device=logits.device)[:, None]
        chosen = torch.where(is_plain, likeliest, verify.NOT_CHOSEN)
        offsets = self._ids(drafted.offsets)

        def choose_at(members: Tensor, nodes: Tensor) -> Tensor:
            paths = [
                drafted.tokens[i][drafted.ancestors[i, node]][1:].tolist()
                for i, node in zip(members.tolist(), nodes.tolist(), strict=True)
            ]
            who = [batch[i] for i in members.tolist()]
            return choose_tokens(who, logits[offsets[members] + nodes], paths)

        walkers = self._ids([i for i, is_greedy in enumerate(plain) if not is_greedy])
        verify.walk(drafted, walkers, choose_at, chosen)
        return chosen

    def _commit(self, batch: list[Sequence], verdict: verify.Verdict) -> list[tuple[int, int]]:
        """Append what was accepted and the bonus token, cut at the first end.

        Returns:
            For each sequence how many tokens it took, and how many of these were drafted.
        """
        taken = []
        for sequence, row in zip(batch, verdict.tokens.tolist(), strict=True):
            proposed = [token for token in row if token >= 0]
            count = sequence.take(proposed)
            taken.append((count, min(count, len(proposed) - 1)))
            self._tokens += count
        return taken

    def _keep_accepted(self, batch: list[Sequence], verdict: verify.Verdict) -> None:
        """Move the accepted nodes' keys and values from their tree slots to their own places."""
        sources, targets = spans.moves(batch, verdict.nodes.tolist())
        if sources:
            self._cache.move(torch.stack(sources), torch.stack(targets))

    def _learn(
        self,
        batch: list[Sequence],
        drafted: Draft,
        blocks: Blocks,
        verdict: verify.Verdict,
        slots: Tensor,
    ) -> None:
        flat = topk(blocks, self._matrix.candidates)
        width = drafted.tokens.shape[1]
        candidates = drafting.padded(flat, drafted.sizes, width, EMPTY)
        turn = [0] * len(batch)
        for place, index in enumerate(sorted(range(len(batch)), key=lambda i: batch[i].turn)):
            turn[index] = place
        tasks = self._ids([sequence.task for sequence in batch])
        self._drafter.learn(drafted, candidates, verdict, slots, tasks, turn)
        for task in {sequence.task for sequence in batch}:
            self._tasks.touch(task)

    def _retire_if_finished(self, sequence: Sequence) -> None:
        if sequence.ended:
            self._scheduler.retire(sequence)
            alone = sequence.reads != sequence.task
            self._tasks.count(sequence.task, sequence.figures.acceptance(), alone=alone)
            self._finished.append(sequence.completion())

    def _ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.loaded.device)
