"""A row's own sampling fields over the job's: checked, merged and put into one canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from trbatch import structured
from trbatch.config import SamplingParams
from trbatch.errors import MissingExtra, UsageError

_REMEMBERED_SAMPLINGS = 4096


class BadRow(Exception):
    """A row cannot be decoded. Never leaves this package: it becomes the row's `RowError`."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text


class SamplingMerger:
    """The job's sampling with a row's own fields over it; each distinct set is checked once."""

    def __init__(self, sampling: SamplingParams) -> None:
        _check(sampling)
        self._base = sampling
        self._known: dict[bytes, tuple[SamplingParams, bytes]] = {}
        self._plain = (sampling, _canonical(sampling), sampling.seed)

    def merge(self, overrides: Mapping[str, Any] | None) -> tuple[SamplingParams, bytes, Any]:
        """Merge a row's own fields.

        Returns:
            the merged sampling without the row's own seed, that sampling as canonical JSON without
            what does not decide a sample's tokens (`seed` and `n`), and the seed: the row's, else
            the job's for all rows, else None.

        Raises:
            BadRow: a field is unknown or its value is wrong.
            MissingExtra: a package that a field needs is not installed.
        """
        if not overrides:
            return self._plain
        seed, rest = overrides.get("seed"), overrides
        if seed is not None:
            rest = {name: value for name, value in overrides.items() if name != "seed"}
        try:
            if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
                seed = self._base.merged({"seed": seed}).seed
            key = orjson.dumps(rest)  # not sorted: a schema's order matters
            merged = self._known.get(key) or self._remember(key, self._base.merged(rest))
        except MissingExtra:
            raise  # that would be every such row's end
        except UsageError as error:
            cure = f"; {error.hint}" if error.hint else ""
            raise BadRow("invalid_sampling", error.message + cure) from error
        except TypeError as error:
            raise BadRow("invalid_sampling", f"a sampling field is unusable: {error}") from error
        return *merged, self._base.seed if seed is None else seed

    def _remember(self, key: bytes, sampling: SamplingParams) -> tuple[SamplingParams, bytes]:
        if len(self._known) >= _REMEMBERED_SAMPLINGS:
            self._known.clear()
        _check(sampling)
        self._known[key] = (sampling, _canonical(sampling))
        return self._known[key]


def _check(sampling: SamplingParams) -> None:
    if sampling.structured is not None:
        structured.check(sampling.structured)


def _canonical(sampling: SamplingParams) -> bytes:
    values = sampling.identity()
    del values["seed"], values["n"]
    return orjson.dumps(values, option=orjson.OPT_SORT_KEYS)


def is_absent(value: Any) -> bool:
    """Whether a value says that there is none; some write NaN for it into Parquet."""
    return value is None or bool(value != value)
