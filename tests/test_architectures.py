"""Every supported architecture says in a drafted batch what transformers' `generate` says alone."""

import pytest
import tiny

from trbatch.engine import model as model_module
from trbatch.engine.model import from_network, refuse_unsupported
from trbatch.errors import ModelError

_AFMOE = {
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("kind", [*tiny.ARCHITECTURES, "afmoe"])
def test_greedy_output_equals_generate(kind: str) -> None:
    # afmoe views its attention's output in another shape: it has to be contiguous.
    network = tiny.network(kind, **(_AFMOE if kind == "afmoe" else {}))
    prompts = tiny.prompts(4, seed=1) + tiny.repetitive(3, seed=2)
    expected = [tiny.generate(network, ids, 24) for ids in prompts]
    model = from_network(network, tiny.NumberTokenizer(), name=kind)
    # A prefill piece shorter than the prompts, so that chunks of prompts are covered too.
    done = tiny.decode(
        tiny.engine(model, prefill_chunk=16),
        [tiny.request(i, ids) for i, ids in enumerate(prompts)],
    )
    assert [done[i].token_ids for i in range(len(prompts))] == expected
    assert sum(c.num_accepted_draft_tokens for c in done.values()) > 0, "no draft was ever right"


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("mamba", {}, "recurrent state"),
        ("deepseek_v3", {"kv_lora_rank": 8}, "MLA"),
        ("gpt_oss", {}, "sinks"),
        ("t5", {}, "encoder-decoder"),
    ],
)
def test_state_outside_keys_and_values_is_refused_by_name(kind, changes, why) -> None:
    from transformers import CONFIG_MAPPING

    with pytest.raises(ModelError, match=why) as caught:
        refuse_unsupported(CONFIG_MAPPING[kind](**changes))
    assert kind in str(caught.value)


def test_layers_that_bypass_the_attention_interface_are_refused() -> None:
    network = tiny.network("bloom", n_head=4, hidden_size=32, n_layer=2)
    with pytest.raises(ModelError, match="bloom"):
        tiny.engine(from_network(network, tiny.NumberTokenizer(), name="bloom"))


def test_attention_that_looks_both_ways_is_refused() -> None:
    with pytest.raises(ModelError, match="'bert' are not supported yet: its attention looks both"):
        from_network(tiny.network("bert"), tiny.NumberTokenizer(), name="bert")


def test_attention_with_more_arguments_than_ours_is_refused_whatever_the_model_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_module, "refuse_unsupported", lambda config: None)
    network = tiny.network("gpt_oss", num_key_value_heads=2, head_dim=8, num_local_experts=2)
    with pytest.raises(
        ModelError, match="'gpt_oss' are not supported yet: its attention takes s_aux"
    ):
        from_network(network, tiny.NumberTokenizer(), name="sinks")
