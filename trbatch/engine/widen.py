"""A small model's words at a big model's cost: its weights in a corner of a network of that shape.

Speculation is worth what a step costs and how often drafts come true. Real text needs real weights,
and a big model's cost needs only its sizes. So the small model's weights are laid into a Llama of
the big shape in such a way that it says exactly what the small one says, for what the big one
costs. Whatever is measured with it is a figure of the small model's text, and its name says so.

How the function is kept, with d and D the old and new width:

- The residual stream holds the old one in its first d places and zeros behind. An RMSNorm's mean
  runs over D places, so that eps is multiplied by d / D and the weights by sqrt(d / D).
- Old query heads keep their K/V head: an old group of heads lies in one new group, or in several
  with copies of its K/V head where the new groups are smaller.
- A head's pairs of rotary dimensions lie where the wider head turns with their old frequencies,
  every (new / old head size)-th pair; queries are multiplied by the root of that ratio, since
  scores are divided by the root of the head size.
- Spare heads, units and layers compute on random weights, and nothing reads what they give: their
  columns of the output projections are zeros. Rows that read the stream have random weights also
  where it holds zeros. So most weights are no zeros, though zeros may run faster:
  `random_like_shape` tells how much.
- Ids beyond the small vocabulary can never come out. One more place of the stream holds a constant,
  which finds room in eps: the mean of squares that it adds is taken away there. The spare rows of
  the output projection multiply it by a large negative number, all others by zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trbatch.engine.loading import loading
from trbatch.engine.model import LoadedModel, from_network
from trbatch.engine.shapes import Shape, shape_of
from trbatch.errors import ModelError

_STD = 0.02  # of random weights, as transformers begins a Llama
_SEED = 0
# What a spare id's logit multiplies the constant by: in the last norm and in the projection. Both
# are exact in all types, and float16 does not reach infinity before the product.
_NORM_FACTOR, _HEAD_FACTOR = 2.0**5, -(2.0**15)


def widen(
    loaded: LoadedModel, shape: str | Shape, *, dtype: torch.dtype, device: torch.device | str
) -> LoadedModel:
    """The small model's text at the shape's cost, ready for an engine.

    Args:
        loaded: a Llama, loaded with `fuse=False`, best in float32; it is not changed.
        dtype: of the new weights, which are made on `device`, a few minutes' work for a CPU.

    Raises:
        ModelError: it is no plain Llama, or too large for the shape.
    """
    wide = as_shape(shape)
    return ready(wide_network(loaded, wide, dtype=dtype, device=device), loaded, wide)


def random_like_shape(
    loaded: LoadedModel, shape: str | Shape, *, dtype: torch.dtype, device: torch.device | str
) -> LoadedModel:
    """A network of the same sizes as `widen` makes, with random weights everywhere.

    What it says means nothing: it is there to be timed. See `widen` for arguments and errors.
    """
    wide = as_shape(shape)
    network = random_network(loaded, wide, dtype=dtype, device=device)
    return ready(network, loaded, wide, random=True)


def as_shape(shape: str | Shape) -> Shape:
    """The shape itself, or the one of this name."""
    return shape_of(shape) if isinstance(shape, str) else shape


def ready(
    network: nn.Module, loaded: LoadedModel, shape: Shape, *, random: bool = False
) -> LoadedModel:
    """Make a network of `wide_network` or `random_network` ready, under a name that tells."""
    words = "random weights" if random else loaded.name
    model = from_network(network, loaded.tokenizer, name=f"{words} as {shape.name} shape")
    parts = [loaded.fingerprint, repr(shape), random]
    fingerprint = hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()
    return dataclasses.replace(model, fingerprint=f"wide-{fingerprint}")


def wide_network(
    loaded: LoadedModel, shape: Shape, *, dtype: torch.dtype, device: torch.device | str
) -> Any:
    """The small model's weights in a plain transformers network of this shape. See `widen`."""
    network = random_network(loaded, shape, dtype=dtype, device=device)
    with torch.no_grad():
        _Corner(loaded.network, network, _kv_copies(loaded.network.config, shape)).fill()
    return network


def random_network(
    loaded: LoadedModel, shape: Shape, *, dtype: torch.dtype, device: torch.device | str
) -> Any:
    """A plain transformers network that `wide_network` fills: its sizes, its norms' eps, no words.

    Memory is taken for each weight once, in its type and on its device.
    """
    config = _wide_config(loaded, shape)
    with loading(f"{loaded.name} as {shape.name} shape"):
        with torch.device("meta"):
            network: Any = LlamaForCausalLM(config)
        nn.Module.to(network, dtype=dtype)
        network.to_empty(device=torch.device(device))
        with torch.device(device):  # its frequencies, in float32
            network.model.rotary_emb = type(network.model.rotary_emb)(config)
        generator = torch.Generator(device).manual_seed(_SEED)
        with torch.no_grad():
            for weight in network.parameters():
                weight.requires_grad_(False)
                if weight.dim() > 1:
                    weight.normal_(std=_STD, generator=generator)
                else:
                    weight.fill_(1.0)
    network.generation_config = loaded.network.generation_config
    network.eval()
    return network


def _wide_config(loaded: LoadedModel, shape: Shape) -> LlamaConfig:
    small: Any = loaded.network.config
    _refuse_unfit(loaded, shape)
    eps = small.rms_norm_eps * small.hidden_size / shape.hidden
    return LlamaConfig(
        vocab_size=max(shape.vocab, small.vocab_size),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden_act=small.hidden_act,
        max_position_embeddings=small.max_position_embeddings,
        rms_norm_eps=eps - _constant(small, shape.vocab) ** 2 / shape.hidden,
        rope_parameters=dict(small.rope_parameters),
        tie_word_embeddings=False,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
        pad_token_id=small.pad_token_id,
    )


def _constant(small: Any, vocab: int) -> float:
    """What one place of the stream always holds, exact in 16 bits; 0: no spare ids, none needed.

    Its square takes between an eighth and half of what eps adds to the sum of squares.
    """
    if vocab <= small.vocab_size:
        return 0.0
    most = math.sqrt(small.rms_norm_eps * small.hidden_size / 2)
    return math.ldexp(1.0, math.floor(math.log2(most)))


def _refuse_unfit(loaded: LoadedModel, shape: Shape) -> None:
    """Name what does not fit.

    Raises:
        ModelError: another architecture, biases, fused layers, or something is too large.
    """
    small: Any = loaded.network.config
    why = ""
    if small.model_type != "llama" or small.attention_bias or small.mlp_bias:
        why = f"it is no Llama without biases but {small.model_type!r}"
    elif type(loaded.network.model.layers[0].mlp.down_proj) is not nn.Linear:  # type: ignore
        why = "its layers are fused; load it with fuse=False"
    elif shape.head_dim % small.head_dim:
        why = f"{shape.head_dim} is no multiple of its head size {small.head_dim}"
    elif small.num_key_value_heads * _kv_copies(small, shape) > shape.kv_heads:
        why = f"{shape.kv_heads} K/V heads are too few for it"
    else:
        sizes = {
            "hidden_size": shape.hidden - (shape.vocab > small.vocab_size),
            "num_hidden_layers": shape.layers,
            "intermediate_size": shape.intermediate,
        }
        why = "; ".join(
            f"its {name} {getattr(small, name)} is more than {most}"
            for name, most in sizes.items()
            if getattr(small, name) > most
        )
    if why:
        raise ModelError(f"{loaded.name} cannot be widened to the shape {shape.name}: {why}")


def _kv_copies(small: Any, shape: Shape) -> int:
    """How many new K/V heads an old one needs so that all of its query heads find a place."""
    old_group: int = small.num_attention_heads // small.num_key_value_heads
    return -(-old_group // (shape.heads // shape.kv_heads))


class _Corner:
    """Where each of the small network's weights goes in the wide one.

    Places are index tensors on the wide network's device: `stream` [d] of the residual stream,
    `units` [I] of an MLP, `queries` [heads · h] and `keys` [kv_heads · copies · h] of the heads'
    dimensions, with h the old head size.
    """

    def __init__(self, small: Any, wide: Any, copies: int) -> None:
        self._small, self._wide = small, wide
        old, new = small.config, wide.config
        self._device: torch.device = wide.lm_head.weight.device
        self._shrunk = math.sqrt(old.hidden_size / new.hidden_size)
        self._stretch = new.head_dim // old.head_dim
        self._constant = _constant(old, new.vocab_size)
        self._copies = copies
        self._stream = self._upto(old.hidden_size)
        self._units = self._upto(old.intermediate_size)
        self._query_heads = self._places_of_query_heads()
        self._queries = self._dimensions(self._query_heads)
        self._keys = self._dimensions(self._upto(old.num_key_value_heads * self._copies))

    def fill(self) -> None:
        """Lay the small network's weights into the wide one."""
        small, wide = self._small, self._wide
        old_layers, layers = small.model.layers, wide.model.layers
        for one, other in zip(old_layers, layers, strict=False):
            self._layer(one, other)
        for spare in layers[len(old_layers) :]:
            spare.self_attn.o_proj.weight.zero_()
            spare.mlp.down_proj.weight.zero_()
        self._norm(small.model.norm, wide.model.norm, _NORM_FACTOR)
        self._vocabulary(small.get_input_embeddings().weight, small.get_output_embeddings().weight)

    def _layer(self, small: Any, wide: Any) -> None:
        self._norm(small.input_layernorm, wide.input_layernorm)
        self._norm(small.post_attention_layernorm, wide.post_attention_layernorm)
        old, new, stream = small.self_attn, wide.self_attn, self._stream
        # What an old head's spare dimensions give may be anything where queries are zeros.
        every = new.q_proj.weight.view(-1, self._wide.config.head_dim, new.q_proj.weight.shape[1])
        every[self._query_heads] = 0.0
        self._put(new.q_proj, self._queries, stream, old.q_proj.weight * math.sqrt(self._stretch))
        self._put(new.k_proj, self._keys, stream, self._copied(old.k_proj.weight))
        self._put(new.v_proj, self._keys, stream, self._copied(old.v_proj.weight))
        new.o_proj.weight.zero_()
        self._put(new.o_proj, stream, self._queries, old.o_proj.weight)
        self._put(wide.mlp.gate_proj, self._units, stream, small.mlp.gate_proj.weight)
        self._put(wide.mlp.up_proj, self._units, stream, small.mlp.up_proj.weight)
        wide.mlp.down_proj.weight.zero_()
        self._put(wide.mlp.down_proj, stream, self._units, small.mlp.down_proj.weight)

    def _norm(self, small: Any, wide: Any, factor: float = 0.0) -> None:
        """A norm's weights; `factor` is the constant's."""
        wide.weight[self._stream] = (small.weight * self._shrunk).to(wide.weight)
        if self._constant:
            wide.weight[len(self._stream)] = factor

    def _vocabulary(self, embedding: Tensor, head: Tensor) -> None:
        wide, (count, width) = self._wide, head.shape
        inputs, outputs = wide.model.embed_tokens.weight, wide.lm_head.weight
        inputs[:, width:] = 0.0
        inputs[:count, :width] = embedding.to(inputs)
        outputs[:count, :width] = head.to(outputs)
        if self._constant:
            inputs[:, width] = self._constant
            outputs[:count, width] = 0.0
            outputs[count:, :width] = 0.0
            outputs[count:, width] = _HEAD_FACTOR

    def _put(self, linear: nn.Linear, rows: Tensor, columns: Tensor, weight: Tensor) -> None:
        """[rows, columns] of a layer's weight."""
        linear.weight[rows[:, None], columns] = weight.to(linear.weight)

    def _copied(self, weight: Tensor) -> Tensor:
        """[kv_heads · h, d] -> [kv_heads · copies · h, d], each head's copies side by side."""
        heads = weight.view(self._small.config.num_key_value_heads, -1, weight.shape[1])
        return heads.repeat_interleave(self._copies, 0).flatten(0, 1)

    def _places_of_query_heads(self) -> Tensor:
        """[old heads] which new head each is."""
        old, new = self._small.config, self._wide.config
        old_group = old.num_attention_heads // old.num_key_value_heads
        new_group = new.num_attention_heads // new.num_key_value_heads
        head = self._upto(old.num_attention_heads)
        # Of its old group's new groups, in order.
        places: Tensor = head // old_group * self._copies * new_group + head % old_group
        return places

    def _dimensions(self, heads: Tensor) -> Tensor:
        """[heads · h] where the old dimensions of these new heads lie.

        A dimension turns with the one half a head away. Pair i of n has the frequency
        theta^(-i / n), so an old pair i is the new pair i · stretch.
        """
        old, new = self._small.config.head_dim, self._wide.config.head_dim
        first = self._upto(old // 2) * self._stretch
        dimensions: Tensor = heads[:, None] * new + torch.cat([first, first + new // 2])
        return dimensions.flatten()

    def _upto(self, count: int) -> Tensor:
        return torch.arange(count, device=self._device)
