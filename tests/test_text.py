"""Token ids to text and text to token ids, with the tokenizer of the small real model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trbatch.config import SamplingParams
from trbatch.engine import text as module
from trbatch.engine.sequence import Request
from trbatch.engine.text import EncodingFailed, StopChecker, encode, encode_all

VOCAB = 49152
# Characters of one to four bytes, joined ones, and one whose bytes this tokenizer takes one by one.
TEXTS = [
    "Plain words, and a few more of them.\n\nA second paragraph: 3.14159.",
    "你好，世界。今天天气很好，我们去公园吧。",
    "A 🎉 party 👩‍👩‍👧 with 🇫🇷 flags 🏳️‍🌈!",
    "naïve cafe\u0301, ½ − ¼ = ¼ €, Ελληνικά, العربية",
    "mixed 中文 and emoji 😀😀😀 and text",
    "  spaces   and\ttabs\n  kept  ",
    "a lone \ufffd sign",
]
slow_fixture = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.clean_up_tokenization_spaces = False  # as the loading of a model does
    return tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def feed(
    tokenizer: Any, ids: Sequence[int], *, eos: Sequence[int] = (), **sampling: Any
) -> tuple[StopChecker, int]:
    """A checker that was fed up to the end of the text, and how many tokens it took."""
    checker = StopChecker(tokenizer, SamplingParams(**sampling), frozenset(eos))
    for count, token in enumerate(ids, 1):
        if checker.ends_with(token):
            return checker, count
    return checker, len(ids)


def assert_cut(tokenizer: Any, ids: list[int], stop: str) -> None:
    """The text ends before `stop`, at the first token whose whole characters hold it."""
    checker, count = feed(tokenizer, ids, stop=[stop])
    decoded = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert checker.text() == decoded[-1].partition(stop)[0]
    # A character of which bytes are missing holds back what stands before it in its token.
    whole = [n for n, text in enumerate(decoded) if stop in text and not text.endswith("\ufffd")]
    assert count == min(whole, default=len(ids))


@pytest.mark.parametrize("text", TEXTS)
def test_text_without_an_end_is_what_the_tokenizer_decodes(tokenizer: Any, text: str) -> None:
    ids = ids_of(tokenizer, text)
    for sampling in ({}, {"stop": ["never said"]}):
        checker, count = feed(tokenizer, ids, **sampling)
        assert count == len(ids)
        assert checker.text() == tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_every_part_of_a_text_can_stop_it(tokenizer: Any, text: str, length: int) -> None:
    ids = ids_of(tokenizer, text)
    for stop in {text[at : at + length] for at in range(len(text) - length + 1)} - {"\ufffd"}:
        assert_cut(tokenizer, ids, stop)


def test_a_stop_string_may_be_made_of_bytes_of_many_tokens(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "ab 世界🎉 cd")
    assert len(ids) >= 6
    for stop in ("世", "界🎉", "🎉 c", "b 世界🎉 c"):
        checker, count = feed(tokenizer, ids, stop=[stop])
        assert checker.text() == "ab 世界🎉 cd".partition(stop)[0]
        assert tokenizer.decode(ids[: count - 1]).find(stop) < 0, "a token too late"


def test_half_a_character_at_the_end_is_shown_as_the_tokenizer_shows_it(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "party 🎉")[:-1]
    checker, _ = feed(tokenizer, ids, stop=["never said"])
    assert checker.text() == tokenizer.decode(ids)
    assert checker.text().endswith("\ufffd")


@slow_fixture
@given(ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), data=st.data())
def test_any_tokens_at_all_give_the_tokenizers_text_and_can_be_stopped(
    tokenizer: Any, ids: list[int], data: st.DataObject
) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    checker, _ = feed(tokenizer, ids, stop=["\x00 never said"])
    assert checker.text() == whole
    while ids and tokenizer.decode(ids, skip_special_tokens=True).endswith("\ufffd"):
        ids = ids[:-1]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    if whole:
        begin = data.draw(st.integers(0, len(whole) - 1))
        stop = whole[begin : begin + data.draw(st.integers(1, 12))]
        checker, count = feed(tokenizer, ids, stop=[stop])
        assert stop in tokenizer.decode(ids[:count], skip_special_tokens=True)
        assert checker.text() == whole.partition(stop)[0]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_and_stop_tokens_are_taken_and_not_shown(tokenizer: Any, ignore_eos: bool) -> None:
    end = tokenizer.eos_token_id
    ids = [*ids_of(tokenizer, "One two"), end, *ids_of(tokenizer, " three. four")]
    dot = ids_of(tokenizer, ".")[0]
    checker, count = feed(tokenizer, ids, eos=[end], stop_token_ids=[dot], ignore_eos=ignore_eos)
    assert ids[count - 1] == (dot if ignore_eos else end)
    assert checker.text() == ("One two three" if ignore_eos else "One two")


def test_an_end_token_beside_stop_strings_shows_the_whole_text(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    ids = [*ids_of(tokenizer, "Half a 世界")[:-1], end]
    checker, count = feed(tokenizer, ids, eos=[end], stop=["never said"])
    assert count == len(ids)
    assert checker.text() == tokenizer.decode(ids[:-1])


def test_of_two_stop_strings_in_one_token_the_earlier_cuts(tokenizer: Any) -> None:
    text = "an interesting case"
    ids = ids_of(tokenizer, text)
    for stops in (["esting", "ter"], ["ter", "esting"], ["interesting", "esting"]):
        checker, _ = feed(tokenizer, ids, stop=stops)
        assert checker.text() == text[: min(text.find(stop) for stop in stops)]


def test_messages_become_the_chat_template_with_the_assistants_turn_open(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "世界?"}]
    request = Request(key=0, sampling=SamplingParams(), messages=messages)
    ids = encode(tokenizer, request, VOCAB)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n世界?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ids == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_a_prompt_is_taken_as_it_is(tokenizer: Any) -> None:
    request = Request(key=0, sampling=SamplingParams(), prompt="Once upon a time")
    assert encode(tokenizer, request, VOCAB) == tokenizer("Once upon a time")["input_ids"]
    given_ids = Request(key=0, sampling=SamplingParams(), prompt_token_ids=(5, 6))
    assert encode(tokenizer, given_ids, VOCAB) == [5, 6]


@pytest.mark.parametrize(
    ("code", "template", "fields"),
    [
        ("no_chat_template", None, {"messages": [{"role": "user", "content": "a"}]}),
        (
            "chat_template_failed",
            "{{ raise_exception('roles must alternate') }}",
            {"messages": [{"role": "user", "content": "a"}]},
        ),
        ("chat_template_failed", "{{ messages[0].nothing.at }}", {"messages": [{"role": "user"}]}),
        ("empty_prompt", None, {"prompt": ""}),
        ("empty_prompt", None, {"prompt_token_ids": []}),
        ("invalid_token", None, {"prompt_token_ids": [VOCAB]}),
        ("invalid_token", None, {"prompt_token_ids": [-1]}),
    ],
)
def test_what_cannot_become_tokens_says_why(
    small_model: Path, code: str, template: str | None, fields: dict[str, Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = template
    with pytest.raises(EncodingFailed) as caught:
        encode(tokenizer, Request(key=0, sampling=SamplingParams(), **fields), VOCAB)
    assert caught.value.error.code == code
    assert caught.value.error.message


class CountingTokenizer:
    """Notes which texts it is asked for together."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.asked = tokenizer, []
        self.chat_template = tokenizer.chat_template
        self.apply_chat_template = tokenizer.apply_chat_template

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.asked.append(texts)
        return self.tokenizer(texts, **options)


def test_many_prompts_together_are_what_each_is_alone(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_takes_many", lambda _: True)
    sampling = SamplingParams()
    requests = [
        *(Request(key=i, sampling=sampling, prompt=text) for i, text in enumerate(TEXTS)),
        Request(key="none", sampling=sampling, prompt=""),
        *(
            Request(key=text, sampling=sampling, messages=[{"role": "user", "content": text}])
            for text in TEXTS
        ),
        Request(key="refused", sampling=sampling, messages=[{"role": "user"}]),
        Request(key="ids", sampling=sampling, prompt_token_ids=[5, 6]),
        Request(key="unknown", sampling=sampling, prompt_token_ids=[VOCAB]),
        *(Request(key=n, sampling=sampling, sample_index=n, prompt=TEXTS[0]) for n in range(3)),
    ]
    counting = CountingTokenizer(tokenizer)
    found = encode_all(counting, requests, VOCAB)
    failed = {}
    for request, ids in zip(requests, found, strict=True):
        if isinstance(ids, EncodingFailed):
            failed[request.key] = ids.error.code
        else:
            assert ids == encode(tokenizer, request, VOCAB)
    assert failed == {
        "none": "empty_prompt", "refused": "chat_template_failed", "unknown": "invalid_token",
    }  # fmt: skip
    assert [len(texts) for texts in counting.asked] == [len(TEXTS), len(TEXTS) + 1], "once each"


class FillsIn(PreTrainedTokenizerFast):
    """Like Code Llama's: a lone text gets other tokens than one among others."""

    def _encode_plus(self, text: Any, *arguments: Any, **options: Any) -> Any:
        text = text.replace("?", "!") if isinstance(text, str) else text
        return super()._encode_plus(text, *arguments, **options)


def test_texts_go_together_where_that_changes_nothing(tokenizer: Any, small_model: Path) -> None:
    assert module._takes_many(tokenizer)
    own = FillsIn.from_pretrained(small_model)
    requests = [Request(key=n, sampling=SamplingParams(), prompt="a?" * n) for n in (1, 2)]
    alone = [own(request.prompt)["input_ids"] for request in requests]
    assert encode_all(own, requests, VOCAB) == alone
    assert own([request.prompt for request in requests])["input_ids"] != alone


@slow_fixture
@given(st.lists(st.text(max_size=60), min_size=2, max_size=8))
def test_a_text_among_others_has_its_own_tokens(tokenizer: Any, texts: list[str]) -> None:
    requests = [Request(key=i, sampling=SamplingParams(), prompt=t) for i, t in enumerate(texts)]
    for one, ids in zip(texts, encode_all(tokenizer, requests, VOCAB), strict=True):
        alone = tokenizer(one)["input_ids"]
        assert ids == alone if alone else isinstance(ids, EncodingFailed)
