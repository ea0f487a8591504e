"""What the model says after each single token: made once, kept, and what matrices begin with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from trbatch.config import EngineConfig
from trbatch.engine import bigrams
from trbatch.engine.engine import Engine
from trbatch.engine.model import CausalModel
from trbatch.engine.text import opening_ids
from trbatch.models import load_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CausalModel:
    """A tiny model with room for some tokens, and a cache folder of its own."""
    monkeypatch.setenv("TRBATCH_CACHE", str(tmp_path))
    causal = CausalModel(tiny.loaded("llama"), page_size=8)
    causal.allocate(64)
    return causal


@pytest.mark.parametrize("opening", [[], [1], [5, 9, 3]])
def test_a_row_is_what_the_model_says_after_opening_and_token(opening: list[int]) -> None:
    network, causal = tiny.network("llama"), CausalModel(tiny.loaded("llama"), page_size=8)
    causal.allocate(64)
    free = causal.cache.pool.free
    rows = bigrams.make(causal, opening, candidates=8, count=90)
    assert causal.cache.pool.free == free, "the room was not given back"
    for token in range(90):
        with torch.inference_mode():
            said = network(torch.tensor([[*opening, token]], device=tiny.DEVICE)).logits[0, -1]
        assert rows[token].tolist() == said.topk(8).indices.tolist()
    assert (rows[90:] == -1).all()


def test_rows_are_made_once_and_kept(
    model: CausalModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="trbatch"):
        first = bigrams.rows_of(model, candidates=8)
    assert "what follows each of 97 tokens (once)" in caplog.text, "a start says what it waits for"
    assert first is not None
    assert first.shape == (tiny.VOCAB, 8)
    monkeypatch.setattr(bigrams, "make", lambda *_, **__: pytest.fail("made again"))
    again = bigrams.rows_of(model, candidates=8)
    assert torch.equal(first, again)


def test_a_damaged_file_is_made_again(model: CausalModel, tmp_path: Path) -> None:
    first = bigrams.rows_of(model, candidates=8)
    (file,) = (tmp_path / "bigrams").iterdir()
    file.write_bytes(b"no tensors")
    assert torch.equal(bigrams.rows_of(model, candidates=8), first)


def test_a_cpu_asks_for_the_first_tokens_only_and_a_large_model_for_none(
    model: CausalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model.loaded.device.type != "cpu":
        pytest.skip("no GPU has these limits")
    monkeypatch.setattr(bigrams, "_CPU_TOKENS", 50)
    rows = bigrams.rows_of(model, candidates=8)
    assert (rows[:50] >= 0).all()
    assert (rows[50:] == -1).all()
    monkeypatch.setattr(bigrams, "_CPU_PARAMETERS", 10)
    assert bigrams.rows_of(model, candidates=8) is None


@pytest.mark.long
def test_a_real_model_needs_fewer_forwards_with_them_and_says_the_same(small_model: Path) -> None:
    loaded = load_model(str(small_model), device="cpu")
    texts = ["Name three rivers of Europe.", "Why is the sky blue?"]
    requests = [
        tiny.chat_request(i, [{"role": "user", "content": text}], max_tokens=32)
        for i, text in enumerate(texts)
    ]
    settings = {"device": "cpu", "max_num_seqs": 2, "tree_size": 9}
    done = {
        on: tiny.decode(Engine(loaded, EngineConfig(bigrams=on, **settings)), requests)
        for on in (False, True)
    }
    for key, one in done[True].items():
        assert one.token_ids == done[False][key].token_ids
    steps = {on: sum(one.num_spec_steps for one in some.values()) for on, some in done.items()}
    assert steps[True] < 0.95 * steps[False], steps


def test_the_opening_is_what_the_template_puts_before_an_answer() -> None:
    class Templated(tiny.NumberTokenizer):
        chat_template = "yes"
        bos_token_id = 1

        def apply_chat_template(self, messages, *, tokenize, add_generation_prompt) -> str:
            return "7 8 9" + (" 5 6" if add_generation_prompt else "")

    assert opening_ids(Templated()) == [5, 6]
    assert opening_ids(SimpleNamespace(chat_template=None, bos_token_id=1)) == [1]
    assert opening_ids(tiny.NumberTokenizer()) == []


def test_a_template_that_wants_more_than_a_question_leaves_the_first_token() -> None:
    class Strict(tiny.NumberTokenizer):
        chat_template = "yes"
        bos_token_id = 1

        def apply_chat_template(self, *_, **__) -> str:
            raise ValueError("a system message must come first")

    assert opening_ids(Strict()) == [1]
