"""Columns of two files of one dataset: the first file's, the second one's, whether it opens."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

NOON = datetime(2024, 5, 1, 12, 0, 0)
FINE = datetime(2024, 5, 1, 12, 0, 0, 123456)
WORDS = pa.dictionary(pa.int32(), pa.string())
NUMBERS = pa.list_(pa.int64())
POINT = pa.struct([("x", pa.int64()), ("y", pa.float64())])


def column(kind: pa.DataType, *values: Any) -> pa.Array:
    return pa.array([*values, None], kind)


Pair = tuple[str, pa.Array, pa.Array, bool]

PAIRS: list[Pair] = [
    # Points in time.
    ("ms as us", column(pa.timestamp("us"), NOON), column(pa.timestamp("ms"), NOON), True),
    ("us as ns", column(pa.timestamp("ns"), NOON), column(pa.timestamp("us"), NOON), True),
    ("us as ms", column(pa.timestamp("ms"), NOON), column(pa.timestamp("us"), NOON), True),
    ("finer us as ms", column(pa.timestamp("ms"), NOON), column(pa.timestamp("us"), FINE), False),
    ("zone", column(pa.timestamp("us", "UTC"), NOON), column(pa.timestamp("us"), NOON), True),
    ("no zone", column(pa.timestamp("us"), NOON),
     column(pa.timestamp("us", "UTC"), NOON.replace(tzinfo=UTC)), True),
    ("day as time", column(pa.timestamp("us"), NOON), column(pa.date32(), date(2024, 5, 1)), True),
    ("late day as ns", column(pa.timestamp("ns"), NOON), column(pa.date32(), date(3000, 1, 1)),
     False),
    ("noon as day", column(pa.date32(), date(2024, 5, 1)), column(pa.timestamp("us"), NOON), True),
    ("time as text", column(pa.string(), "x"), column(pa.timestamp("us"), NOON), True),
    ("day as text", column(pa.string(), "x"), column(pa.date32(), date(2024, 5, 1)), True),
    ("hour as text", column(pa.string(), "x"), column(pa.time64("us"), time(7)), True),
    ("span as text", column(pa.string(), "x"), column(pa.duration("s"), timedelta(hours=1)), True),
    ("text as time", column(pa.timestamp("us"), NOON), column(pa.string(), "soon"), False),
    ("bool as time", column(pa.timestamp("us"), NOON), column(pa.bool_(), True), False),
    # Numbers.
    ("uint8 as int64", column(pa.int64(), 1), column(pa.uint8(), 255), True),
    ("int8 as uint8", column(pa.uint8(), 1), column(pa.int8(), 1), True),
    ("negative as uint8", column(pa.uint8(), 1), column(pa.int8(), -1), False),
    ("huge uint64", column(pa.int64(), 1), column(pa.uint64(), 2**63), False),
    ("int64 as int32", column(pa.int32(), 1), column(pa.int64(), 2), True),
    ("big int64 as int32", column(pa.int32(), 1), column(pa.int64(), 2**31), False),
    ("int64 as double", column(pa.float64(), 0.5), column(pa.int64(), 2**53), True),
    ("huge int64 as double", column(pa.float64(), 0.5), column(pa.int64(), 2**53 + 1), False),
    ("int64 as float", column(pa.float32(), 0.5), column(pa.int64(), 2**24), True),
    ("big int64 as float", column(pa.float32(), 0.5), column(pa.int64(), 2**24 + 1), False),
    ("bool as int64", column(pa.int64(), 1), column(pa.bool_(), True), True),
    ("bool as double", column(pa.float64(), 0.5), column(pa.bool_(), True), True),
    ("bool as text", column(pa.string(), "x"), column(pa.bool_(), True), True),
    ("float as double", column(pa.float64(), 0.5), column(pa.float32(), 0.5), True),
    ("double as float", column(pa.float32(), 0.5), column(pa.float64(), 0.1), True),
    ("whole double as int64", column(pa.int64(), 1), column(pa.float64(), 2.0), True),
    ("double as int64", column(pa.int64(), 1), column(pa.float64(), 2.5), False),
    ("double as text", column(pa.string(), "x"), column(pa.float64(), 2.5), True),
    ("digits as int64", column(pa.int64(), 1), column(pa.string(), "2"), True),
    ("text as int64", column(pa.int64(), 1), column(pa.string(), "two"), False),
    ("decimal as text", column(pa.string(), "x"), column(pa.decimal128(9, 2), Decimal("1.25")),
     True),
    ("decimal as double", column(pa.float64(), 0.5), column(pa.decimal128(9, 2), Decimal("1.25")),
     True),
    ("int64 as null", pa.nulls(2), column(pa.int64(), 1), False),
    ("null as int64", column(pa.int64(), 1), pa.nulls(2), True),
    ("null as list", column(NUMBERS, [1]), pa.nulls(2), True),
    ("null as struct", column(POINT, {"x": 1, "y": 2.0}), pa.nulls(2), True),
    # Texts and bytes.
    ("large text", column(pa.string(), "x"), column(pa.large_string(), "y"), True),
    ("categories as text", column(pa.string(), "x"), column(WORDS, "a"), True),
    ("text as categories", column(WORDS, "a"), column(pa.string(), "x"), True),
    ("categories as int64", column(pa.int64(), 1), column(WORDS, "a"), False),
    ("bytes as large", column(pa.large_binary(), b"x"), column(pa.binary(), b"y"), True),
    ("large bytes", column(pa.binary(), b"x"), column(pa.large_binary(), b"y"), True),
    ("text as bytes", column(pa.binary(), b"x"), column(pa.string(), "y"), True),
    ("bytes as text", column(pa.string(), "x"), column(pa.binary(), b"y"), True),
    ("broken bytes as text", column(pa.string(), "x"), column(pa.binary(), b"\xff"), False),
    ("bytes of another length", column(pa.binary(2), b"xx"), column(pa.binary(3), b"yyy"), False),
    # Lists and structs.
    ("fixed as list", column(NUMBERS, [1]), column(pa.list_(pa.int64(), 2), [1, 2]), True),
    ("fixed as large list", column(pa.large_list(pa.int64()), [1]),
     column(pa.list_(pa.int64(), 2), [1, 2]), True),
    ("list as fixed", column(pa.list_(pa.int64(), 2), [1, 2]), column(NUMBERS, [3, 4]), True),
    ("longer list as fixed", column(pa.list_(pa.int64(), 2), [1, 2]), column(NUMBERS, [3, 4, 5]),
     False),
    ("another fixed", column(pa.list_(pa.int64(), 2), [1, 2]),
     column(pa.list_(pa.int64(), 3), [1, 2, 3]), False),
    ("large list", column(NUMBERS, [1]), column(pa.large_list(pa.int64()), [2, 3], []), True),
    ("whole doubles in a list", column(NUMBERS, [1]), column(pa.list_(pa.float64()), [2.0]), True),
    ("doubles in a list", column(NUMBERS, [1]), column(pa.list_(pa.float64()), [2.5]), False),
    ("list as text", column(pa.string(), "x"), column(NUMBERS, [1]), False),
    ("text as list", column(pa.list_(pa.string()), ["x"]), column(pa.string(), "x"), False),
    ("struct as text", column(pa.string(), "x"), column(POINT, {"x": 1, "y": 2.0}), False),
    ("text as struct", column(POINT, {"x": 1, "y": 2.0}), column(pa.string(), "x"), False),
    ("struct as list", column(NUMBERS, [1]), column(POINT, {"x": 1, "y": 2.0}), False),
    ("whole doubles in a struct", column(POINT, {"x": 1, "y": 2.0}),
     column(pa.struct([("x", pa.float64())]), {"x": 2.0}), True),
    ("doubles in a struct", column(POINT, {"x": 1, "y": 2.0}),
     column(pa.struct([("x", pa.float64())]), {"x": 2.5}), False),
    ("another field", column(POINT, {"x": 1, "y": 2.0}),
     column(pa.struct([("z", pa.int64())]), {"z": 2}), False),
]  # fmt: skip
