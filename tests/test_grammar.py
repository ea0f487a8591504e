"""Grammars in the engine: right at every node, whatever the batch, the tree or the device."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import letters
import pytest
import tiny
import torch
from schemas import SCHEMAS

from trbatch.engine.grammar import Grammar, Grammars
from trbatch.engine.sequence import Completion
from trbatch.engine.step_plain import PlainOperations

FORMS: list[dict[str, Any] | None] = [
    {"json": SCHEMAS["a family"]},
    {"regex": r"(an|on|anon)+ [0-9]{3}"},
    {"choice": ["yes", "yes, on and on", "no"]},
    {"json": SCHEMAS["an animal"]},
    None,
    {"json": SCHEMAS["a company"]},
    {"regex": r"[a-f]{4,30}"},
    {"json": {"type": "array", "items": {"type": "integer"}}},
]
PROMPTS = tiny.repetitive(len(FORMS), seed=9)


def requests(**sampling: Any) -> list[Any]:
    """One of each form; every second one samples unless told otherwise."""
    return [
        tiny.request(
            i, PROMPTS[i], ignore_eos=False, max_tokens=48, structured=form, seed=50 + i,
            **{"temperature": 0.9 * (i % 2), **sampling},
        )
        for i, form in enumerate(FORMS)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> dict[Any, Completion]:
    """What comes out without speculation."""
    return decode(speculate=False)


def decode(model: Any = None, **settings: Any) -> dict[Any, Completion]:
    return tiny.decode(tiny.engine(model or letters.loaded(), **settings), requests())


def tokens(done: dict[Any, Completion]) -> list[list[int]]:
    return [done[i].token_ids for i in range(len(done))]


def fits(form: dict[str, Any] | None, text: str) -> bool:
    if form is None:
        return True
    ((kind, asked),) = form.items()
    if kind == "json":
        jsonschema.validate(json.loads(text), asked)
    return kind == "json" or (
        text in asked if kind == "choice" else re.fullmatch(asked, text) is not None
    )


def test_every_text_that_ended_by_itself_is_of_its_form(plain: dict[Any, Completion]) -> None:
    done = plain
    assert not [one.error_message for one in done.values() if one.error_message]
    ended = [i for i, one in done.items() if one.finish_reason == "stop"]
    assert len(ended) >= 5, [one.text for one in done.values()]
    for i in ended:
        assert fits(FORMS[i], done[i].text), done[i].text
    assert len({done[2].text, "yes", "no", "yes, on and on"}) == 3, "one of the choices"


def test_speculation_trees_and_batches_give_the_same_tokens(plain: dict[Any, Completion]) -> None:
    model = letters.loaded()
    drafted = decode(model)
    assert tokens(drafted) == tokens(plain)
    assert tokens(decode(model, max_num_seqs=1, tree_size=7)) == tokens(plain)
    assert tokens(decode(model, max_num_seqs=8)) == tokens(plain)
    accepted = sum(one.num_accepted_draft_tokens for i, one in drafted.items() if FORMS[i])
    assert accepted > 0, "no drafted token was accepted under a grammar"


def test_on_a_device_such_rows_go_to_the_host_beside_the_others(
    plain: dict[Any, Completion],
) -> None:
    model = letters.loaded()
    engine = tiny.engine(model, operations=PlainOperations(), enforce_eager=True, tree_size=9)
    assert tokens(tiny.decode(engine, requests())) == tokens(plain)
    late = [sequence.lagged for sequence in admitted(engine)]
    assert late == [FORMS[i] is None for i in range(4, 8)]


def admitted(engine: Any) -> list[Any]:
    """The sequences of four requests, with a slot and pages."""
    for request in requests(temperature=0.0)[4:]:
        engine.add(request)
    engine._admit()
    return sorted(engine._scheduler.running, key=lambda one: one.request.key)


def test_a_mask_holds_for_the_ancestors_of_its_node_and_can_step_back() -> None:
    """The processor sees contexts in any order, as trees of several steps bring them."""
    grammars = Grammars(letters.loaded())
    asked = {"choice": ["abcd", "abXY", "aZ"]}
    request = grammars.constrained(tiny.request(0, [5], ignore_eos=False, structured=asked), [5])
    (grammar,) = request.logits_processors
    assert isinstance(grammar, Grammar)

    def after(text: str) -> set[str]:
        ids = letters.tokenizer()(text)["input_ids"] if text else []
        masked = grammar([5, *ids], torch.zeros(tiny.VOCAB))
        found = torch.nonzero(masked == 0)[:, 0].tolist()
        return {letters.tokenizer().decode([token]) for token in found}

    texts = ["", "a", "ab", "abX", "ab", "abc", "a", "aZ", "abcd", ""]
    allowed = [after(text) for text in texts]
    assert allowed == [
        {"a"}, {"b", "Z"}, {"c", "X"}, {"Y"}, {"c", "X"}, {"d"}, {"b", "Z"}, {"</s>"}, {"</s>"},
        {"a"},
    ]  # fmt: skip
    assert grammars.masks == len(texts)
    assert grammar.forced([5], 9) == letters.tokenizer()("a")["input_ids"]


def test_behind_a_drafted_end_of_the_text_nothing_is_asked_of_the_grammar() -> None:
    """Trees go on behind an end when the rows have learned what follows it."""
    grammars = Grammars(letters.loaded())
    form = {"choice": ["a"]}
    request = grammars.constrained(tiny.request(0, [5], ignore_eos=False, structured=form), [5])
    (grammar,) = request.logits_processors
    ids, (end,), logits = letters.tokenizer()("a")["input_ids"], grammars.ends, torch.randn(97)
    assert torch.equal(grammar([5, *ids, end], logits), logits)
    assert torch.equal(grammar([5, *ids, end, 30, 31], logits), logits)
    masked = grammar([5, *ids], logits)
    assert torch.nonzero(masked.isfinite())[:, 0].tolist() == [end]


def test_what_a_grammar_forces_is_drafted_first() -> None:
    """With nothing learned and texts that repeat nothing, forced tokens alone are accepted."""
    name = "".join(letters._LETTERS[5:40])
    form = {"json": {"type": "object", "properties": {name: {"enum": [7]}}, "required": [name]}}
    form["json"]["additionalProperties"] = False
    engine = tiny.engine(letters.loaded(), tree_size=9)
    asked = tiny.request(0, [5], ignore_eos=False, max_tokens=80, structured=form)
    done = tiny.decode(engine, [asked])[0]
    assert json.loads(done.text) == {name: 7}
    assert done.finish_reason == "stop"
    assert done.num_accepted_draft_tokens >= len(name) * 2 // 3


def test_a_text_cut_by_a_stop_string_is_an_error_row() -> None:
    engine = tiny.engine(letters.loaded())
    form = {"json": SCHEMAS["a colour"]}
    cut = tiny.request(0, [7, 8], ignore_eos=False, max_tokens=80, structured=form, stop=['":'])
    done = tiny.decode(engine, [cut])[0]
    assert (done.finish_reason, done.error_code) == ("error", "structured_output_failed")
    assert "do without 'stop'" in (done.error_message or "")
    assert (done.text, done.token_ids) == ("", [])


@pytest.mark.parametrize("by", ["text", "token"])
@pytest.mark.parametrize(
    ("form", "said"),
    [({"regex": "[a-z]{1,8}!"}, "an!"), ({"choice": ["yes!", "no!"]}, "yes!"),
     ({"regex": "[a-z]{1,8}!?"}, "an!"), ({"choice": ["yes!", "yes"]}, "yes!")],
)  # fmt: skip
def test_what_a_stop_leaves_of_a_text_is_proved(by: str, form: dict[str, Any], said: str) -> None:
    """What was cut away counts for nothing; a text that is of the form without it is a good one."""
    (mark,) = letters.tokenizer()("!")["input_ids"]
    stop = {"stop": ["!"]} if by == "text" else {"stop_token_ids": [mark]}
    bias = dict.fromkeys(letters.tokenizer()(said)["input_ids"], 50)
    row = tiny.request(0, [7, 8], ignore_eos=False, structured=form, logit_bias=bias, **stop)
    done = tiny.decode(tiny.engine(letters.loaded()), [row])[0]
    if done.finish_reason == "stop":
        assert fits(form, done.text) and done.text, done.text
        assert "!?" in str(form) or "yes'" in str(form)
    else:
        assert (done.finish_reason, done.error_code) == ("error", "structured_output_failed")
        assert "do without 'stop'" in (done.error_message or "")
        assert "!?" not in str(form) and "yes'" not in str(form)


def test_an_error_row_keeps_nothing_of_its_text() -> None:
    row = tiny.request(
        0, [7, 8], ignore_eos=False, structured={"choice": ["yes!"]}, stop=["!"], logprobs=1,
        prompt_logprobs=0, return_token_ids=True,
    )  # fmt: skip
    done = tiny.decode(tiny.engine(letters.loaded()), [row])[0]
    assert (done.finish_reason, done.text, done.token_ids) == ("error", "", [])
    assert done.logprobs is done.prompt_logprobs is done.prompt_token_ids is done.reasoning is None


def test_the_grammar_wins_over_settings_that_forbid_all_it_allows() -> None:
    def never_yes_or_no(context: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf)

    one = tiny.request(
        0, [9], ignore_eos=False, structured={"choice": ["yes", "no"]},
        logits_processors=(never_yes_or_no,), temperature=1.0,
    )  # fmt: skip
    done = tiny.decode(tiny.engine(letters.loaded()), [one])[0]
    assert (done.finish_reason, done.text in ("yes", "no")) == ("stop", True)


@pytest.mark.parametrize(
    ("model", "form", "code", "said"),
    [
        (letters, {"json": {"not": {}}}, "invalid_sampling", "not"),
        (letters, {"regex": "(?=a)"}, "invalid_sampling", "look-around"),
        (letters, {"choice": ["Ω", "é"]}, "sampling_failed", ""),
        (tiny, {"regex": "a"}, "structured_output_unavailable", "NumberTokenizer"),
    ],
)
def test_a_row_whose_grammar_cannot_be_used_fails_alone(
    model: Any, form: dict[str, Any], code: str, said: str
) -> None:
    engine = tiny.engine(model.loaded())
    bad = tiny.request(0, [5, 6], ignore_eos=False, structured=form)
    done = tiny.decode(engine, [bad, tiny.request(1, [5, 6])])
    assert done[0].error_code == code
    assert said in (done[0].error_message or "")
    assert done[1].finish_reason == "length"


def test_without_the_library_a_row_says_which_extra_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trbatch.structured.importlib.util.find_spec", lambda name: None)
    engine = tiny.engine(letters.loaded())
    asked = tiny.request(0, [5], ignore_eos=False, structured={"regex": "a"})
    done = tiny.decode(engine, [asked])[0]
    assert done.error_code == "structured_output_unavailable"
    assert "pip install 'trbatch[structured]'" in (done.error_message or "")


def test_the_engine_counts_its_masks() -> None:
    engine = tiny.engine(letters.loaded(), speculate=False)
    done = tiny.decode(engine, requests(temperature=0.0))
    stats = engine.stats()
    assert stats["grammar_masks"] == sum(len(one.token_ids) for i, one in done.items() if FORMS[i])
    assert 0 < stats["grammar_mask_s"] < stats["busy_s"]
    assert stats["grammar_compile_s"] > 0
