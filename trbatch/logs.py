"""Logs on stderr, for people or, with `--log-format json`, a line of JSON for each event.

A line of JSON has `time` (ISO 8601, UTC), `level`, `logger` and `message`; an event that programs
may want to act on has `event` and fields of its own beside them. Neither form shows a password.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

import orjson

from trbatch.masking import mask_text, masked, printable

FORMATS = ("text", "json")
LOGGERS = ("trbatch", "rq")  # rq speaks of connections that were lost

_KNOWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_format = FORMATS[0]


def log_to_stderr(level: str, form: str = "") -> None:
    """Send the package's log to stderr, with times where the log is the point (INFO).

    Args:
        form: one of `FORMATS`; "" keeps what was chosen last.
    """
    global _format
    _format = form or _format
    handler = logging.StreamHandler(sys.stderr)
    pattern = "%(asctime)s %(message)s" if level == "INFO" else "%(levelname)s: %(message)s"
    formatter = JsonLines() if as_json() else TextLines(pattern, datefmt="%H:%M:%S")
    handler.setFormatter(formatter)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = name == "trbatch"  # tests listen at the root
    logging.getLogger("trbatch").setLevel(level)


def as_json() -> bool:
    """Whether what is written to stderr is to be lines of JSON."""
    return _format == "json"


def note(text: str, **fields: Any) -> None:
    """Say something whatever the level: a line on stderr, or an event with these fields."""
    text = mask_text(text)
    if as_json():
        known = {"name": "trbatch", "levelname": "INFO", "msg": text, "event": "note"}
        text = JsonLines().format(logging.makeLogRecord(known | fields))
    print(text, file=sys.stderr, flush=True)


class TextLines(logging.Formatter):
    """A line for people, without passwords and without what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        lines = mask_text(super().format(record)).split("\n")
        return "\n".join(printable(line.expandtabs(4)) for line in lines)


class JsonLines(logging.Formatter):
    """A line of JSON with the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        values |= {name: v for name, v in record.__dict__.items() if name not in _KNOWN}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        values = masked(values)
        try:
            return orjson.dumps(values, default=_as_text).decode()
        except TypeError:  # a lone surrogate, a number of over 64 bits
            return json.dumps(values, default=_as_text)


def _as_text(value: object) -> str:
    return mask_text(str(value))
