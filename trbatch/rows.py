"""One row of the input: what it asks for, or why it cannot be decoded. Knows nothing of files.

A row is `{"prompt": …}`, `{"messages": […]}` or a line of OpenAI's batch format; with a template,
whatever columns that writes a prompt of. Its own sampling fields stand beside the prompt or in a
`sampling` object; every other field passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trbatch import openai_format
from trbatch.config import SAMPLING_FIELDS, SamplingParams
from trbatch.errors import RowError
from trbatch.merging import BadRow, SamplingMerger, is_absent
from trbatch.shaping import CHAT_ARGUMENTS, Asked, Shaping

if TYPE_CHECKING:
    from trbatch.template_columns import ColumnCheck

_SAMPLING_KEYS = SAMPLING_FIELDS | {"sampling"}


@dataclass(slots=True)
class Row:
    """One row of the input. `request` is None exactly when there is an `error`."""

    index: int  # place in the input, from 0; blank lines do not count
    line: int  # line of the file from 1; in Parquet the row's number from 1
    id: str  # custom_id, else id, else the row's number from 1
    # {"prompt": str} or {"messages": […]}, maybe "chat_template_kwargs", maybe "sampling"
    request: dict[str, Any] | None
    passthrough: dict[str, Any]
    error: RowError | None = None
    named: bool = True  # whether the id is written in the row


class RowChecker:
    """Turns parsed fields into rows, and whatever is wrong with them into error rows.

    Args:
        where: from a line number to the place that a message opens with, e.g. `prompts.jsonl:12`.
        prompt_column: the field that holds the prompt's text.
        id_column: the field that must hold the id; "": custom_id, else id, else the row's number.
        sampling: the job's, which a row's own fields are checked against.
        shaping: what the job makes of a row's prompt; None leaves it as it is.
    """

    def __init__(
        self,
        where: Callable[[int], str],
        prompt_column: str = "prompt",
        id_column: str = "",
        sampling: SamplingParams | None = None,
        shaping: Shaping | None = None,
    ) -> None:
        self._where = where
        self._prompt_column = prompt_column
        self._id_column = id_column
        self._merger = SamplingMerger(sampling or SamplingParams())
        self._shaping = shaping or Shaping()
        self.templated: ColumnCheck | None = None  # where a template writes the prompts
        if self._shaping.template is not None:
            from trbatch.template_columns import ColumnCheck  # here: few jobs need Jinja

            self.templated = ColumnCheck(self._shaping.template)

    def row(self, fields: Any, index: int, line: int) -> Row:
        """The row of parsed JSON. Takes a dictionary over: what is left in it passes through."""
        if type(fields) is not dict:
            kind = type(fields).__name__
            return self.bad(index, line, "not_an_object", f"a row must be an object, not {kind}")
        name = ""
        columns = None if self.templated is None else dict(fields)
        try:
            name = self._take_id(fields)
            request = self._take_request(fields, columns)
        except BadRow as error:
            return self.bad(index, line, error.code, error.text, name, self._passing(fields))
        return Row(index, line, name or str(index + 1), request, fields, None, name != "")

    def bad(
        self,
        index: int,
        line: int,
        code: str,
        text: str,
        name: str = "",
        fields: dict[str, Any] | None = None,
    ) -> Row:
        """The error row of a line; `text` says what is wrong and how to cure it."""
        error = RowError(code, f"{self._where(line)}: {text}")
        return Row(index, line, name or str(index + 1), None, fields or {}, error, name != "")

    def _passing(self, fields: dict[str, Any]) -> dict[str, Any]:
        """What passes through of a bad row: the same columns as of a good one."""
        taken = _SAMPLING_KEYS | {CHAT_ARGUMENTS}
        if self.templated is None:
            taken |= {self._prompt_column, "messages"}
            if type(fields.get("body")) is dict:
                taken |= {"body", "method", "url"}
        return {name: value for name, value in fields.items() if name not in taken}

    def _take_id(self, fields: dict[str, Any]) -> str:
        if self._id_column:
            value = fields.pop(self._id_column, None)
            if value is None:
                raise BadRow("invalid_id", f"no {self._id_column!r}, which --id-column names")
        else:
            value = fields.pop("custom_id", None)
            if value is None:
                value = fields.pop("id", None)
            if value is None:
                return ""
        if type(value) is int:
            return str(value)
        if type(value) is not str or not value:
            raise BadRow("invalid_id", f"an id must be a text or a whole number, not {value!r:.80}")
        if not _is_clean(value):
            raise BadRow("invalid_id", "the id holds a character that no text may have (NUL)")
        return value

    def _take_request(
        self, fields: dict[str, Any], columns: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Take what the request is made of out of the fields; `columns` are for the template."""
        asked = self._take_asked(fields, columns)
        prompt, messages = asked.prompt, asked.messages
        if prompt is not None and messages is not None:
            column = self._prompt_column
            raise BadRow("prompt_and_messages", f"both {column!r} and 'messages'; keep one of them")
        if messages is None:
            request = self._shaping.request(_checked_prompt(prompt), None, asked)
        else:
            request = self._shaping.request(None, _checked_messages(messages), asked)
        if asked.sampling:
            self._merger.merge(asked.sampling)
            request["sampling"] = asked.sampling
        return request

    def _take_asked(self, fields: dict[str, Any], columns: dict[str, Any] | None) -> Asked:
        column = self._prompt_column
        messages = None
        if self.templated is not None and columns is not None:
            _refuse_batch_line(columns)
            prompt = self.templated.render(columns)
        else:
            prompt, messages = fields.pop(column, None), fields.pop("messages", None)
            if prompt is None and messages is None:
                if type(fields.get("body")) is not dict:
                    raise BadRow("missing_prompt", f"neither {column!r} nor 'messages'; give one")
                return openai_format.take_body(fields, self._shaping)
        sampling = {} if _SAMPLING_KEYS.isdisjoint(fields) else _take_sampling(fields)
        return Asked(prompt, messages, sampling, fields.pop(CHAT_ARGUMENTS, None))


def _refuse_batch_line(columns: dict[str, Any]) -> None:
    body = columns.get("body")
    if type(body) is dict and not {"messages", "prompt"}.isdisjoint(body):
        text = "a line of OpenAI's batch format has its own prompt, which --template would ignore"
        raise BadRow("template_failed", f"{text}; leave --template away")


def _take_sampling(fields: dict[str, Any]) -> dict[str, Any]:
    nested = fields.pop("sampling", None) or {}
    if type(nested) is not dict:
        raise BadRow("invalid_sampling", "'sampling' must be an object of sampling fields")
    beside = {name: fields.pop(name) for name in list(fields) if name in SAMPLING_FIELDS}
    return {name: value for name, value in (beside | nested).items() if not is_absent(value)}


def _checked_prompt(prompt: Any) -> str:
    if type(prompt) is not str:
        text = f"a prompt must be a text, not {type(prompt).__name__}; a list goes into 'messages'"
        raise BadRow("invalid_prompt", text)
    if not prompt or prompt.isspace():
        raise BadRow("empty_prompt", "the prompt is empty; give it a text or drop the row")
    if not _is_clean(prompt):
        raise BadRow("invalid_characters", "the prompt holds a NUL character; remove it")
    return prompt


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if type(messages) is not list or not messages:
        raise BadRow("invalid_messages", "'messages' must be a list of {role, content} objects")
    checked = [_checked_message(message, number) for number, message in enumerate(messages)]
    for message in checked:
        if message.get("content") or "tool_calls" in message:
            return checked
    raise BadRow("empty_prompt", "every message is empty; give one a text or drop the row")


def _checked_message(given: Any, number: int) -> dict[str, Any]:
    if type(given) is not dict:
        raise BadRow("invalid_messages", f"messages[{number}] must be an object with a role")
    message: dict[str, Any] = given
    role = message.get("role")
    if type(role) is not str or not role:
        raise BadRow("invalid_messages", f"messages[{number}] needs a 'role', e.g. \"user\"")
    content = message.get("content")
    if type(content) is list:
        content = "\n".join(_part_text(part, number) for part in content)
        message = message | {"content": content}
    if type(content) is not str and not (content is None and message.get("tool_calls")):
        raise BadRow("invalid_messages", f"messages[{number}] needs a text as its 'content'")
    if content and not _is_clean(content):
        raise BadRow("invalid_characters", f"messages[{number}] holds a NUL character; remove it")
    return message


def _part_text(part: Any, number: int) -> str:
    if type(part) is dict and part.get("type") == "text" and type(part.get("text")) is str:
        return str(part["text"])
    kind = part.get("type") if type(part) is dict else type(part).__name__
    text = f"messages[{number}] holds a part of type {kind!r}; only text can be read"
    raise BadRow("unsupported_content", text)


def _is_clean(text: str) -> bool:
    return "\0" not in text
