"""How often drafts are right: tokens for each forward, which no noise of the machine can touch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trbatch.config import EngineConfig, SamplingParams
from trbatch.engine.bench_prompts import BenchPrompt, read_prompts, requests_of
from trbatch.engine.bench_runs import Progress, conditions, decode
from trbatch.engine.engine import Engine
from trbatch.engine.matrix import ORDERS, TASK_ORDERS
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Completion, Request
from trbatch.engine.text import encode
from trbatch.engine.tree import paper_tree
from trbatch.errors import UsageError
from trbatch.models import load_model
from trbatch.wording import counted

_PAPER_NODES = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceSettings:
    """What is measured.

    `orders`: longest context of a sequence's own rows, `task_orders` of the task's; `bigrams`: what
    the model says after each token stands behind them. `train`: prompts to decode first, each to
    `train_tokens` tokens (0: `max_tokens`); `forget` tells which of what they taught is kept:
    nothing is forgotten, or the rows are ("rows"), so that only the calibration stays. `reference`:
    the paper's algorithm beside it, at batch 1.
    """

    batch: int = 8
    max_tokens: int = 128
    temperature: float = 0.0
    tree: str = "best_first"
    orders: int = ORDERS
    task_orders: int = TASK_ORDERS
    bigrams: bool = True
    spine: bool = True
    train: Path | None = None
    train_tokens: int = 0
    forget: str = ""
    reference: bool = False
    check: bool = False
    tree_sizes: list[int] = field(default_factory=lambda: [_PAPER_NODES])


def acceptance(
    *,
    prompts: Path,
    model: str = "",
    limit: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = lambda _: None,
    **settings: Any,
) -> dict[str, Any]:
    """Mean accepted tokens for each forward, by tree size and category, from empty rows.

    Args:
        prompts: JSONL; of rows with `turns` the first is taken.
        limit: prompts to use, from the first; 0: all.
        settings: `AcceptanceSettings`; `tree_sizes` are nodes behind the root.

    Returns:
        The settings and one entry per tree size; the first one's figures also at the top level.
    """
    wanted = AcceptanceSettings(**settings)
    loaded = load_model(model, device=device, dtype=dtype)
    texts = read_prompts(prompts, limit)
    bench = _Bench(loaded, wanted, texts, progress)
    results = [bench.of_size(size) for size in wanted.tree_sizes]
    return {
        "bench": "acceptance",
        **conditions(loaded, prompts, len(texts), wanted.max_tokens),
        "batch": wanted.batch,
        "temperature": wanted.temperature,
        "tree": wanted.tree,
        "orders": wanted.orders,
        "task_orders": wanted.task_orders,
        "bigrams": wanted.bigrams,
        "spine": wanted.spine,
        **bench.taught(),
        "forget": wanted.forget,
        **results[0],
        "by_tree_size": results,
        **({"reference": bench.reference()} if wanted.reference else {}),
    }


class _Bench:
    def __init__(
        self,
        loaded: LoadedModel,
        wanted: AcceptanceSettings,
        prompts: list[BenchPrompt],
        progress: Progress,
    ) -> None:
        self._loaded, self._wanted, self._progress = loaded, wanted, progress
        self._prompts = prompts
        self._sampling = SamplingParams(
            max_tokens=wanted.max_tokens, temperature=wanted.temperature
        )
        self._plain: list[Completion] | None = None
        self._shared = 0  # prompts that are learned from and measured: their figures mean little
        self._train_tokens = wanted.train_tokens or wanted.max_tokens
        self._taught = self._to_learn_from(wanted.train) if wanted.train else []
        # No more keys and values than these prompts need: several benchmarks may share a GPU.
        needed = max(map(self._needed, [*self._requests(), *self._taught]))
        self._longest = min(loaded.max_positions, needed)

    def _needed(self, request: Request) -> int:
        ids = encode(self._loaded.tokenizer, request, self._loaded.vocab_size)
        return len(ids) + request.sampling.max_tokens

    def _to_learn_from(self, file: Path) -> list[Request]:
        """The requests of a training file."""
        rows = read_prompts(file)
        self._shared = len({row.text for row in rows} & {row.text for row in self._prompts})
        if self._shared:
            self._progress(f"warning: {self._shared} of {file.name} are measured as well")
        sampling = replace(self._sampling, max_tokens=self._train_tokens)
        fitting = [
            one for one in requests_of(rows, sampling)
            if self._needed(one) <= self._loaded.max_positions
        ]  # fmt: skip
        if not fitting:
            raise UsageError(f"no prompt of {file} fits into the model")
        if len(fitting) < len(rows):
            self._progress(
                f"too long: {counted(len(rows) - len(fitting), 'prompt')} of {file.name}"
            )
        return fitting

    def of_size(self, size: int) -> dict[str, Any]:
        """Figures with trees of `size` nodes."""
        wanted = self._wanted
        config = EngineConfig(
            max_num_seqs=wanted.batch, max_model_len=self._longest, tree=wanted.tree,
            spine=wanted.spine, bigrams=wanted.bigrams, tree_size=size + 1, max_tree_size=size + 1,
        )  # fmt: skip
        engine = Engine(
            self._loaded, config, orders=wanted.orders, task_orders=wanted.task_orders, alone=0
        )
        if wanted.train is not None:
            self._progress(f"tree of {size} nodes: learning from {wanted.train.name} …")
            decode(engine, self._taught)
            if wanted.forget == "rows":
                engine.forget_rows()
        self._progress(f"tree of {size} nodes …")
        done, seconds = decode(engine, self._requests())
        figures = {"tree_size": size, **self._figures(done), "seconds": round(seconds, 2)}
        self._progress(
            f"tree of {size} nodes: {figures['mean_acceptance_length']} tokens a forward"
        )
        if wanted.check:
            figures["different_from_plain"] = self._different(done)
        return figures

    def taught(self) -> dict[str, Any]:
        """What was learned from, for the figures' conditions."""
        return {
            "train": self._wanted.train.name if self._wanted.train else None,
            "train_prompts": len(self._taught),
            "train_prompts_measured": self._shared,
            "train_tokens": self._train_tokens if self._taught else None,
        }

    def reference(self) -> dict[str, Any]:
        """The paper's algorithm: one matrix, one sequence, its tree, nothing from the prompt.

        Of two places in one step that are followed by other tokens after the same token, the paper
        leaves open whose candidates stay. Here it is the accepted path's.
        """
        self._progress("the paper's algorithm, one prompt at a time …")
        config = EngineConfig(
            max_num_seqs=1, max_model_len=self._longest, tree="paper", spine=False,
            bigrams=False, recycle_prompts=False, tree_size=_PAPER_NODES + 1,
            max_tree_size=_PAPER_NODES + 1,
        )  # fmt: skip
        done, seconds = decode(
            Engine(self._loaded, config, tree=paper_tree(), orders=0, task_orders=1, alone=0),
            self._requests(),
        )
        return {"tree_size": _PAPER_NODES, **self._figures(done), "seconds": round(seconds, 2)}

    def _requests(self) -> list[Request]:
        return requests_of(self._prompts, self._sampling)

    def _different(self, done: list[Completion]) -> int:
        """How many outputs differ from plain decoding's: 0, or something is broken."""
        if self._plain is None:
            self._progress("plain decoding, to compare with …")
            config = EngineConfig(
                max_num_seqs=self._wanted.batch, max_model_len=self._longest, speculate=False
            )
            self._plain, _ = decode(Engine(self._loaded, config), self._requests())
        return sum(a.token_ids != b.token_ids for a, b in zip(done, self._plain, strict=True))

    def _figures(self, done: list[Completion]) -> dict[str, Any]:
        figures = acceptance_figures(done)
        categories = dict.fromkeys(prompt.category for prompt in self._prompts)
        if any(categories):
            figures["by_category"] = {
                category: acceptance_figures(
                    [d for d, p in zip(done, self._prompts, strict=True) if p.category == category]
                )["mean_acceptance_length"]
                for category in categories
            }
        return figures


def acceptance_figures(done: list[Completion]) -> dict[str, Any]:
    """Tokens, forwards and their ratio over all completions."""
    forwards = sum(c.num_spec_steps for c in done)
    tokens = sum(c.completion_tokens for c in done)
    drafted = sum(c.num_draft_tokens for c in done)
    accepted = sum(c.num_accepted_draft_tokens for c in done)
    width = max(len(c.acceptance_histogram) for c in done)
    histogram = [
        sum(c.acceptance_histogram[i] for c in done if i < len(c.acceptance_histogram))
        for i in range(width)
    ]
    return {
        "mean_acceptance_length": round((tokens - len(done)) / forwards, 4) if forwards else None,
        "tokens": tokens,
        "decode_forwards": forwards,
        "draft_acceptance_rate": round(accepted / drafted, 4) if drafted else None,
        "acceptance_histogram": histogram,
    }
