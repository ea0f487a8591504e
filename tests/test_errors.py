"""The exception tree: exit codes, hints, and its drawing in the docstring."""

from __future__ import annotations

import re

import pytest

from trbatch import errors

TREE = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.TrbatchError)
]


def test_each_error_has_the_exit_code_that_the_drawing_gives() -> None:
    drawn = dict(re.findall(r"(\w+) +(\d+)  ", errors.__doc__ or ""))
    assert {error.__name__: str(error.exit_code) for error in TREE} == drawn


@pytest.mark.parametrize("error", TREE)
def test_every_error_is_caught_as_trbatch_error_and_keeps_message_and_hint(
    error: type[errors.TrbatchError],
) -> None:
    with pytest.raises(errors.TrbatchError, match="row 3 is bad") as caught:
        raise error("row 3 is bad", hint="fix it")
    assert (caught.value.message, caught.value.hint) == ("row 3 is bad", "fix it")


def test_a_hint_may_be_left_out() -> None:
    assert errors.InputError("no such file").hint is None


def test_no_error_is_taken_for_success_or_for_failed_rows() -> None:
    codes = {error.exit_code for error in TREE}
    assert not codes & {errors.EXIT_OK, errors.EXIT_ROWS_FAILED}
