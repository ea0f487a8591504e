"""The Triton kernels and their slow twins.

Where there is no GPU they run in Triton's interpreter; where there is one, compiled on it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_devices import on_every_device
from test_attention import full_bias
from torch import Tensor

from trbatch.engine import gpu_attention, reference
from trbatch.engine.attention import Span, active, attention_forward
from trbatch.engine.kernels import attention as kernel
from trbatch.engine.kernels import likeliest
from trbatch.engine.kernels.cache import move_paths
from trbatch.engine.kv_cache import KVCache
from trbatch.engine.model import CausalModel
from trbatch.engine.tree import default_tree

PAGE = 4
# Outputs are averages of standard normal values: of the order of 1.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def span_of(cache: KVCache, kind: str, length: int, committed: int) -> Span:
    """A sequence on pages that lie in any order but their own."""
    pages = cache.pool.take(cache.pages_for(committed + length))
    order = torch.randperm(len(pages)).tolist()
    pages = [pages[i] for i in order]
    device = cache.layer(0)[0].device
    steps, inner = torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()
    if kind == "tree":
        shape = default_tree().prefix(length).on(torch.device("cpu"))
        steps, inner = shape.depths, shape.ancestors
    return Span(
        room=cache.room_of(pages),
        committed=committed,
        length=length,
        positions=(steps + committed).to(device),
        inner=None if length == 1 else inner.to(device),
        in_order=kind == "prompt",
    )


def filled_cache(dtype: torch.dtype, device: str, kv_heads: int, dim: int, slots: int) -> KVCache:
    """Two layers of random keys and values."""
    cache = KVCache(
        [(kv_heads, dim)] * 2, slots=slots, page_size=PAGE, device=torch.device(device), dtype=dtype
    )
    for stack in cache.stacks:
        stack.normal_()
    return cache


def on_host(span: Span) -> Span:
    """The same span for the twin."""
    return Span(
        room=span.room, committed=span.committed, length=span.length,
        positions=span.positions.cpu(), inner=None if span.inner is None else span.inner.cpu(),
    )  # fmt: skip


def twin(
    span: Span,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[length, heads, dim] of one sequence, from the cache as it is after the step."""
    slots = span.room.slots[: span.committed + span.length]
    k, v = (stored[:, slots].cpu().float() for stored in (keys, values))
    bias = full_bias(on_host(span), window)
    scale = query.shape[-1] ** -0.5
    return reference.attend(query.cpu().float(), k, v, bias, scale, softcap).transpose(0, 1)


def check(
    parts: list[tuple[str, int, int]],
    *,
    device: str,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 64,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """A step of sequences (kind, length, committed) through the wiring against the twin."""
    torch.manual_seed(len(parts))
    room = sum(committed + length + PAGE for _, length, committed in parts)
    cache = filled_cache(dtype, device, kv_heads, dim, room)
    spans = [span_of(cache, *part) for part in parts]
    before = cache.stacks[0].clone()
    count = sum(span.length for span in spans)
    options = {"dtype": dtype, "device": device}
    # As a model has them: views of [1, N, heads, dim].
    query = torch.randn(1, count, kv_heads * group, dim, **options).transpose(1, 2)
    new = torch.randn(2, 1, count, kv_heads, dim, **options).transpose(2, 3)
    with torch.inference_mode(), active(gpu_attention.plan_of(cache, spans)):
        out, _ = attention_forward(
            SimpleNamespace(layer_idx=1), query, new[0], new[1], None,
            sliding_window=window, softcap=softcap,
        )  # fmt: skip
    keys, values = cache.layer(1)
    written = torch.cat([s.room.slots[s.committed : s.committed + s.length] for s in spans])
    assert torch.equal(keys[:, written], new[0, 0])
    assert torch.equal(values[:, written], new[1, 0])
    before[1, :, :, written] = cache.stacks[0][1, :, :, written]
    assert torch.equal(cache.stacks[0], before), "another slot or layer was written"
    start = 0
    for span in spans:
        stop = start + span.length
        wanted = twin(span, query[0, :, start:stop], keys, values, window, softcap)
        found = out[0, start:stop].cpu().float()
        torch.testing.assert_close(found, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        start = stop


MIXED = [("tree", 9, 21), ("token", 1, 0), ("prompt", 7, 13), ("tree", 3, 70)]
TREES = [("tree", 24, 30), ("tree", 5, 0), ("token", 1, 9)]
PROMPTS = [("prompt", 37, 0), ("prompt", 3, 45), ("token", 1, 17)]


@on_every_device
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("parts", [MIXED, TREES, PROMPTS], ids=["mixed", "trees", "prompts"])
def test_attention_equals_its_twin_for_any_group(parts: Any, group: int, device: str) -> None:
    check(parts, group=group, dim=16, device=device)


@on_every_device
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_equals_its_twin_for_any_head_and_type(
    dtype: torch.dtype, dim: int, device: str
) -> None:
    check(MIXED, dtype=dtype, dim=dim, kv_heads=1, device=device)


@on_every_device
@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
@pytest.mark.parametrize("window", [None, 1, 6, 33])
@pytest.mark.parametrize("parts", [MIXED, PROMPTS], ids=["mixed", "prompts"])
def test_attention_equals_its_twin_with_window_and_softcap(
    parts: Any, window: int | None, softcap: float | None, device: str
) -> None:
    check(parts, window=window, softcap=softcap, kv_heads=1, dim=16, device=device)


@on_every_device
def test_a_tree_of_more_nodes_than_a_word_has_bits(device: str) -> None:
    check([("tree", 81, 5), ("tree", 70, 33)], kv_heads=1, group=1, dim=16, device=device)


@on_every_device
@settings(deadline=None, max_examples=15)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["tree", "prompt"]), st.integers(1, 24), st.integers(0, 70)
        ),
        min_size=1, max_size=4,
    ),
    window=st.sampled_from([None, 1, 7, 40]),  # each compiles another kernel
    group=st.integers(1, 4),
)  # fmt: skip
def test_attention_equals_its_twin_for_any_batch(
    parts: Any, window: int | None, group: int, device: str
) -> None:
    check(parts, window=window, group=group, kv_heads=1, dim=16, device=device)


@on_every_device
@pytest.mark.parametrize("splits", [2, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_however_the_work_is_split_the_result_is_the_same(
    causal: bool, splits: int, device: str
) -> None:
    torch.manual_seed(0)
    cache = filled_cache(torch.float32, device, 2, 16, 400)
    kind = "prompt" if causal else "tree"
    spans = [span_of(cache, kind, 9, 150), span_of(cache, kind, 20, 3)]
    layout = gpu_attention.plan_of(cache, spans).layout
    query = torch.randn(4, 29, 16, device=device)
    key, value = torch.randn(2, 2, 29, 16, device=device)
    wanted = None
    for launch in (
        kernel.Launch(64, 64, 1, warps=4, stages=2),
        kernel.Launch(16, 16, splits, warps=4, stages=2),
    ):
        found = kernel.attend(
            query, key, value, *cache.layer(0), layout, scale=0.25, window=40, launch=launch
        )
        wanted = found if wanted is None else wanted
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


@on_every_device
def test_what_lies_in_other_slots_never_shows(device: str) -> None:
    """Not even infinities of a sequence that was there before."""
    torch.manual_seed(1)
    cache = filled_cache(torch.float32, device, 1, 16, 64)
    spans = [span_of(cache, "tree", 9, 6)]
    query, new = torch.randn(2, 9, 16, device=device), torch.randn(1, 9, 16, device=device)
    layout, (keys, values) = gpu_attention.plan_of(cache, spans).layout, cache.layer(0)
    clean = kernel.attend(query, new, new, keys, values, layout, scale=1.0)
    others = torch.ones(64, dtype=torch.bool, device=device)
    others[spans[0].room.slots[: spans[0].committed]] = False
    keys[:, others], values[:, others] = torch.inf, torch.nan
    assert torch.equal(kernel.attend(query, new, new, keys, values, layout, scale=1.0), clean)


@on_every_device
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_model_says_the_same_through_the_kernel(kind: str, device: str) -> None:
    model = tiny.loaded(kind)
    if model.device.type != device:
        pytest.skip(f"the tiny models are on {model.device.type}: TRBATCH_TEST_DEVICE")
    logits = {}
    for attention in ("torch", "triton"):
        torch.manual_seed(0)
        causal = CausalModel(model, page_size=PAGE, attention=attention)
        cache = causal.allocate(256)
        tokens = torch.arange(3, 33, device=device)
        prompt = span_of(cache, "prompt", 21, 0)
        steps = default_tree().prefix(9).on(prompt.positions.device)
        tree = Span(prompt.room, 21, 9, steps.depths + 21, steps.ancestors)
        tree = Span(span_of(cache, "prompt", 30, 0).room, 21, 9, tree.positions, tree.inner)
        prompt = Span(tree.room, 0, 21, prompt.positions, prompt.inner, in_order=True)
        first = causal.forward(tokens[:21], [prompt])
        logits[attention] = torch.cat([first, causal.forward(tokens[21:], [tree])])
    torch.testing.assert_close(logits["triton"], logits["torch"], atol=1e-4, rtol=1e-4)


@on_every_device
def test_the_operator_is_what_it_says_to_the_compiler(device: str) -> None:
    """Its fake gives the right shape, and only the named tensor is changed."""
    cache = filled_cache(torch.float32, device, 1, 16, 64)
    at = gpu_attention.plan_of(cache, [span_of(cache, "tree", 5, 6)]).layout
    query, new = torch.randn(2, 5, 16, device=device), torch.randn(1, 5, 16, device=device)
    arguments = (
        query, new, new.clone(), cache.stacks[0], 1, at.starts, at.committed, at.pages,
        at.positions, at.ancestors, at.longest, at.page_size, 0.25, 0, 0.0,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.trbatch.paged_attention.default, arguments,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


paths = st.lists(
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=7), min_size=1, max_size=3
)


@on_every_device
@settings(deadline=None, max_examples=25)
@given(paths=paths, dim=st.sampled_from([8, 80]))
def test_moved_paths_are_read_before_they_are_written(paths: Any, dim: int, device: str) -> None:
    torch.manual_seed(0)
    cache = filled_cache(torch.float32, device, 3, dim, 20 * len(paths))
    moves = torch.full((2, len(paths), 8), -1)
    for member, path in enumerate(paths):
        by_target = {target: source for source, target in path}
        for place, (target, source) in enumerate(by_target.items()):
            moves[:, member, place] = torch.tensor([source, target]) + 20 * member
    wanted = cache.stacks[0].clone()
    there = moves[0] >= 0
    wanted[:, :, :, moves[1][there]] = wanted[:, :, :, moves[0][there]]
    move_paths(cache.stacks[0], *moves.to(device))
    assert torch.equal(cache.stacks[0], wanted)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 97, 128, 129, 1000, 49_152])
def test_the_likeliest_are_those_of_a_stable_sort(
    vocab: int, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(3, vocab, device=device) * 4).to(dtype)  # bfloat16 has many ties
    wanted = logits.float().sort(dim=1, descending=True, stable=True).indices
    k = min(8, vocab)
    assert torch.equal(likeliest.topk(logits, k), wanted[:, :k])
    assert torch.equal(likeliest.argmax(logits), wanted[:, 0])


@on_every_device
@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(
        st.sampled_from([-torch.inf, -1.5, -0.0, 0.0, 1e-40, 2.0]), min_size=1, max_size=400
    ),
    k=st.integers(1, 8),
)
def test_of_equal_logits_the_lowest_token_comes_first(values: Any, k: int, device: str) -> None:
    k = min(k, len(values))
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    logits = torch.tensor([values], device=device)
    assert likeliest.topk(logits, k)[0].tolist() == order[:k]
    assert likeliest.argmax(logits).tolist() == order[:1]
