"""The spine follows repeated passages of a sequence's own text."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trbatch.engine.ahead import ahead_of, put_first
from trbatch.engine.spine import MATCH, Spine


def spine_of(tokens: list[int]) -> Spine:
    spine = Spine()
    spine.follow(tokens)
    return spine


def test_what_followed_a_repeated_passage_is_expected_again() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 9, 9, 1, 2, 3, 4]
    spine = spine_of(text)
    assert spine.ahead(text, 5) == [5, 6, 7, 9, 9]
    assert spine.matched == MATCH
    assert spine.ahead(text, 12)[-3:] == [-1, -1, -1], "the text ends"


def test_three_repeated_tokens_are_not_enough() -> None:
    text = [1, 2, 3, 5, 1, 2, 3]
    assert spine_of(text).ahead(text, 2) == [-1, -1]


def test_a_long_match_is_not_given_up_for_a_newer_short_one() -> None:
    passage = [1, 2, 3, 4, 5, 6]
    text = [*passage, 7, 8, 9, 3, 4, 5, 6, 0, 0, *passage]
    assert spine_of(text).ahead(text, 2) == [7, 8]
    assert spine_of(text).matched == len(passage)


def test_a_match_that_ends_gives_way_to_another() -> None:
    text = [1, 2, 3, 4, 5, 0, 6, 1, 2, 3, 4, 9, 0, 0, 1, 2, 3, 4]
    assert spine_of(text).ahead(text, 2) == [9, 0], "the newest passage"
    text.append(5)
    assert spine_of(text).ahead(text, 2) == [0, 6], "2 3 4 5 occurred once"


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 60), max_size=4),
)
def test_reading_in_pieces_is_reading_at_once_and_what_it_expects_did_follow(text, cuts) -> None:
    piecewise = Spine()
    for cut in [*sorted(cuts), len(text)]:
        piecewise.follow(text[: min(cut, len(text))])
    whole = spine_of(text)
    expected = whole.ahead(text, 6)
    assert piecewise.ahead(text, 6) == expected
    assert piecewise.matched == whole.matched
    if expected[0] >= 0:
        known = [token for token in expected if token >= 0]
        passage = [*text[-whole.matched :], *known]
        found = [i for i in range(len(text)) if text[i : i + len(passage)] == passage]
        assert found, "the text holds the match and what is expected after it"


def test_only_a_path_that_kept_to_the_spine_stands_on_it() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4]
    ahead = ahead_of([Spine(), Spine()], [text, [1, 2]], 4, torch.device("cpu"))
    assert ahead.tokens.tolist() == [[5, 6, 7, 1], [-1] * 4]
    path = torch.tensor([[5, 6, 9], [5, 6, 9]])
    assert ahead.on_spine(path).tolist() == [[True, True, True], [True, False, False]]
    path = torch.tensor([[9, 6, 7], [-1, -1, -1]])
    assert ahead.on_spine(path).tolist() == [[True, False, False], [True, False, False]]


def test_putting_first_moves_what_was_there() -> None:
    rows = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7]])
    tokens = torch.tensor([7, 8, 5])
    assert put_first(tokens, rows).tolist() == [[7, 5, 6], [8, 5, 6], [5, 6, 7]]


@pytest.mark.parametrize("size", [0, 9])
def test_the_spine_changes_no_token_and_saves_forwards_on_repeated_text(size: int) -> None:
    model = tiny.loaded("llama")
    requests = [tiny.request(i, ids, max_tokens=48) for i, ids in enumerate(tiny.repetitive(4))]
    done = {}
    for spine in (False, True):
        engine = tiny.engine(model, max_num_seqs=4, tree_size=size, spine=spine)
        done[spine] = tiny.decode(engine, requests)
    assert done[True].keys() == done[False].keys()
    for key, one in done[True].items():
        assert one.token_ids == done[False][key].token_ids
    if size:
        steps = {
            spine: sum(d.num_spec_steps for d in some.values()) for spine, some in done.items()
        }
        assert steps[True] <= steps[False]
