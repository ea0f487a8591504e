"""Reasoning split off, whoever opens it and however its markers are spelled."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import tiny

from trbatch.config import SamplingParams
from trbatch.engine.model import from_network
from trbatch.engine.text import StopChecker


class WordTokenizer:
    """A token for each word, blank or mark; marks may be special: then texts do not show them."""

    chat_template = None
    eos_token_id = 0

    def __init__(self, *special: str) -> None:
        self.all_special_tokens = ["<eos>", *special]
        self._words = ["<eos>"]

    def ids(self, text: str) -> list[int]:
        found = re.findall(r"</?\w+>|\[/?THINK\]|\s+|[^\s<\[]+", text)
        self._words += [word for word in dict.fromkeys(found) if word not in self._words]
        return [self._words.index(word) for word in found]

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.ids(token)[0]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        words = (self._words[token] for token in ids)
        hidden = self.all_special_tokens if skip_special_tokens else ()
        return "".join(word for word in words if word not in hidden)


def parts(
    output: str, prompt: str = "Why?", *, special: bool = False, **settings: object
) -> tuple[str | None, str]:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    marks = [params.reasoning_start, params.reasoning_end] if special else []
    tokenizer = WordTokenizer(*marks)
    prompt_ids = tokenizer.ids(prompt)
    checker = StopChecker(tokenizer, params, frozenset({0}))
    for token in tokenizer.ids(output):
        if checker.ends_with(token):
            break
    return checker.parts(prompt_ids)


spelled_both_ways = pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])


@spelled_both_ways
@pytest.mark.parametrize(
    ("prompt", "output"),
    [
        ("Why?", "<think>\nso it is\n</think>\n\nBecause."),
        ("Why?", "<think> so it is </think>Because."),
        ("Why?<think>", "so it is\n</think>\n\nBecause."),
        ("Why? <think>\n", "so it is </think> Because.<eos>"),
    ],
)
def test_the_reasoning_stands_apart(prompt: str, output: str, special: bool) -> None:
    assert parts(output, prompt, special=special) == ("so it is", "Because.")


@spelled_both_ways
def test_a_text_that_ends_in_its_reasoning_has_no_answer(special: bool) -> None:
    assert parts("<think> on and on", special=special) == ("on and on", "")
    assert parts("on and on", "<think>", special=special) == ("on and on", "")


@spelled_both_ways
def test_an_empty_reasoning_is_no_answer_lost(special: bool) -> None:
    assert parts("<think>\n\n</think>\n\nYes.", special=special) == ("", "Yes.")


@pytest.mark.parametrize(
    ("prompt", "output"),
    [
        ("Why?", "Because."),
        ("Why?", "In HTML <think> is no tag, </think> neither."),
        ("Why? <think>\n\n</think>\n\n", "Because."),  # a template that wants no reasoning
        ("What does <think> say?", "Nothing."),
    ],
)
def test_what_merely_holds_a_marker_is_no_reasoning(prompt: str, output: str) -> None:
    assert parts(output, prompt) == (None, output)


def test_a_stop_text_cuts_the_answer_alone() -> None:
    for special in (False, True):
        found = parts("<think> so </think> Because. END more", special=special, stop=("END",))
        assert found == ("so", "Because. ")


@spelled_both_ways
def test_markers_can_be_named_or_left_out(special: bool) -> None:
    marks = {"reasoning_start": "[THINK]", "reasoning_end": "[/THINK]"}
    assert parts("[THINK] so [/THINK] Yes.", special=special, **marks) == ("so", "Yes.")
    whole = "<think> so </think> Yes."
    assert parts(whole, reasoning_end="", reasoning_start="") == (None, whole)


def test_the_engine_hands_it_back_beside_the_text() -> None:
    """With numbers for words: 22 opens and 62 closes in what the model says."""
    ids = tiny.repetitive(3, seed=9)[2]
    model = from_network(tiny.network("llama"), tiny.NumberTokenizer(), name="thinks")
    marks = {"reasoning_start": "22 ", "reasoning_end": "62 "}
    done = tiny.decode(tiny.engine(model), [tiny.request(0, ids, **marks), tiny.request(1, ids)])
    thought, _, answer = done[1].text.removeprefix("22 ").partition("62 ")
    assert done[1].reasoning is None and answer
    assert (done[0].reasoning, done[0].text) == (thought.strip(), answer)
    assert done[0].token_ids == done[1].token_ids
