"""Grammars of models that think: the form is the answer's, whoever opens the reasoning."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import letters
import pytest
import tiny
import torch

from trbatch.engine.grammar import Grammar, Grammars
from trbatch.engine.model import LoadedModel
from trbatch.engine.sequence import Completion, Request

FORMS: list[dict[str, Any]] = [
    {"choice": ["yes", "no", "on and on"]},
    {"regex": r"(an|on){2,9} [0-9]{3}"},
    {"json": {"type": "object", "properties": {"year": {"type": "integer", "maximum": 9999}},
              "required": ["year"], "additionalProperties": False}},
]  # fmt: skip
THOUGHT = "so it is an option, and on and on, "  # of every row; then it goes on as it likes
both_ways = pytest.mark.parametrize("marks", ["shown", "hidden"])
whoever_opens = pytest.mark.parametrize("opened", [True, False], ids=["prompt", "text"])


def ids(text: str, marks: str) -> list[int]:
    found: list[int] = letters.tokenizer(marks)(text)["input_ids"]
    return found


class Says:
    """A processor that makes a text begin with these tokens, as a model that wants to say them."""

    def __init__(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        self._prompt, self._tokens = len(prompt), tokens

    def __call__(self, context: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        place = len(context) - self._prompt
        if place >= len(self._tokens):
            return logits
        logits = logits.clone()
        logits[self._tokens[place]] += 1000
        return logits


def thinking(
    key: int, form: dict[str, Any], said: str, marks: str, *, prompt: str = "Why?", **sampling: Any
) -> Request:
    asked = ids(prompt, marks)
    settings = {"ignore_eos": False, "max_tokens": 90, "structured": form, "seed": 50 + key}
    says = Says(asked, ids(said, marks))
    return tiny.request(key, asked, logits_processors=(says,), **{**settings, **sampling})


def decode(model: LoadedModel, rows: list[Request], **settings: Any) -> dict[Any, Completion]:
    return tiny.decode(tiny.engine(model, **settings), rows)


def of_form(form: dict[str, Any], text: str) -> bool:
    ((kind, asked),) = form.items()
    if kind == "json":
        return set(json.loads(text)) == {"year"}
    return text in asked if kind == "choice" else re.fullmatch(asked, text) is not None


@both_ways
@whoever_opens
def test_the_form_is_the_answers_with_and_without_drafts(marks: str, opened: bool) -> None:
    start = "" if opened else "<think>"
    prompt = "Why?<think>" if opened else "Why?"
    rows = [
        thinking(
            i, form, start + THOUGHT * 2 + "</think>", marks, prompt=prompt,
            temperature=0.9 * (i % 2), max_tokens=120,
        )
        for i, form in enumerate(FORMS * 2)
    ]  # fmt: skip
    model = letters.loaded(marks)
    plain = decode(model, rows, speculate=False)
    for i, done in plain.items():
        assert done.finish_reason == "stop", done.error_message
        assert done.reasoning == (THOUGHT * 2).strip()
        assert of_form(FORMS[i % 3], done.text), done.text
    for settings in ({"max_num_seqs": 1, "tree_size": 7}, {"max_num_seqs": 8}):
        drafted = decode(model, rows, **settings)  # type: ignore[arg-type]
        assert [done.token_ids for _, done in sorted(drafted.items())] == [
            done.token_ids for _, done in sorted(plain.items())
        ]
        assert sum(done.num_accepted_draft_tokens for done in drafted.values()) > 0


@both_ways
def test_a_model_that_could_think_and_does_not_answers_in_its_form(marks: str) -> None:
    done = decode(letters.loaded(marks), [thinking(0, FORMS[0], "yes", marks)])[0]
    assert (done.finish_reason, done.reasoning, done.text) == ("stop", None, "yes")


@both_ways
def test_a_prompt_that_has_ended_the_reasoning_leaves_none_to_open(marks: str) -> None:
    row = thinking(0, FORMS[0], "<think>", marks, prompt="Why?<think> </think> ")
    done = decode(letters.loaded(marks), [row])[0]
    assert (done.finish_reason, done.reasoning) == ("stop", None)
    assert done.text in FORMS[0]["choice"]


@both_ways
@whoever_opens
def test_a_row_that_thinks_to_its_last_token_ends_with_length(marks: str, opened: bool) -> None:
    said = ("" if opened else "<think>") + THOUGHT
    prompt = "Why?<think>" if opened else "Why?"
    row = thinking(0, FORMS[1], said, marks, prompt=prompt, max_tokens=12)
    done = decode(letters.loaded(marks), [row])[0]
    assert (done.finish_reason, done.text, done.error_code) == ("length", "", None)
    assert done.reasoning and THOUGHT.startswith(done.reasoning)


@both_ways
@pytest.mark.parametrize("form", FORMS, ids=["choice", "regex", "json"])
@pytest.mark.parametrize(
    ("said", "stop"), [("so it is</s>", ()), ("so it is !", ("!",))], ids=["end", "stop"]
)
def test_a_text_that_ends_in_its_reasoning_is_an_error_row(
    marks: str, form: dict[str, Any], said: str, stop: tuple[str, ...]
) -> None:
    row = thinking(0, form, said, marks, prompt="Why?<think>", stop=stop)
    done = decode(letters.loaded(marks), [row])[0]
    assert (done.finish_reason, done.error_code) == ("error", "structured_output_failed")
    assert "in its reasoning" in (done.error_message or "")


def test_markers_of_several_tokens_end_where_a_token_does() -> None:
    """The token of `an` would end the marker and begin the answer at once: it may not."""
    marks = {"reasoning_start": "[[", "reasoning_end": "]a"}
    (an,), place = ids("an", ""), len(ids("so it is ]", ""))
    cut = {"prompt": "Why?[[", "max_tokens": place + 1, **marks}
    rows = [
        thinking(0, FORMS[1], "so it is ]an", "", **cut),
        thinking(1, FORMS[1], "so it is ]a", "", **{**cut, "max_tokens": 90}),
        thinking(2, FORMS[1], "so it is ]an", "", **{**cut, "structured": None}),
    ]
    model = letters.loaded()
    done = decode(model, rows)
    assert done[2].token_ids[place] == an != done[0].token_ids[place], "a row without a form may"
    assert done[1].finish_reason == "stop" and of_form(FORMS[1], done[1].text)
    assert done[1].reasoning == "so it is"
    plain = decode(model, rows, speculate=False)
    assert [done[i].token_ids for i in range(3)] == [plain[i].token_ids for i in range(3)]


def test_what_may_come_at_each_place() -> None:
    """Contexts in any order, as trees of several steps bring them: in the reasoning, behind it."""
    model = letters.loaded("shown")
    end = max(Grammars(model).ends)
    row = tiny.request(0, [5], ignore_eos=False, structured={"choice": ["yes", "no"]})
    (grammar,) = Grammars(model).constrained(row, [5]).logits_processors
    assert isinstance(grammar, Grammar)

    def after(text: str) -> set[int]:
        masked = grammar([5, *ids(text, "shown")], torch.zeros(tiny.VOCAB))
        return set(torch.nonzero(masked == 0)[:, 0].tolist())

    (think,) = ids("<think>", "shown")
    first = set(ids("y", "shown") + ids("n", "shown") + ids("ye", "shown") + ids("yes", "shown"))
    everything = set(range(tiny.VOCAB))
    for _ in range(2):
        assert after("") == first | {think}
        assert after("<think>") == everything
        assert after("<think>no</think>") == first
        assert after("<think>no") == everything
        assert after("<think>no</think>yes") == {end}
        assert after("yes") == {end}
    assert grammar.forced([5, *ids("<think>no", "shown")], 9) == []
    assert grammar.forced([5, *ids("<think>no</think>n", "shown")], 9)[:1] == ids("o", "shown")


def test_who_leaves_the_reasoning_in_the_text_has_it_in_the_form() -> None:
    row = thinking(0, FORMS[0], "so it is</think>", "shown", prompt="Why?<think>",
                   reasoning_end="")  # fmt: skip
    done = decode(letters.loaded("shown"), [row])[0]
    assert (done.finish_reason, done.reasoning) == ("stop", None)
    assert done.text in FORMS[0]["choice"]
