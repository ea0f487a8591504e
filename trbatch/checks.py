"""What a setting's value must be: checks that say in the user's words what is wrong with it.

Each raises `UsageError`, naming the setting.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from trbatch.errors import UsageError

INT32 = 2**31 - 1
_DIGITS = 20  # of a token id, with zeros in front


def refuse_unknown(keys: Iterable[str], names: Sequence[str], *, what: str = "setting") -> None:
    """Refuse a key that is none of the names.

    Raises:
        UsageError: names the nearest valid one.
    """
    for key in keys:
        if key not in names:
            raise UsageError(f"unknown {what} {key!r}", hint=nearest(key, names))


def nearest(key: str, names: Sequence[str]) -> str:
    """A hint at the name that was meant, or at all of them."""
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(names))}"


def whole(value: Any) -> Any:
    """A number like 3.0, which some formats make of a 3, as the 3; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def listed(name: str, value: Any) -> tuple[Any, ...]:
    """A list as a tuple. A text is none: it would become the list of its letters."""
    if not isinstance(value, list | tuple):
        spelled = f'"{value}"' if isinstance(value, str) else str(value)  # in TOML and in Python
        hint = f"write {name} = [{spelled}]" if isinstance(value, str | int) else None
        raise UsageError(f"{name} must be a list, not {value!r:.80}", hint=hint)
    return tuple(value)


def texts_of(name: str, value: Any) -> tuple[str, ...]:
    """A list of texts as a tuple."""
    texts = listed(name, value)
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{name} must be a list of texts; {text!r} is none")
    return texts


def bias_of(value: Any) -> dict[str, float]:
    """A bias with its token ids as text, as JSON has them; from a mapping or a list of pairs."""
    try:
        given = dict({} if value is None else value).items()
    except (TypeError, ValueError) as error:
        raise UsageError(f"logit_bias must map token ids to numbers, not {value!r:.80}") from error
    checked = {}
    for token, bias in given:
        if bias is None:  # a table's other rows have this token
            continue
        spelled = str(whole(token))
        is_number = spelled.isascii() and spelled.isdecimal() and len(spelled) <= _DIGITS
        if not is_number or int(spelled) > INT32:
            raise UsageError(f"logit_bias has {token!r:.80}, which is no token id")
        check_number(f"logit_bias of token {spelled}", bias, -100.0, 100.0)
        checked[str(int(spelled))] = float(bias)
    return checked


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuse what is no whole number from `low` to `high`, both allowed."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{name} must be {bound}, not {value}")


def check_number(
    name: str, value: Any, low: float, high: float, *, open_below: bool = False
) -> None:
    """Refuse what is no finite number from `low` to `high`; with `open_below` not `low` itself."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} must be a number, not {value!r}")
    if value < low or value > high or (open_below and value == low):
        bound = f"{'above' if open_below else 'at least'} {low:g}"
        upper = f" and at most {high:g}" if math.isfinite(high) else ""
        raise UsageError(f"{name} must be {bound}{upper}, not {value:g}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(filter(None, choices))}, not {value!r}")
