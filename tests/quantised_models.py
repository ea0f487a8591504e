"""Tiny models with quantised weights, made on a CPU: folders as hubs have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import letters
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

_SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
_BLOCK = 128  # rows and columns that share a scale, in the fine-grained form
_MOST = torch.finfo(torch.float8_e4m3fn).max


def network() -> nn.Module:
    """A tiny Llama wide enough for blocks of 128."""
    return tiny.network("llama", **_SIZES)


def save(folder: Path, model: nn.Module, weights: dict[str, Tensor], how: dict[str, Any]) -> Path:
    """Write a folder of these weights that says how they are quantised."""
    model.save_pretrained(folder)  # type: ignore[operator]
    letters.tokenizer().save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if how:
        config["quantization_config"] = how
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def plain(folder: Path, model: nn.Module, how: dict[str, Any] | None = None) -> Path:
    """The model as it is; `how`: what its config says of quantisation, true or not."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return save(folder, model, weights, how or {})


def fine_grained_fp8(folder: Path, model: nn.Module) -> Path:
    """FP8 in blocks of 128 by 128, as DeepSeek and Qwen publish it; the model becomes the same."""
    weights = dict(model.state_dict())
    for name, linear in _linears(model):
        stored, scales = _in_blocks(linear.weight.data)
        weights[f"{name}.weight"], weights[f"{name}.weight_scale_inv"] = stored, scales
        wide = scales.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
        rows, columns = stored.shape
        linear.weight.data = stored.float() * wide[:rows, :columns]
    how = {
        "quant_method": "fp8", "activation_scheme": "dynamic",
        "weight_block_size": [_BLOCK, _BLOCK],
    }  # fmt: skip
    return save(folder, model, weights, how)


def compressed_fp8(folder: Path, model: nn.Module) -> Path:
    """FP8 with a scale a row, as llm-compressor writes it; the model becomes the same."""
    weights = dict(model.state_dict())
    for name, linear in _linears(model):
        scale = linear.weight.data.abs().amax(1, keepdim=True) / _MOST
        stored = (linear.weight.data / scale).to(torch.float8_e4m3fn)
        weights[f"{name}.weight"], weights[f"{name}.weight_scale"] = stored, scale
        linear.weight.data = stored.float() * scale
    args = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**args, "strategy": "channel", "dynamic": False},
        "input_activations": {**args, "strategy": "token", "dynamic": True},
    }
    how = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip
    return save(folder, model, weights, how)


def four_bits(folder: Path, model: nn.Module, scratch: Path) -> Path:
    """NF4 by bitsandbytes, saved as transformers saves it.

    Args:
        scratch: where the unquantised model is put first.
    """
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        plain(scratch, model), dtype=torch.float32, quantization_config=how
    )
    loaded.save_pretrained(folder)
    letters.tokenizer().save_pretrained(folder)
    return folder


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def _in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[m, n] -> FP8 [m, n], scales [⌈m/128⌉, ⌈n/128⌉]."""
    rows, columns = weight.shape
    up, across = -(-rows // _BLOCK), -(-columns // _BLOCK)
    padded = torch.zeros(up * _BLOCK, across * _BLOCK)
    padded[:rows, :columns] = weight
    scales = padded.view(up, _BLOCK, across, _BLOCK).abs().amax((1, 3)) / _MOST
    wide = scales.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
    return (weight / wide[:rows, :columns]).to(torch.float8_e4m3fn), scales
