"""A small model in the corner of a big one: the same words, the big one's sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from trbatch.config import cache_folder
from trbatch.engine.engine import Engine
from trbatch.engine.model import LoadedModel, from_network
from trbatch.engine.shapes import SHAPES, Shape
from trbatch.engine.step_plain import PlainOperations
from trbatch.engine.widen import random_like_shape, wide_network, widen
from trbatch.errors import ModelError, UsageError

# name, hidden, layers, heads, kv_heads, head_dim, intermediate, vocab; the small one has
# 32, 2, 4, 2, 8, 48, 97.
GROUPED = Shape("grouped", 96, 3, 12, 4, 16, 80, 150)  # three query heads a K/V head
ALONE = Shape("alone", 48, 2, 6, 6, 24, 64, 60)  # each query head has its own
SAME = Shape("same", 40, 2, 4, 2, 8, 48, 97)  # only the stream is wider
ALL = {shape.name: shape for shape in (GROUPED, ALONE, SAME)}


def small(**changes: Any) -> LoadedModel:
    """A tiny Llama with norms that are not all ones, loaded as transformers has it."""
    network = tiny.network("llama", **changes)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() == 1:
                weight.add_(torch.rand_like(weight) - 0.3)
    return from_network(network, tiny.NumberTokenizer(), name="tiny", fuse=False)


def wide(model: LoadedModel, shape: Shape, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return widen(model, shape, dtype=dtype, device=tiny.DEVICE)


def plain_network(model: LoadedModel, shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
    """The wide network before anything of ours is in it."""
    return wide_network(model, shape, dtype=dtype, device=tiny.DEVICE)


def logits_of(network: Any) -> Tensor:
    """[4, 30, V] of random ids, by transformers' own attention."""
    network.config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, tiny.VOCAB, (4, 30), generator=generator).to(tiny.DEVICE)
    with torch.inference_mode():
        logits: Tensor = network(input_ids=ids, use_cache=False).logits.float()
    return logits


@pytest.mark.parametrize("shape", ALL.values(), ids=ALL)
@pytest.mark.parametrize("changes", [{}, {"rms_norm_eps": 0.3}, {"tie_word_embeddings": True}])
def test_a_widened_network_gives_the_small_ones_logits(
    shape: Shape, changes: dict[str, Any]
) -> None:
    model = small(**changes)
    wanted = logits_of(model.network)
    found = logits_of(plain_network(model, shape))
    assert found.shape[-1] == max(shape.vocab, tiny.VOCAB)
    torch.testing.assert_close(found[..., : tiny.VOCAB], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_old_pairs_of_a_wider_head_turn_with_their_old_frequencies(rope: str) -> None:
    more = {
        "default": {},
        "linear": {"factor": 2.0},
        "llama3": {
            "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }[rope]  # fmt: skip
    model = small(rope_parameters={"rope_type": rope, "rope_theta": 500.0, **more})
    network = plain_network(model, GROUPED)
    old, new = (n.model.rotary_emb.inv_freq for n in (model.network, network))
    assert torch.equal(new[::2].cpu(), old.cpu())
    torch.testing.assert_close(
        logits_of(network)[..., : tiny.VOCAB], logits_of(model.network), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ids_that_the_small_model_does_not_have_never_come_out(dtype: torch.dtype) -> None:
    for size in (0.01, 1.0, 100.0):  # of the stream, which the constant is divided by
        model = small()
        with torch.no_grad():
            model.network.model.embed_tokens.weight.mul_(size)  # type: ignore[union-attr,operator]
        logits = logits_of(plain_network(model, GROUPED, dtype))
        spare, own = logits[..., tiny.VOCAB :], logits[..., : tiny.VOCAB]
        assert own.isfinite().all()
        # Not among the candidates either, of which there are eight.
        assert (spare.amax(-1) < own.topk(32).values[..., -1]).all()


def test_the_engine_and_generate_say_the_same_of_both(own_cache: None) -> None:
    prompts = tiny.repetitive(2, length=12, seed=3) + tiny.prompts(2, seed=4)
    model = small()
    model.network.config._attn_implementation = "sdpa"
    wanted = [tiny.generate(model.network, ids, 12) for ids in prompts]
    settings: dict[str, dict[str, Any]] = {
        "grouped": {"speculate": False}, "alone": {"tree_size": 8},
        "same": {"tree_size": 8, "operations": PlainOperations(), "enforce_eager": True},
    }  # fmt: skip
    for shape in ALL.values():
        network = plain_network(model, shape)
        assert [tiny.generate(network, ids, 12) for ids in prompts] == wanted
        engine = tiny.engine(wide(model, shape), **settings[shape.name])
        requests = [tiny.request(i, ids, max_tokens=12) for i, ids in enumerate(prompts)]
        done = tiny.decode(engine, requests)
        assert [done[i].token_ids for i in range(len(prompts))] == wanted, shape


def test_what_drafts_come_true_is_the_small_models_too(own_cache: None) -> None:
    accepted = []
    for model in (tiny.loaded("llama"), wide(small_like_loaded(), GROUPED)):
        engine = tiny.engine(model, tree_size=8)
        requests = [tiny.request(i, ids) for i, ids in enumerate(tiny.repetitive(2))]
        done = tiny.decode(engine, requests)
        accepted.append([done[i].acceptance_histogram for i in range(2)])
    assert accepted[0] == accepted[1]


def small_like_loaded() -> LoadedModel:
    """The network of `tiny.loaded`, as transformers has it."""
    return from_network(
        tiny.network("llama"), tiny.NumberTokenizer(), name="tiny", fuse=False
    )  # fmt: skip


def test_a_widened_network_has_the_sizes_and_hardly_any_zeros_but_where_it_must() -> None:
    network = plain_network(small(), GROUPED)
    sizes = {tuple(weight.shape) for weight in network.parameters()}
    assert sizes == {(150, 96), (96,), (192, 96), (64, 96), (96, 192), (80, 96), (96, 80)}
    layer, spare = network.model.layers[0], network.model.layers[2]
    for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj):
        assert (linear.weight != 0).all()
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert (linear.weight[32:] == 0).all(), "the stream behind the old one stays empty"
        assert (linear.weight[:32] != 0).any()
    for linear in (spare.self_attn.o_proj, spare.mlp.down_proj):
        assert (linear.weight == 0).all()
    assert (spare.mlp.gate_proj.weight != 0).all()


def test_a_random_network_has_the_same_sizes_and_no_zeros() -> None:
    model = small()
    random = random_like_shape(model, GROUPED, dtype=torch.bfloat16, device=tiny.DEVICE)
    assert (random.vocab_size, random.layer_shapes) == (150, [(4, 16)] * 3)
    assert random.dtype == torch.bfloat16
    assert wide(model, GROUPED).layer_shapes == random.layer_shapes
    engine = tiny.engine(random, speculate=False)
    done = tiny.decode(engine, [tiny.request(0, [5, 6, 7], max_tokens=4)])
    assert done[0].completion_tokens == 4


def test_the_name_and_the_fingerprint_say_that_it_is_widened() -> None:
    model = small()
    one, other = wide(model, GROUPED), wide(model, ALONE)
    random = random_like_shape(model, GROUPED, dtype=torch.float32, device=tiny.DEVICE)
    assert one.name == "tiny as grouped shape"
    assert random.name == "random weights as grouped shape"
    different = dataclasses.replace(model, fingerprint="another")
    prints = {m.fingerprint for m in (model, one, other, random, wide(different, GROUPED))}
    assert len(prints) == 5
    assert wide(model, GROUPED).fingerprint == one.fingerprint
    assert (
        Engine(one, tiny.EngineConfig(max_num_seqs=1, speculate=False))
        .stats()["model_fingerprint"]
        .startswith("wide-")
    )
    assert one.eos_token_ids == model.eos_token_ids


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden": 32}, "hidden_size 32 is more than 31"),
        ({"layers": 1}, "num_hidden_layers 2"),
        ({"intermediate": 40}, "intermediate_size 48"),
        ({"head_dim": 12}, "12 is no multiple"),
        ({"heads": 3, "kv_heads": 3}, "3 K/V heads are too few"),
    ],
)
def test_a_shape_that_is_too_small_is_refused_by_what_does_not_fit(
    changes: dict[str, int], why: str
) -> None:
    with pytest.raises(ModelError, match=f"tiny cannot be widened to the shape grouped: .*{why}"):
        wide(small(), dataclasses.replace(GROUPED, **changes))


def test_what_is_no_plain_llama_is_refused() -> None:
    qwen = from_network(
        tiny.network("qwen2"), tiny.NumberTokenizer(), name="q", fuse=False
    )  # fmt: skip
    for model, why in (
        (qwen, "qwen2"),
        (small(attention_bias=True), "biases"),
        (tiny.loaded("llama"), "fuse=False"),
    ):
        with pytest.raises(ModelError, match=why):
            wide(model, GROUPED)


def test_shapes_have_the_weights_that_their_names_promise() -> None:
    def billions(shape: Shape) -> float:
        heads = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
        layer = shape.hidden * (heads + 3 * shape.intermediate)
        return (shape.layers * layer + 2 * shape.vocab * shape.hidden) / 1e9

    sizes = {name: round(billions(shape), 1) for name, shape in SHAPES.items()}
    assert sizes == {"llama-8b": 8.0, "vicuna-7b": 6.7, "qwen-14b": 14.8}
    with pytest.raises(UsageError, match="'llama-9b'") as caught:
        widen(small(), "llama-9b", dtype=torch.float32, device="cpu")
    assert "vicuna-7b" in str(caught.value.hint)


@pytest.fixture
def own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
