"""The fast paths and their slow twins: attention over the paged cache, and packed linears."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trbatch.engine import reference
from trbatch.engine.attention import Span, StepPlan, active, attention_forward
from trbatch.engine.kv_cache import KVCache, Room
from trbatch.engine.linear import PackedLinear, can_pack, pack_linears
from trbatch.engine.norm import replace_norms
from trbatch.engine.tree import default_tree

CPU = torch.device("cpu")
PAGE = 4
DIM = 8

# What one sequence brings to a step.
any_part = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["token", "prompt", "tree"]),
        "length": st.integers(1, 24),
        "committed": st.integers(0, 30),
        "scattered": st.booleans(),
    }
)
any_layer = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "window": st.none() | st.integers(1, 40),
        "softcap": st.none() | st.sampled_from([2.0, 30.0]),
        "scaling": st.none() | st.sampled_from([0.1, 1.0]),
    }
)


def scattered_room(cache: KVCache, tokens: int) -> Room:
    """Pages in any order but that of their slots."""
    pages = cache.pool.take(cache.pages_for(tokens))[::-1]
    slots = torch.tensor([page * PAGE + i for page in pages for i in range(PAGE)])
    return Room(pages=tuple(pages), slots=slots, first=None)


def span_of(cache: KVCache, facts: dict) -> Span:
    """The span as the engine makes it."""
    length = 1 if facts["kind"] == "token" else facts["length"]
    steps, inner = torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()
    if facts["kind"] == "tree":
        shape = default_tree().prefix(length).on(CPU)
        steps, inner = shape.depths, shape.ancestors
    take = scattered_room if facts["scattered"] else KVCache.take_room
    return Span(
        room=take(cache, facts["committed"] + length),
        committed=facts["committed"],
        length=length,
        positions=steps + facts["committed"],
        inner=None if facts["kind"] == "token" else inner,
    )


def full_bias(span: Span, window: int | None) -> Tensor:
    """Who sees whom, written down one pair at a time."""
    bias = torch.full((span.length, span.committed + span.length), -torch.inf)
    for query, position in enumerate(span.positions.tolist()):
        keys = list(range(span.committed)) + span.positions.tolist()
        for key, place in enumerate(keys):
            inside = key - span.committed
            related = inside < 0 or inside == query
            related = related or (span.inner is not None and bool(span.inner[query, inside]))
            if related and (window is None or position - place < window):
                bias[query, key] = 0
    return bias


def slow_attention(
    span: Span, query: Tensor, keys: Tensor, values: Tensor, layer: dict, scale: float
) -> Tensor:
    """[heads, length, dim] of one sequence, from the cache as it is after the step."""
    slots = span.room.slots[: span.committed + span.length]
    return reference.attend(
        query, keys[:, slots], values[:, slots], full_bias(span, layer["window"]), scale,
        layer["softcap"],
    )  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(parts=st.lists(any_part, min_size=1, max_size=4), layer=any_layer, seed=st.integers(0, 99))
def test_attention_over_the_cache_equals_its_slow_twin(parts, layer, seed: int) -> None:
    torch.manual_seed(seed)
    heads = layer["kv_heads"] * layer["group"]
    cache = KVCache(
        [(layer["kv_heads"], DIM)] * 2, slots=4 * 60, page_size=PAGE, device=CPU,
        dtype=torch.float32,
    )  # fmt: skip
    keys, values = cache.layer(1)
    keys.normal_()
    values.normal_()
    before = keys.clone(), values.clone(), cache.layer(0)[0].clone()
    spans = [span_of(cache, facts) for facts in parts]
    count = sum(span.length for span in spans)
    query = torch.randn(1, heads, count, DIM)
    new = torch.randn(2, 1, layer["kv_heads"], count, DIM)
    with active(StepPlan(cache, spans, torch.float32)):
        out, weights = attention_forward(
            SimpleNamespace(layer_idx=1), query, new[0], new[1], None,
            scaling=layer["scaling"], sliding_window=layer["window"], softcap=layer["softcap"],
        )  # fmt: skip
    assert weights is None and out.shape == (1, count, heads, DIM)
    written = torch.cat(
        [span.room.slots[span.committed : span.committed + span.length] for span in spans]
    )
    assert torch.equal(keys[:, written], new[0, 0]) and torch.equal(values[:, written], new[1, 0])
    untouched = torch.ones(keys.shape[1], dtype=torch.bool)
    untouched[written] = False
    assert torch.equal(keys[:, untouched], before[0][:, untouched])
    assert torch.equal(values[:, untouched], before[1][:, untouched])
    assert torch.equal(cache.layer(0)[0], before[2]), "another layer was written"
    scale = DIM**-0.5 if layer["scaling"] is None else layer["scaling"]
    start = 0
    for span in spans:
        stop = start + span.length
        wanted = slow_attention(span, query[0, :, start:stop], keys, values, layer, scale)
        found = out[0, start:stop].transpose(0, 1)
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
        start = stop


def test_the_slow_twin_is_softmax_attention() -> None:
    """Against a loop over heads, queries and keys in float64."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(4, 3, DIM), torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    bias = torch.zeros(3, 5)
    bias[0, 3:] = -torch.inf
    for softcap in (None, 1.5):
        out = reference.attend(query, keys, values, bias, 0.7, softcap)
        for head in range(4):
            for place in range(3):
                scores = (keys[head // 2].double() @ query[head, place].double()) * 0.7
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.exp(scores + bias[place])
                wanted = (weights / weights.sum()) @ values[head // 2].double()
                torch.testing.assert_close(out[head, place].double(), wanted, atol=1e-6, rtol=1e-5)


def test_what_lies_in_other_slots_never_shows() -> None:
    """Not even infinities of a sequence that was there before."""
    torch.manual_seed(1)
    cache = KVCache([(1, DIM)], slots=64, page_size=PAGE, device=CPU, dtype=torch.float32)
    keys, values = cache.layer(0)
    span = span_of(cache, {"kind": "tree", "length": 9, "committed": 6, "scattered": True})
    query, new = torch.randn(1, 2, 9, DIM), torch.randn(1, 1, 9, DIM)

    def run() -> Tensor:
        with active(StepPlan(cache, [span], torch.float32)):
            return attention_forward(SimpleNamespace(layer_idx=0), query, new, new, None)[0]

    clean = run()
    others = torch.ones(64, dtype=torch.bool)
    others[span.room.slots[: span.committed + span.length]] = False
    keys[:, others], values[:, others] = torch.inf, torch.nan
    assert torch.equal(run(), clean)


needs_packing = pytest.mark.skipif(
    not can_pack(CPU, torch.float32), reason="this build of torch has no packed linears"
)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("few", [0, 3])
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 24), (57, 33), (256, 1)])
def test_packed_linear_is_the_linear_it_replaces(
    bias: bool, few: int, rows: int, inputs: int, outputs: int
) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(inputs, outputs, bias=bias)
    packed = PackedLinear([linear], keep=True)
    packed.few = few
    for shape in ((rows, inputs), (1, rows, inputs), (2, rows, 3, inputs)):
        x = torch.randn(shape)
        with torch.inference_mode():
            y = packed(x)
            assert y.shape == (*shape[:-1], outputs)
            torch.testing.assert_close(y, linear(x), atol=1e-5, rtol=1e-5)
    x = torch.randn(inputs)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), linear(x), atol=1e-5, rtol=1e-5)
        strided = torch.randn(inputs, rows).T
        torch.testing.assert_close(packed(strided), linear(strided), atol=1e-5, rtol=1e-5)


@needs_packing
def test_packing_leaves_a_shared_embedding_and_special_linears_alone() -> None:
    class Special(nn.Linear):
        """Computes something else than its base."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    torch.manual_seed(0)
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    network = nn.ModuleDict({"embed": embedding, "inner": inner, "odd": Special(6, 6)})
    network["head"] = head
    ids, weight = torch.tensor([1, 4, 10]), embedding.weight.detach().clone()

    def run() -> Tensor:
        with torch.inference_mode():
            return network["head"](network["odd"](network["inner"](network["embed"](ids))))

    wanted = run()
    assert pack_linears(network) == 2
    assert type(network["odd"]) is Special
    assert torch.equal(network["embed"].weight, weight)
    torch.testing.assert_close(run(), wanted, atol=1e-5, rtol=1e-5)


class Attentive(nn.Module):
    """Q, K and V of one input, an output of another, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        self.o, self.twice = nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.twice(self.twice(self.o(q + torch.cat([k, v], dim=-1))))


@needs_packing
def test_layers_of_one_input_become_one_product_with_the_same_results() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(Attentive(), Attentive()), torch.randn(1, 5, 6)
    with torch.inference_mode():
        wanted = network(x)
        assert pack_linears(network, lambda: network(torch.randn(1, 1, 6))) == 10
        shared = {layer.shared for one in network for layer in (one.q, one.k, one.v)}
        assert [product.whole.widths for product in shared] == [[8, 4, 4]] * 2
        for _ in range(2):
            torch.testing.assert_close(network(x), wanted, atol=1e-5, rtol=1e-5)
        other = torch.randn(1, 3, 6)
        # Asked in another order, about another input, or twice, each part is still its layer.
        first = network[0]
        parts = [first.v(other), first.q(x), first.v(x), first.q(other), first.v(other)]
    torch.manual_seed(0)
    fresh = nn.Sequential(Attentive(), Attentive())[0]
    with torch.inference_mode():
        expected = [fresh.v(other), fresh.q(x), fresh.v(x), fresh.q(other), fresh.v(other)]
    for part, right in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "count"), [("llama", 5), ("qwen3", 9), ("gemma2", 13), ("gpt2", 0)]
)
def test_plain_norms_are_replaced_by_one_operation_and_others_are_not(
    kind: str, count: int
) -> None:
    network = tiny.network(kind)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name:
                weight.copy_(torch.rand_like(weight) + 0.5)
    norms = {n: m for n, m in network.named_modules() if type(m).__name__.endswith("RMSNorm")}
    assert replace_norms(network) == count
    fresh = dict(network.named_modules())
    for name, norm in norms.items():
        x = torch.randn(2, 3, norm.weight.shape[0], device=norm.weight.device)
        torch.testing.assert_close(fresh[name](x), norm(x), atol=1e-5, rtol=1e-5)


def test_only_float32_on_a_cpu_is_packed() -> None:
    assert not can_pack(CPU, torch.bfloat16)
    assert not can_pack(torch.device("cuda:0"), torch.float32)
