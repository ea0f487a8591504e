"""What the model says after each single token: the rows that a task's matrix begins with.

Token Recycling starts from an empty matrix, and a token that nobody has said yet has nothing to
draft from. So each vocabulary token is put once behind the opening of an answer and the k likeliest
next tokens are kept: one pass over the vocabulary, made once per model and kept in the cache
folder. The tokens of a forward are siblings behind the same opening: one flat tree.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from trbatch import storage
from trbatch.config import cache_folder
from trbatch.engine.attention import Span
from trbatch.engine.likeliest import blocks_of, topk
from trbatch.engine.model import CausalModel, LoadedModel
from trbatch.engine.text import opening_ids
from trbatch.errors import Unreachable

logger = logging.getLogger(__name__)

_FORMAT = 1  # of the saved rows
_BATCH = 512  # tokens a forward
# On a CPU a whole vocabulary takes a minute with the smallest model. Token ids of byte-pair
# encodings stand in the order of their frequency, so the first ones are nearly all that is said.
_CPU_TOKENS = 16_384
_CPU_PARAMETERS = 500_000_000  # larger models do without on a CPU


def rows_of(model: CausalModel, *, candidates: int) -> Tensor | None:
    """The rows [V, k] int32 of this model, -1 where there are none; None where they cost too much.

    Read from the cache folder, else made and kept there.
    """
    loaded = model.loaded
    count = _tokens_asked(loaded)
    if not count:
        return None
    opening = opening_ids(loaded.tokenizer)
    file = _file(loaded, opening, candidates, count)
    rows = _read(file)
    if rows is None:
        logger.info("asking the model what follows each of %d tokens (once) …", count)
        rows = make(model, opening, candidates=candidates, count=count)
        try:
            storage.folder(file.parent).write(file.name, save({"rows": rows}))
        except (OSError, Unreachable) as error:  # it costs the next start some seconds
            logger.warning("what follows each token is not kept: %s", error)
    return rows


@torch.inference_mode()
def make(model: CausalModel, opening: list[int], *, candidates: int, count: int) -> Tensor:
    """Rows [V, k] int32 of the first `count` tokens, the others -1.

    Args:
        opening: ids before each token; may be empty.
        candidates: k.
    """
    loaded, cache = model.loaded, model.cache
    assert cache is not None, "allocate the cache first"
    device, size = loaded.device, min(_BATCH, count, _room(model) - len(opening))
    rows = torch.full((loaded.vocab_size, candidates), -1, dtype=torch.int32)
    room = cache.take_room(len(opening) + size)
    if opening:
        start = torch.arange(len(opening), device=device)
        before = torch.ones(len(opening), len(opening), dtype=torch.bool, device=device).tril()
        ids = torch.tensor(opening, device=device)
        model.forward(ids, [Span(room, 0, len(opening), start, before)], start[-1:])
    alone = torch.eye(size, dtype=torch.bool, device=device)
    for tokens in torch.arange(count, device=device).split(size):
        n = len(tokens)
        positions = torch.full((n,), len(opening), device=device)
        logits = model.forward(
            tokens, [Span(room, len(opening), n, positions, alone[:n, :n])]
        )  # fmt: skip
        likeliest = topk(blocks_of(logits), candidates).to(rows)
        rows[tokens[0] : tokens[0] + n] = likeliest
    cache.give_back(room)
    return rows


def _room(model: CausalModel) -> int:
    assert model.cache is not None
    return model.cache.pool.pages * model.cache.page_size


def _tokens_asked(loaded: LoadedModel) -> int:
    if loaded.device.type != "cpu":
        return loaded.vocab_size
    parameters = sum(weight.numel() for weight in loaded.network.parameters())
    return min(loaded.vocab_size, _CPU_TOKENS) if parameters <= _CPU_PARAMETERS else 0


def _file(loaded: LoadedModel, opening: list[int], candidates: int, count: int) -> Path:
    parts: list[Any] = [_FORMAT, loaded.fingerprint, opening, candidates, count]
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
    return cache_folder() / "bigrams" / f"{digest}.safetensors"


def _read(file: Path) -> Tensor | None:
    try:
        return load_file(file)["rows"]
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("%s cannot be read and is made again: %s", file, error)
        return None
