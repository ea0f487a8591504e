"""How soon greedy texts in 16 bits part from those of plain decoding, and by how little.

    python docs/measurements/scripts/divergence.py --prompts prompts.jsonl --tree-size 8,32

In 16 bits a sum depends on the order in which it is made, which depends on how many rows and tokens
are computed together: where two tokens are nearly as likely, another batch size may take the other
one. So texts of plain decoding at batch `--batch` are compared with three kinds of others: those of
plain decoding at batch 1, which is how much batching alone does, and recycled ones at `--batch`,
with trees as the budget chooses and of fixed sizes. Recycling adds nothing of its own if the rates
are alike.

A rate is the rows that part, over the tokens up to there (of rows that never do, all), times 1,000.
The gap is what lies, at the first token that differs, between the logits of the two that were
taken, as transformers computes them on the text before: an error would show as a large one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import deliver, numbers, parser_of, release, say

from trbatch.config import EngineConfig, SamplingParams
from trbatch.engine.bench_prompts import length, read_prompts, requests_of
from trbatch.engine.bench_runs import conditions, decode
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Request
from trbatch.engine.text import encode
from trbatch.errors import InputError
from trbatch.models import load_model, load_unmodified

Ids = list[int]
ALONE = "plain, batch 1"


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two texts have different tokens."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), None)


def figures(
    base: Sequence[Ids], other: Sequence[Ids], gap_of: Callable[[int, int], float]
) -> dict[str, Any]:
    """How often and how far texts part.

    Args:
        gap_of: (row, place) -> what lies between the logits of both tokens there.
    """
    gaps, tokens = [], 0
    for row, (one, two) in enumerate(zip(base, other, strict=True)):
        place = first_difference(one, two)
        tokens += min(len(one), len(two)) if place is None else place
        if place is not None:
            gaps.append(round(gap_of(row, place), 4))
    return {
        "diverged": len(gaps),
        "of": len(base),
        "tokens_until_then": tokens,
        "per_1000_tokens": round(1000 * len(gaps) / tokens, 3) if tokens else None,
        "median_gap": statistics.median(gaps) if gaps else None,
        "largest_gap": max(gaps, default=None),
        "logit_gaps": sorted(gaps),
    }


def compared(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, and each rate over that of plain decoding at batch 1."""
    alone = found[ALONE]["per_1000_tokens"]
    return {
        name: {
            **one,
            "rate_over_plain_batch_1": round(one["per_1000_tokens"] / alone, 3) if alone else None,
        }
        for name, one in found.items()
    }


class Gaps:
    """What lies between the logits of the tokens that two texts took.

    Args:
        network: of transformers, unmodified.
        base, other: the texts of the prompts, by row.
    """

    def __init__(
        self, network: Any, prompts: Sequence[Ids], base: Sequence[Ids], other: Sequence[Ids]
    ) -> None:
        self._network, self._prompts, self._base, self._other = network, prompts, base, other

    @torch.inference_mode()
    def __call__(self, row: int, place: int) -> float:
        one, other = self._base[row], self._other[row]
        ids = torch.tensor([[*self._prompts[row], *one[:place]]], device=self._network.device)
        logits = self._network(ids).logits[0, -1].float()
        return abs(float(logits[one[place]] - logits[other[place]]))


def texts(loaded: LoadedModel, requests: list[Request], longest: int, **settings: Any) -> list[Ids]:
    """The tokens of each text, decoded by an engine of its own."""
    engine = Engine(loaded, EngineConfig(max_model_len=longest, **settings))
    done, seconds = decode(engine, requests)
    say(f"{settings}: {seconds:.1f} s, steps by tokens a row: {engine.stats()['tree_sizes']}")
    del engine
    release()
    return [one.token_ids for one in done]


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All texts, and what of them differs."""
    loaded = load_model(options.model, device=options.device, dtype=options.dtype)
    most = loaded.max_positions - options.max_tokens
    lengths = {p: length(loaded, p.text) for p in read_prompts(options.prompts, options.limit)}
    prompts = [prompt for prompt, tokens in lengths.items() if tokens <= most]
    if not prompts:
        raise InputError(f"{options.prompts} has no prompt of at most {most} tokens")
    longest = max(lengths[prompt] for prompt in prompts) + options.max_tokens
    requests = requests_of(prompts, SamplingParams(max_tokens=options.max_tokens))
    batch = options.batch
    base = texts(loaded, requests, longest, max_num_seqs=batch, speculate=False)
    others = {
        ALONE: texts(loaded, requests, longest, max_num_seqs=1, speculate=False),
        f"recycled, batch {batch}": texts(loaded, requests, longest, max_num_seqs=batch),
    }
    for size in options.tree_size:
        found = texts(loaded, requests, longest, max_num_seqs=batch, tree_size=size)
        others[f"recycled, batch {batch}, {size} tokens"] = found
    network = load_unmodified(options.model, loaded)
    ids = [encode(loaded.tokenizer, request, loaded.vocab_size) for request in requests]
    return {
        **conditions(loaded, options.prompts, len(prompts), options.max_tokens),
        "against": f"plain, batch {batch}",
        "runs": compared(
            {
                name: figures(base, other, Gaps(network, ids, base, other))
                for name, other in others.items()
            }
        ),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--prompts", type=Path, required=True, help="JSONL rows, as `trbatch bench` takes them")
    add("--model", default="", help="hub name, folder or GGUF file; default: the small model")
    add("--device", default="auto", help="cpu, cuda:0, …; auto: the first GPU, else the CPU")
    add("--dtype", default="bfloat16", help="numbers to compute with; default: bfloat16")
    add("--batch", type=int, default=32, help="rows decoded together; default: 32")
    add("--max-tokens", type=int, default=128, help="most tokens of a text; default: 128")
    add("--limit", type=int, default=240, help="prompts, the first; 0: all; default: 240")
    add("--tree-size", type=numbers, default=[], help="and recycled with so many tokens: 8,32")
    return deliver(measured, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
