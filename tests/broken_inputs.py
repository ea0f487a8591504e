"""Broken inputs by seed: files in which good rows stand among everything that can go wrong."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MAX_ROW_BYTES = 20_000  # that the corpus is read with
SURROGATES = ["\\ud800", "\\udfff", "\\ud83d", "\\ude00\\ud83d"]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -0.0, 2**31, 2**53, 2**63 - 1, 10**30, "", " ", "\t\n",
    "\u0000", "a\u0000b", "\ufeff", "\ufffe", "é" * 50, "𝕏", "<|endoftext|>", [], {}, [[]], [{}],
    {"": ""}, [None], ["a", 1], {"a": None}, {"role": "user"}, [1, [2, [3]]], "null", "[]", "NaN",
]  # fmt: skip
FIELDS = [
    "prompt", "messages", "id", "custom_id", "sampling", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "ignore_eos", "n", "max_tokens", "body", "url", "method",
]  # fmt: skip


@dataclass
class Case:
    """A broken input.

    `good` are prompts by id that must come out; `rows` is how many rows the file has, None if that
    is not known; `refusals` are parts of messages with which the whole file may be refused.
    """

    name: str
    suffix: str
    data: bytes
    good: dict[str, str] = field(default_factory=dict)
    rows: int | None = None
    refusals: tuple[str, ...] = ()


def corpus(count: int, seed: int = 0) -> list[Case]:
    """`count` cases; each depends on the seed and its own number alone."""
    return [_case(number, random.Random(seed * 1_000_003 + number)) for number in range(count)]


def _case(number: int, rng: random.Random) -> Case:
    if number % 5 == 4:
        return _parquet(number, rng)
    lines: list[bytes] = []
    good: dict[str, str] = {}
    kinds = set()
    for place in range(rng.randint(1, 9)):
        if rng.random() < 0.5:
            name, prompt = f"good-{place}", f"prompt {place} {rng.choice(['é', 'x', '漢字'])}"
            good[name] = prompt
            lines.append(_good_line(rng, name, prompt))
        else:
            kind = rng.choice(list(BREAKERS))
            kinds.add(kind)
            lines.append(BREAKERS[kind](rng).replace(b"\n", b" "))
    # A file of nothing but broken lines may be no JSON Lines at all; good rows must come out.
    refusals = [] if good else ["has no rows", "one JSON array"]
    if rng.random() < 0.1 and good:
        kinds.add("duplicate id")
        lines.append(_good_line(rng, next(iter(good)), "again"))
        refusals.append("have the same id")
    newline = rng.choice([b"\n", b"\n", b"\r\n"])
    data = newline.join(lines) + rng.choice([b"", newline, newline * 3])
    if rng.random() < 0.1:
        data = b"\xef\xbb\xbf" + data
    rows = sum(bool(line.strip()) for line in lines)
    case = Case(f"{number}: {', '.join(sorted(kinds)) or 'good'}", ".jsonl", data, good, rows)
    return _packed(case, refusals, rng)


def _packed(case: Case, refusals: list[str], rng: random.Random) -> Case:
    """The case as it is, compressed, or compressed and damaged."""
    way = rng.choice(["plain", "plain", "plain", "gz", "zst", "cut", "flipped", "not gzip"])
    if way in ("gz", "cut", "flipped"):
        case.suffix, case.data = ".jsonl.gz", gzip.compress(case.data, mtime=0)
    elif way == "zst":
        case.suffix = ".jsonl.zst"
        case.data = pa.compress(case.data, "zstd", asbytes=True)
    elif way == "not gzip":
        case.suffix = ".jsonl.gz"
    if way == "cut":
        case.data = case.data[: rng.randrange(len(case.data))]
    if way == "flipped":
        at = rng.randrange(len(case.data))
        case.data = case.data[:at] + bytes([case.data[at] ^ 0xFF]) + case.data[at + 1 :]
    if way in ("cut", "flipped", "not gzip"):
        # A flipped byte may leave a file that decompresses; the check at its end is not everywhere.
        refusals += ["cannot read", "has no rows", "one JSON array"]
        case.good, case.rows = ({}, None)
    case.name += f" ({way})"
    case.refusals = tuple(refusals)
    return case


def _good_line(rng: random.Random, name: str, prompt: str) -> bytes:
    row: dict[str, Any] = {rng.choice(["id", "custom_id"]): name, "prompt": prompt}
    if rng.random() < 0.3:
        row["note"] = rng.choice(ODD)
    if rng.random() < 0.2:
        row |= {"temperature": 0.5, "max_tokens": 5}
    return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


# --- broken lines ---


def _cut(rng: random.Random) -> bytes:
    line = _good_line(rng, f"cut-{rng.random()}", "to be cut")
    return line[: rng.randrange(1, len(line))]


def _wrong_types(rng: random.Random) -> bytes:
    row = {name: rng.choice(ODD) for name in rng.sample(FIELDS, rng.randint(1, 6))}
    for name in ("id", "custom_id"):
        if isinstance(row.get(name), str | int):
            row[name] = f"{row[name]} {rng.random()}"
    return json.dumps(row).encode("utf-8", "surrogatepass")


def _openai(rng: random.Random) -> bytes:
    messages = rng.choice([*ODD, [{"role": "user", "content": rng.choice(ODD)}]])
    body = {"model": "m", rng.choice(["messages", "prompt", "tools"]): messages}
    row = {
        "custom_id": f"openai-{rng.random()}",
        "method": rng.choice(["POST", "GET", *ODD]),
        "url": rng.choice(["/v1/chat/completions", "/v1/completions", "/v1/other", *ODD]),
        "body": rng.choice([body, body, *ODD]),
    }
    return json.dumps(row).encode("utf-8", "surrogatepass")


def _surrogate(rng: random.Random) -> bytes:
    text = rng.choice(SURROGATES)
    where = rng.choice(["id", "prompt", "note", text])
    return f'{{"{where}": "a{text}b", "prompt ": "x"}}'.encode()


def _not_utf8(rng: random.Random) -> bytes:
    junk = rng.randbytes(rng.randint(1, 30)).replace(b'"', b"")
    return b'{"prompt": "' + junk + b'"}'


def _nul(rng: random.Random) -> bytes:
    return rng.choice(
        [
            b"\0",
            b'{"prompt": "a\0b"}',
            b'{"prompt": "a\\u0000b"}',
            b'{"id": "a\\u0000b%d", "prompt": "x"}' % rng.randrange(10**9),
            b'{"prompt": "x", "id": "n%d"}' % rng.randrange(10**9) + b"\0" * rng.randint(1, 50),
        ]
    )


def _deep(rng: random.Random) -> bytes:
    depth = rng.choice([65, 100, 255, 300, 1023, 1025, 4000])
    inner = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    value = inner[0] * depth + b"1" + inner[1] * depth
    where = rng.choice([b"prompt", b"note", b"messages", b"sampling", b"id"])
    return b'{"prompt": "x", "%b": %b}' % (where, value)


def _long(rng: random.Random) -> bytes:
    size = rng.choice([MAX_ROW_BYTES, MAX_ROW_BYTES + 1, 3 * MAX_ROW_BYTES, 1 << 20])
    return b'{"prompt": "%b"}' % (b"x" * size)


def _numbers(rng: random.Random) -> bytes:
    number = rng.choice([b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"0x10", b"01", b"+1", b"1."])
    where = rng.choice([b"note", b"n", b"seed", b"temperature", b"max_tokens", b"id"])
    return b'{"prompt": "x", "%b": %b}' % (where, number)


def _wide(rng: random.Random) -> bytes:
    row = {f"column {i}": rng.choice(ODD) for i in range(rng.choice([10, 300, 1000]))}
    return json.dumps({"prompt": "x", **row}).encode("utf-8", "surrogatepass")


def _junk(rng: random.Random) -> bytes:
    return rng.choice(
        [rng.randbytes(rng.randint(1, 200)), b"}", b"{", b"[]", b'"text"', b"1", b"null"]
    )


def _mutated(rng: random.Random) -> bytes:
    line = bytearray(_good_line(rng, f"mutated-{rng.random()}", "some text of a prompt"))
    for _ in range(rng.randint(1, 5)):
        line[rng.randrange(len(line))] = rng.randrange(256)
    return bytes(line)


def _twice(rng: random.Random) -> bytes:
    return b'{"prompt": "a", "prompt": "b", "id": "twice-%d", "id": null}' % rng.randrange(10**9)


BREAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "cut JSON": _cut,
    "wrong types": _wrong_types,
    "OpenAI line": _openai,
    "lone surrogate": _surrogate,
    "not UTF-8": _not_utf8,
    "NUL": _nul,
    "deep nesting": _deep,
    "long line": _long,
    "odd numbers": _numbers,
    "many columns": _wide,
    "junk": _junk,
    "mutated": _mutated,
    "keys twice": _twice,
}


# --- Parquet ---


def _parquet(number: int, rng: random.Random) -> Case:
    count = rng.randint(1, 6)
    columns: dict[str, pa.Array] = {}
    names = [f"good-{i}" for i in range(count)]
    texts = [f"prompt {i}" for i in range(count)]
    sound = True
    kind = rng.choice(list(PROMPTS))
    columns["prompt"] = PROMPTS[kind](texts)
    sound = kind in ("text", "large text", "dictionary")
    columns["id"] = pa.array(names)
    for other in rng.sample(sorted(OTHERS), rng.randint(0, 4)):
        columns[f"other {other}"] = OTHERS[other](count)
    if rng.random() < 0.2:
        wrong = rng.choice(["temperature", "n", "stop", "sampling", "messages", "custom_id"])
        columns[wrong] = OTHERS[rng.choice(sorted(OTHERS))](count)
        kind += f", wrong {wrong}"
        sound = False
    sink = io.BytesIO()
    refusals = ["the same id", "cannot read", "neither a column", "has no rows"]
    try:
        pq.write_table(pa.table(columns), sink)
    except pa.ArrowException:  # no Parquet form
        return _parquet(number, random.Random(rng.random()))
    data = sink.getvalue()
    way = rng.choice(["whole", "whole", "whole", "cut", "flipped"])
    if way == "cut":
        data = data[: rng.randrange(len(data))]
    if way == "flipped":
        at = rng.randrange(len(data))
        data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
    good = dict(zip(names, texts, strict=True)) if sound and way == "whole" else {}
    rows = count if way == "whole" else None
    case = Case(f"{number}: Parquet, {kind} ({way})", ".parquet", data, good, rows)
    case.refusals = tuple(refusals) if way != "whole" or not sound else ()
    return case


PROMPTS: dict[str, Callable[[list[str]], pa.Array]] = {
    "text": lambda texts: pa.array(texts),
    "large text": lambda texts: pa.array(texts, pa.large_string()),
    "dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "binary": lambda texts: pa.array([text.encode() for text in texts]),
    "numbers": lambda texts: pa.array(range(len(texts))),
    "lists": lambda texts: pa.array([[text] for text in texts]),
    "structs": lambda texts: pa.array([{"text": text} for text in texts]),
    "nulls": lambda texts: pa.nulls(len(texts)),
    "broken text": lambda texts: pa.array([b"\xff\xfe"] * len(texts)).view(pa.string()),
    "too long": lambda texts: pa.array(["x" * (MAX_ROW_BYTES + 1)] * len(texts)),
}

NOON = datetime(2026, 11, 22, 12)
OTHERS: dict[str, Callable[[int], pa.Array]] = {
    "booleans": lambda n: pa.array([i % 2 == 0 for i in range(n)]),
    "nanoseconds": lambda n: pa.array([i * 1001 + 1 for i in range(n)], pa.timestamp("ns")),
    "far times": lambda n: pa.array([2**62] * n, pa.timestamp("s")),
    "dates": lambda n: pa.array([NOON.date()] * n),
    "times": lambda n: pa.array([NOON.time()] * n),
    "durations": lambda n: pa.array([timedelta(seconds=i) for i in range(n)], pa.duration("ns")),
    "decimals": lambda n: pa.array([Decimal("1.5")] * n, pa.decimal128(30, 5)),
    "wide decimals": lambda n: pa.array([Decimal(10) ** 60] * n, pa.decimal256(70, 2)),
    "halves": lambda n: pa.array([1.5] * n, pa.float16()),
    "not a number": lambda n: pa.array([float("nan"), *[float("inf")] * (n - 1)]),
    "unsigned": lambda n: pa.array([2**64 - 1] * n, pa.uint64()),
    "fixed binary": lambda n: pa.array([b"ab"] * n, pa.binary(2)),
    "maps": lambda n: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())),
    "deep lists": lambda n: _deep_lists(n, 30),
    "empty structs": lambda n: pa.array([{"a": {"b": None}}] * n),
    "nulls": lambda n: pa.nulls(n),
    "broken texts": lambda n: pa.array([b"\xff"] * n).view(pa.string()),
    "dictionaries": lambda n: pa.array(["a"] * n).dictionary_encode(),
    "long texts": lambda n: pa.array(["y" * (MAX_ROW_BYTES - 1)] * n),
    "texts": lambda n: pa.array([f"text {i}" for i in range(n)]),
    "floats": lambda n: pa.array([i + 0.5 for i in range(n)]),
    "whole floats": lambda n: pa.array([float(i) for i in range(n)]),
}


def _deep_lists(count: int, depth: int) -> pa.Array:
    values: Any = 1
    for _ in range(depth):
        values = [values]
    return pa.array([values] * count)
