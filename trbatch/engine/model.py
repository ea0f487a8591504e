"""A causal language model of transformers, run over flat tokens and our own cache.

`CausalModel.forward` is the only place where the network runs. Architectures that keep state
elsewhere than in keys and values of ordinary attention are refused by name.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trbatch.engine import merging, quantised
from trbatch.engine.attention import ATTENTION, Plan, ShapeProbe, Span, StepPlan, active
from trbatch.engine.fuse import fuse as fuse_network
from trbatch.engine.kv_cache import KVCache
from trbatch.engine.loading import loading
from trbatch.errors import ModelError, WorkerError
from trbatch.models import quiet_transformers, weights_digest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PLAIN_LAYERS = {"full_attention", "sliding_attention", "attention"}


@dataclass(slots=True)
class LoadedModel:
    """A model on its device, its tokenizer, and what identifies it."""

    network: nn.Module
    tokenizer: Any
    name: str
    fingerprint: str  # of config and weights: two models of one fingerprint speak alike
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    vocab_size: int  # rows of the output projection: the ids that may come out
    layer_shapes: list[tuple[int, int]]  # (kv_heads, head_dim) of each layer's keys and values

    @property
    def max_positions(self) -> int:
        """The longest text that the model was made for, tokens."""
        return int(getattr(self.network.config, "max_position_embeddings", 0) or 1 << 30)


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU, else the CPU.

    Raises:
        WorkerError: no such device here.
    """
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise WorkerError(f"{device!r} is not a device", hint="cpu, cuda:0, …") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise WorkerError("no GPU that torch can use", hint="--device cpu")
    try:
        torch.zeros(1, device=picked).item()  # of a number that is not there, or `meta`
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise WorkerError(f"device {device!r} cannot be used: {error}", hint="--device") from error
    return picked


def pick_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """`auto` is float32 on a CPU, else the checkpoint's 16-bit type, else bfloat16.

    Raises:
        WorkerError: no such dtype.
    """
    if dtype not in ("auto", *_DTYPES):
        raise WorkerError(f"{dtype!r} is not a dtype", hint=f"auto, {', '.join(_DTYPES)}")
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if getattr(config, "dtype", None) == torch.float16 else torch.bfloat16


def load_pretrained(
    *,
    source: str,
    name: str,
    revision: str = "",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    fuse: bool = True,
    adapter: Path | None = None,
) -> LoadedModel:
    """Load safetensors weights and the tokenizer, and merge an adapter into them.

    See `trbatch.models.load_model`, and `from_network` for `fuse`.
    """
    place = pick_device(device)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision and not Path(source).is_dir():
        options["revision"] = revision
    with loading(name):
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, **options)
            refuse_unsupported(config)
            quantised.prepare(config)
            kind = pick_dtype(dtype, place, config)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=kind, use_safetensors=True,
                attn_implementation=ATTENTION, output_loading_info=True, **options,
            )  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            # WordPiece's clean-up, which some transformers apply to BPE too: it eats spaces.
            tokenizer.clean_up_tokenization_spaces = False
        network, report = loaded
        if missing := sorted(report["missing_keys"]):
            # transformers would fill them with random numbers and go on.
            raise ModelError(f"model {name!r} lacks {len(missing)} weights, such as {missing[0]}")
        network = nn.Module.to(network, place)
        if adapter is not None:
            network = merging.merge(network, adapter)
        made = from_network(network, tokenizer, name=name, source=source, fuse=fuse)
        if adapter is not None:
            made.fingerprint = merging.fingerprint(made.fingerprint, adapter)
        return made


def from_network(
    network: nn.Module, tokenizer: Any, *, name: str, source: str = "", fuse: bool = True
) -> LoadedModel:
    """Make an instantiated transformers model ready: checked, fused, in evaluation mode.

    Args:
        fuse: put quicker modules that say the same in the places of its own.

    Raises:
        ModelError: its architecture is not supported.
    """
    with loading(name):
        config: Any = network.config
        refuse_unsupported(config)
        network.eval()
        config._attn_implementation = ATTENTION
        weight = network.get_output_embeddings().weight  # type: ignore[operator]
        layer_shapes = _probe(network, weight.device)
        if fuse:
            fuse_network(network, lambda: _probe(network, weight.device))
        return LoadedModel(
            network=network,
            tokenizer=tokenizer,
            name=name,
            fingerprint=_fingerprint(config, source),
            device=weight.device,
            dtype=weight.dtype,
            eos_token_ids=_eos_token_ids(network, tokenizer),
            vocab_size=int(weight.shape[0]),
            layer_shapes=layer_shapes,
        )


def refuse_unsupported(config: Any) -> None:
    """Name what this engine cannot run exactly, before any weight is loaded.

    Raises:
        ModelError: state outside keys and values, or attention that is not plain.
    """
    kind = config.model_type
    why = ""
    if getattr(config, "is_encoder_decoder", False):
        why = "it is an encoder-decoder"
    elif any(word in kind for word in ("mamba", "rwkv", "jamba", "xlstm", "zamba")):
        why = "it keeps a recurrent state"
    elif getattr(config, "kv_lora_rank", None):
        why = "it caches latents instead of keys and values (MLA)"
    elif kind in ("gpt_oss",):
        why = "its attention has sinks"
    elif getattr(config, "num_kv_shared_layers", 0):
        why = "its layers share keys and values"
    elif getattr(config, "attention_chunk_size", None):
        why = "its attention is chunked"
    elif other := sorted(set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS):
        why = f"it has layers of type {', '.join(other)}"
    if why:
        raise ModelError(f"models of type {kind!r} are not supported yet: {why}")


class CausalModel:
    """Runs a loaded model over flat tokens.

    Args:
        loaded: the model.
        page_size: tokens a page of the K/V cache; `allocate` makes it.
        attention: `triton` for one kernel over all sequences, `torch` for its slow twin, `auto` for
            the kernel where there is a GPU and Triton.
    """

    def __init__(self, loaded: LoadedModel, *, page_size: int, attention: str = "auto") -> None:
        assert attention in ("auto", "triton", "torch"), f"no attention is named {attention!r}"
        self.loaded = loaded
        self._plan_of = _planner(attention, loaded)
        self._page_size = page_size
        self.cache: KVCache | None = None

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, all layers."""
        size = self.loaded.dtype.itemsize
        return sum(2 * heads * dim * size for heads, dim in self.loaded.layer_shapes)

    def allocate(self, slots: int, *, adjacent: bool = True) -> KVCache:
        """Make the K/V cache, for `slots` tokens. For `adjacent`, see `KVCache`."""
        self.cache = KVCache(
            self.loaded.layer_shapes, slots=slots, page_size=self._page_size,
            device=self.loaded.device, dtype=self.loaded.dtype, adjacent=adjacent,
        )  # fmt: skip
        return self.cache

    @torch.inference_mode()
    def forward(self, tokens: Tensor, spans: Sequence[Span], keep: Tensor | None = None) -> Tensor:
        """One forward over all spans.

        Args:
            tokens: [N] ids, one sequence after the other.
            spans: each sequence's part, in the same order; their lengths sum to N.
            keep: indices [M] into the N tokens whose logits are wanted; None for all.

        Returns:
            Raw logits [M, V], float32.
        """
        return self.project(tokens, spans, keep).float()

    def project(self, tokens: Tensor, spans: Sequence[Span], keep: Tensor | None = None) -> Tensor:
        """The same in the network's own type."""
        assert self.cache is not None, "allocate the cache first"
        plan = self._plan_of(self.cache, spans)
        positions = torch.cat([span.positions for span in spans])
        return self.run(tokens, positions, plan, keep)

    def run(
        self, tokens: Tensor, positions: Tensor, plan: Plan, keep: Tensor | None = None
    ) -> Tensor:
        """The network over a plan that is made already. Never waits for the device.

        Args:
            tokens, positions: [N] ids and places in their texts.
            keep: see `forward`.

        Returns:
            Raw logits [M, V] in the network's type.
        """
        with active(plan):
            out = self.loaded.network(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False,
                logits_to_keep=0 if keep is None else keep,
            )  # fmt: skip
        logits: Tensor = out.logits[0]
        return logits


def _planner(attention: str, loaded: LoadedModel) -> Callable[[KVCache, Sequence[Span]], Plan]:
    """What plans a forward. The kernels are imported here, where they are wanted, and only then."""
    if attention == "auto":
        found = loaded.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        attention = "triton" if found else "torch"
    if attention == "torch":
        return partial(StepPlan, dtype=loaded.dtype)
    from trbatch.engine.gpu_attention import plan_of

    return plan_of


def _probe(network: Any, device: torch.device) -> list[tuple[int, int]]:
    """Run one token to see each layer's (kv_heads, head_dim), and that each layer asks us.

    Raises:
        ModelError: the network's attention does not go through transformers' interface.
    """
    probe = ShapeProbe()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    kind, layers = network.config.model_type, network.config.num_hidden_layers
    try:
        with active(probe), torch.inference_mode():
            network(input_ids=token, position_ids=token, use_cache=False, logits_to_keep=1)
    except TypeError as error:
        raise ModelError(f"models of type {kind!r} are not supported yet: {error}") from error
    if sorted(probe.shapes) != list(range(layers)):
        raise ModelError(
            f"models of type {kind!r} are not supported yet: {len(probe.shapes)} of {layers} "
            "layers use transformers' attention interface"
        )
    return [probe.shapes[index] for index in range(layers)]


def _eos_token_ids(network: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text: the generation config's, else the tokenizer's."""
    declared = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    if declared is None:
        declared = getattr(tokenizer, "eos_token_id", None)
    if declared is None:
        return frozenset()
    return frozenset([declared] if isinstance(declared, int) else declared)


def _fingerprint(config: Any, source: str) -> str:
    """A local folder by its content, a hub model by its commit, a bare network by its config."""
    folder = Path(source) if source else None
    if folder is not None and folder.is_dir():
        return weights_digest(folder)
    identity = f"{source}@{getattr(config, '_commit_hash', None)}" if source else ""
    text = identity or config.to_json_string()
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
