"""What is swapped into a network when it is loaded, and the kernels behind it.

Where there is no GPU the kernels run in Triton's interpreter; where there is one, compiled on it.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from kernel_devices import on_every_device
from test_kernels import PAGE, span_of
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from trbatch.engine import gpu_gate, gpu_rotary
from trbatch.engine.alike import same
from trbatch.engine.attention import ShapeProbe, Span, active
from trbatch.engine.fuse import Swaps, fuse
from trbatch.engine.gpu_attention import plan_of
from trbatch.engine.joined import JoinedLinear, Part, join_linears
from trbatch.engine.kernels.gate import ACTIVATIONS, gate
from trbatch.engine.kernels.norm import rms_norm
from trbatch.engine.kernels.rotary import rotate
from trbatch.engine.model import CausalModel, LoadedModel, from_network
from trbatch.engine.norm import KernelRMSNorm, replace_norms
from trbatch.engine.tree import default_tree

SWAPS = {
    "llama": Swaps(norms=5, products=4, rotations=2, gates=2),
    "qwen2": Swaps(norms=5, products=4, rotations=2, gates=2),
    "qwen3": Swaps(norms=9, products=4, rotations=2, gates=2),
    "qwen3_moe": Swaps(norms=9, products=2, rotations=2),  # its experts are no linear layers
    "mistral": Swaps(norms=5, products=4, rotations=2, gates=2),
    "mixtral": Swaps(norms=5, products=2, rotations=2),
    "phi3": Swaps(norms=5, rotations=2, gates=2),  # its layers are joined already
    "gemma2": Swaps(norms=13, products=6, rotations=3, gates=3),
    "gemma3_text": Swaps(norms=19, products=6, rotations=3, gates=3),
    "olmo2": Swaps(norms=9, products=4, rotations=2, gates=2),
    "gpt2": Swaps(),
    "gpt_neox": Swaps(rotations=2),
    "granite": Swaps(norms=5, products=4, rotations=2, gates=2),
    "cohere": Swaps(products=4, rotations=2, gates=2),
    "stablelm": Swaps(products=4, rotations=2, gates=2),
}
DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # rounded once


def unfused(kind: str, device: str, **changes: Any) -> LoadedModel:
    """A tiny model as transformers has it, with norms and biases that are not all ones or zeros."""
    network = tiny.network(kind, **changes)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) - 0.3)
    network = nn.Module.to(network, torch.device(device))
    return from_network(network, tiny.NumberTokenizer(), name=kind, fuse=False)


def swap(model: LoadedModel) -> Swaps:
    """What a GPU gets, on any device."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    def run() -> None:
        with torch.inference_mode(), active(ShapeProbe()):
            model.network(input_ids=token, position_ids=token, use_cache=False)

    return fuse(model.network, run, kernels=True)


def logits_of(model: LoadedModel) -> Tensor:
    """[30, V] of a prompt and then of a tree behind it."""
    length, device = 21, model.device
    causal = CausalModel(model, page_size=PAGE)
    cache = causal.allocate(64)
    prompt = span_of(cache, "prompt", length, 0)
    room = span_of(cache, "prompt", length + 9, 0).room
    prompt = Span(room, 0, length, prompt.positions, prompt.inner, in_order=True)
    shape = default_tree().prefix(9).on(device)
    tree = Span(room, length, 9, shape.depths + length, shape.ancestors)
    tokens = torch.arange(3, length + 12, device=device)
    first = causal.forward(tokens[:length], [prompt])
    return torch.cat([first, causal.forward(tokens[length:], [tree])])


@on_every_device
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_fused_network_says_what_it_said_before(kind: str, device: str) -> None:
    model = unfused(kind, device)
    wanted = logits_of(model)
    assert swap(model) == SWAPS[kind]
    found = logits_of(model)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert swap(model).rotations == 0, "what was swapped is not swapped again"


@on_every_device
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_a_fused_network_is_as_near_to_float32(
    dtype: torch.dtype, kind: str, device: str
) -> None:
    exact = logits_of(unfused(kind, device))
    model = unfused(kind, device)
    model.network.to(dtype)
    model.dtype = dtype
    before = (logits_of(model) - exact).abs().mean()
    assert swap(model) == SWAPS[kind]
    # The interpreter cuts a float32 off where a GPU rounds it to bfloat16: twice as far.
    slack = 2.0 if device == "cpu" and dtype == torch.bfloat16 else 1.2
    assert (logits_of(model) - exact).abs().mean() < slack * before


@on_every_device
def test_a_partly_turning_head_is_rotated_by_the_kernel_too(device: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    model = unfused("phi3", device, rope_parameters=rope)
    wanted = logits_of(model)
    assert swap(model) == SWAPS["phi3"]
    torch.testing.assert_close(logits_of(model), wanted, atol=2e-4, rtol=1e-4)


@on_every_device
def test_other_networks_of_an_architecture_are_left_alone(device: str) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    model, other = unfused("llama", device), unfused("llama", device)
    swap(model)
    assert modeling_llama.apply_rotary_pos_emb is original
    kinds = [type(one.network.model.layers[0].self_attn) for one in (model, other)]
    assert kinds[0] is not modeling_llama.LlamaAttention
    assert kinds[1] is modeling_llama.LlamaAttention
    assert isinstance(model.network.model.layers[0].self_attn, modeling_llama.LlamaAttention)


@on_every_device
def test_a_form_that_was_not_compared_goes_to_the_original(device: str) -> None:
    model = unfused("llama", device)
    swap(model)
    forward = type(model.network.model.layers[0].self_attn).forward
    rotary = forward.__globals__[gpu_rotary.NAME]
    assert isinstance(rotary, gpu_rotary._Rotation)
    q, k = torch.randn(2, 1, 3, 5, 8, device=device)
    cos, sin = torch.randn(2, 1, 5, 8, device=device)
    for arguments in (
        (q, k, cos, sin, 1),
        (q.double(), k.double(), cos, sin),
        (q, k, cos.double(), sin.double()),
        (q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), cos, sin),
    ):
        wanted = modeling_llama.apply_rotary_pos_emb(*arguments)
        for one, other in zip(rotary(*arguments), wanted, strict=True):
            assert torch.equal(one, other)


@on_every_device
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh"])
def test_only_activations_that_the_kernel_has_are_swapped(activation: str, device: str) -> None:
    model = unfused("llama", device, hidden_act=activation)
    wanted = logits_of(model)
    assert swap(model).gates == (2 if activation == "gelu_pytorch_tanh" else 0)
    torch.testing.assert_close(logits_of(model), wanted, atol=2e-4, rtol=1e-4)


class Odd(nn.Module):
    """An MLP with the usual names that does something else, of a norm that does so too."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 8), nn.Linear(6, 8)
        self.down_proj, self.act_fn = nn.Linear(8, 6), nn.SiLU()
        self.norm = OddRMSNorm()

    def forward(self, x: Tensor) -> Tensor:
        gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        y: Tensor = self.norm(self.down_proj(gated.clamp(max=0.01)))
        return y


class OddRMSNorm(nn.Module):
    """Has a mean too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(6)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (6,), self.weight, None, self.eps)


@on_every_device
def test_modules_that_do_something_else_are_left_alone(device: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Odd()).to(device)
    x = torch.randn(1, 3, 6, device=device)
    with torch.inference_mode():
        wanted = network(x)
        assert replace_norms(network, kernels=True) == 0
        assert join_linears(network, lambda: network(x)) == 1
        assert gpu_gate.replace_gated(network) == 0
        torch.testing.assert_close(network(x), wanted)


@on_every_device
def test_joining_keeps_no_weight_twice_and_shares_a_tied_one(device: str) -> None:
    model = unfused("llama", device, tie_word_embeddings=True)
    network: Any = model.network
    attention = network.model.layers[0].self_attn
    gone = [weakref.ref(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]
    embedding = network.get_input_embeddings().weight
    swap(model)
    assert all(ref() is None for ref in gone)
    assert isinstance(attention.q_proj, Part)
    assert isinstance(network.lm_head, JoinedLinear)
    assert network.lm_head.weight.data_ptr() == embedding.data_ptr()


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joined_layers_equal_their_twins_in_any_type(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    mlp = Odd().to(device, dtype)
    twin = Odd().to(device, dtype)
    twin.load_state_dict(mlp.state_dict())
    x = torch.randn(1, 7, 6, device=device, dtype=dtype)
    with torch.inference_mode():
        assert join_linears(nn.Sequential(mlp), lambda: mlp(x[:, :1])) == 1
        assert mlp.gate_proj.shared.whole.widths == [8, 8]
        for name in ("gate_proj", "up_proj"):
            assert same(getattr(mlp, name)(x), getattr(twin, name)(x))


def test_layers_of_different_types_are_not_joined() -> None:
    mlp = Odd()
    mlp.up_proj.to(torch.float64)
    calls = SimpleNamespace(x=torch.randn(1, 2, 6))

    def run() -> None:
        mlp.gate_proj(calls.x), mlp.down_proj(torch.randn(1, 2, 8))
        mlp.up_proj.forward = lambda x: x  # only its hook matters here
        mlp.up_proj(calls.x)

    assert join_linears(nn.Sequential(mlp), run) == 0
    assert type(mlp.up_proj) is nn.Linear


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_fused_network_can_be_captured() -> None:
    model = unfused("qwen3", "cuda")
    fused = from_network(model.network, tiny.NumberTokenizer(), name="qwen3")
    attention: Any = fused.network.model.layers[0].self_attn
    assert isinstance(attention.q_norm, KernelRMSNorm)
    assert isinstance(fused.network.model.layers[0].mlp, gpu_gate.GatedMLP)
    cache = CausalModel(fused, page_size=PAGE).allocate(64)
    span = span_of(cache, "tree", 9, 12)
    tokens = torch.arange(3, 12, device="cuda")[None]

    def forward() -> Tensor:
        out = fused.network(input_ids=tokens, position_ids=span.positions[None], use_cache=False)
        logits: Tensor = out.logits
        return logits

    with torch.inference_mode(), active(plan_of(cache, [span])):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            wanted = forward().clone()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = forward()
        found.zero_()
        graph.replay()
        torch.testing.assert_close(found, wanted)


def views(rows: int, heads: int, dim: int, **options: Any) -> dict[str, Tensor]:
    """Rows as networks have them: adjacent, and heads that lie in a wider joined product."""
    joined = torch.randn(1, rows, heads * dim + 24, **options)
    split = joined[..., 8 : 8 + heads * dim]
    by_head = split.view(1, rows, heads, dim)
    return {
        "flat": torch.randn(rows, dim, **options),
        "row": torch.randn(dim, **options),
        "wide": split,
        "heads": by_head,
        "transposed": by_head.transpose(1, 2),
        "apart": torch.randn(rows, dim, 2, **options)[..., 0],
    }


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 80, 96, 1500])
def test_rms_norm_equals_its_twin_for_any_strides(
    dim: int, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(dim)
    for name, x in views(5, 3, dim, dtype=dtype, device=device).items():
        width = x.shape[-1]
        for kind in {dtype, torch.float32}:
            weight = torch.randn(width, dtype=kind, device=device)
            wanted = torch.rms_norm(x.float(), (width,), weight.float(), 1e-3)
            found = rms_norm(x, weight, 1e-3)
            assert found.is_contiguous(), name
            assert found.dtype == dtype
            close = {"atol": DTYPES[dtype], "rtol": DTYPES[dtype]}
            torch.testing.assert_close(found.float(), wanted, **close)


@on_every_device
@pytest.mark.parametrize("angles", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "turning"), [(8, 8), (80, 80), (96, 24), (128, 128), (10, 6)])
def test_rotation_equals_its_twins_for_any_strides(
    dim: int, turning: int, dtype: torch.dtype, angles: torch.dtype, device: str
) -> None:
    torch.manual_seed(dim)
    options = {"dtype": dtype, "device": device}
    joined = torch.randn(1, 5, 13 * dim + 3, **options)
    q = joined[..., : 9 * dim].view(1, 5, 9, dim).transpose(1, 2)
    k = joined[..., 9 * dim + 3 : 11 * dim + 3].view(1, 5, 2, dim).transpose(1, 2)
    wide = torch.randn(2, 1, 5, turning + 2, device=device, dtype=angles)
    cos, sin = wide[..., 1 : turning + 1]
    exact = [t.float() for t in (q, k, cos, sin)]
    twins = {False: modeling_phi3.apply_rotary_pos_emb}
    if dim == turning:
        twins[True] = modeling_cohere.apply_rotary_pos_emb
    for neighbours, twin in twins.items():
        for found, wanted in zip(
            rotate(q, k, cos, sin, neighbours=neighbours), twin(*exact), strict=True
        ):
            assert found.is_contiguous()
            assert found.dtype == dtype
            close = {"atol": DTYPES[dtype], "rtol": DTYPES[dtype]}
            torch.testing.assert_close(found.float(), wanted, **close)


@on_every_device
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 48, 1024, 2500])
def test_the_gate_equals_its_twin(
    width: int, dtype: torch.dtype, activation: str, device: str
) -> None:
    torch.manual_seed(width)
    x = 4 * torch.randn(1, 3, 2 * width + 5, dtype=dtype, device=device)[..., 3:-2]
    first, up = x.float().chunk(2, dim=-1)
    gated = functional.silu(first)
    if activation != "silu":
        gated = functional.gelu(first, approximate="tanh")
    found = gate(x, activation)
    assert found.is_contiguous()
    assert found.dtype == dtype
    close = {"atol": DTYPES[dtype], "rtol": DTYPES[dtype]}
    torch.testing.assert_close(found.float(), gated * up, **close)
    flat = gate(x[0], activation)
    assert torch.equal(flat, found[0])
