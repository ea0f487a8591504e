"""A LoRA adapter merged at load: what it says, whose matrices it teaches, what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import letters
import pytest
import quantised_models
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trbatch import adapters
from trbatch.cli_configs import job_spec, with_adapter, worker_config
from trbatch.config import EngineConfig, JobSpec, SamplingParams, WorkerConfig
from trbatch.confinement import Confinement
from trbatch.engine.sequence import TaskKey
from trbatch.errors import ModelError, UsageError, WorkerError
from trbatch.lease import BadChunk
from trbatch.models import load_model
from trbatch.naming import model_name
from trbatch.queue import ModelKey

PROMPTS = tiny.repetitive(3, seed=6)
LENGTH = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_models.plain(tmp_path_factory.mktemp("base") / "m", tiny.network("llama"))


def adapter(folder: Path, base: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A LoRA of that model with weights that matter."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for what is on its way out
        wrapped = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **wanted))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(tmp_path_factory.mktemp("lora") / "one", base)


def name_of(base: Path, lora: Path) -> str:
    return adapters.joined(str(base), str(lora))


def change(folder: Path, **settings: Any) -> None:
    file = folder / adapters.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_it_says_what_peft_says_without_merging(base: Path, lora: Path) -> None:
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = [tiny.generate(alone, ids, LENGTH) for ids in PROMPTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unmerged = PeftModel.from_pretrained(alone, str(lora)).eval()
    loaded = load_model(name_of(base, lora), device="cpu")
    requests = [tiny.request(i, ids, max_tokens=LENGTH) for i, ids in enumerate(PROMPTS)]
    done = tiny.decode(tiny.engine(loaded, tree_size=9), requests)
    tokens = [done[i].token_ids for i in range(len(PROMPTS))]
    assert tokens == [tiny.generate(unmerged, ids, LENGTH) for ids in PROMPTS]
    assert tokens != before, "the adapter changes what the model says"
    assert not [name for name, _ in loaded.network.named_parameters() if "lora" in name]


def test_each_adapter_has_a_fingerprint_and_so_a_matrix_of_its_own(
    base: Path, lora: Path, tmp_path: Path
) -> None:
    other = adapter(tmp_path / "other", base, seed=1)
    same = adapter(tmp_path / "same", base)
    change(same, base_model_name_or_path=json.loads((lora / adapters.CONFIG).read_text())[
        "base_model_name_or_path"
    ])  # fmt: skip
    prints = [
        load_model(name, device="cpu").fingerprint
        for name in (str(base), name_of(base, lora), name_of(base, other), name_of(base, same))
    ]
    assert len(set(prints)) == 3
    assert prints[1] == prints[3], "what is the same in another folder shares"
    saved = set()
    for name in (str(base), name_of(base, lora)):
        engine = tiny.engine(load_model(name, device="cpu"))
        task = TaskKey("t", folder=tmp_path / "matrices")
        tiny.decode(engine, [tiny.request(0, PROMPTS[0], max_tokens=4, task=task)])
        engine.save_tasks()
        saved |= set((tmp_path / "matrices").rglob("*.safetensors"))
    assert len(saved) == 2


def test_jobs_with_it_have_queues_and_fingerprints_of_their_own(base: Path, lora: Path) -> None:
    plain, merged = ModelKey.of(str(base)), ModelKey.of(name_of(base, lora))
    assert plain.queue_names != merged.queue_names
    assert str(merged) == f"{base} + {lora}"
    options: dict[str, Any] = {
        "model": str(base), "adapter": str(lora), "json_schema": None, "regex": None, "choices": (),
    }  # fmt: skip
    assert job_spec("in.jsonl", options) == JobSpec(
        input="in.jsonl", model=name_of(base, lora), sampling=SamplingParams()
    )
    assert worker_config(_engine(options)) == WorkerConfig(model=name_of(base, lora))
    assert with_adapter({"model": "m", "adapter": ""}) == {"model": "m"}
    with pytest.raises(UsageError, match="has an adapter already"):
        with_adapter({"model": "m + a", "adapter": "b"})


def _engine(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"device": EngineConfig().device}


def test_a_worker_reads_no_adapter_from_outside_its_roots(base: Path, lora: Path) -> None:
    fence = Confinement((str(base.parent),))
    fence.check_model(str(base))
    with pytest.raises(BadChunk):
        fence.check_model(name_of(base, lora))
    Confinement((str(base.parent), str(lora.parent))).check_model(name_of(base, lora))
    fence.check_model(f"{base} + someone/an-adapter")


def test_names_of_adapters_are_made_absolute_or_refused(
    base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lora.parent)
    assert model_name(f"{base} + one") == name_of(base, lora)
    assert model_name(f"{base} + someone/else") == f"{base} + someone/else"
    with pytest.raises(UsageError, match="no adapter at /nowhere"):
        model_name(f"{base} + /nowhere")
    with pytest.raises(UsageError, match="no adapter at"):
        model_name(f"{base} + {base}")
    with pytest.raises(UsageError, match="no adapter at one/adapter_config"):
        model_name(f"{base} + one/{adapters.CONFIG}")


def test_weights_that_can_run_code_are_not_read(base: Path, lora: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / adapters.CONFIG).write_text((lora / adapters.CONFIG).read_text())
    torch.save(load_file(lora / adapters.WEIGHTS), folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors") as caught:
        load_model(name_of(base, folder), device="cpu")
    assert "run code" in (caught.value.hint or "")


def test_what_does_not_fit_is_refused_and_never_half_applied(base: Path, tmp_path: Path) -> None:
    wide = quantised_models.plain(tmp_path / "wide", quantised_models.network())
    with pytest.raises(ModelError, match="does not fit this model"):
        load_model(name_of(base, adapter(tmp_path / "a", wide)), device="cpu")
    renamed = adapter(tmp_path / "b", base)
    weights = load_file(renamed / adapters.WEIGHTS)
    moved = {name.replace("layers.1", "layers.7"): value for name, value in weights.items()}
    save_file(moved, renamed / adapters.WEIGHTS)
    with pytest.raises(ModelError, match="does not fit this model"):
        load_model(name_of(base, renamed), device="cpu")
    more = adapter(tmp_path / "c", base)
    extra = {name.replace("layers.1", "layers.7"): v.clone() for name, v in weights.items()}
    save_file(weights | extra, more / adapters.WEIGHTS)
    with pytest.raises(ModelError, match=r"the model has no layer model\.layers\.7"):
        load_model(name_of(base, more), device="cpu")


def test_other_kinds_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "ia3", base)
    change(folder, peft_type="IA3")
    with pytest.raises(ModelError, match="of type IA3: only LORA"):
        load_model(name_of(base, folder), device="cpu")
    tied = quantised_models.plain(
        tmp_path / "tied", tiny.network("llama", tie_word_embeddings=True)
    )
    change(folder, peft_type="LORA", target_modules=["lm_head"])
    with pytest.raises(ModelError, match="lm_head, whose weights serve as input and output"):
        load_model(name_of(tied, folder), device="cpu")


def test_merging_into_four_bits_is_refused_and_into_fp8_is_not(tmp_path: Path) -> None:
    from trbatch.engine import merging

    network = quantised_models.network()
    fp8 = quantised_models.fine_grained_fp8(tmp_path / "fp8", network)
    plain = quantised_models.plain(tmp_path / "plain", network)
    lora = adapter(tmp_path / "lora", plain)
    assert load_model(name_of(fp8, lora), device="cpu").dtype == torch.float32
    network.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ModelError, match="weights of four bits"):
        merging.merge(network, lora)


def test_without_peft_the_error_names_the_extra(
    base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trbatch.engine import merging

    monkeypatch.setattr(merging.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkerError, match="needs the package peft") as caught:
        merging.merge(letters.loaded().network, lora)
    assert caught.value.hint == "pip install 'trbatch[lora]'"
