"""What a job's settings make of each row's prompt: template, system prompt, chat, its arguments.

All of it happens while the input is read, so that a chunk holds what the model will be asked and
neither a worker nor a row's fingerprint has to know of templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trbatch.config import JobSpec, check_chat_template_kwargs
from trbatch.errors import UsageError
from trbatch.merging import BadRow
from trbatch.naming import is_local_path

if TYPE_CHECKING:
    from trbatch.templates import RowTemplate

CHAT_ARGUMENTS = "chat_template_kwargs"  # a row's own, beside its messages
_SYSTEM_ROLES = ("system", "developer")


@dataclass(slots=True)
class Asked:
    """What a row asks for by itself, not checked yet. One of `prompt` and `messages` is None."""

    prompt: Any
    messages: Any
    sampling: dict[str, Any]
    chat_arguments: Any = None  # of the model's chat template
    is_raw: bool = False  # the row itself says that its prompt is to be continued as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """What a job adds to its rows. The default adds nothing and accepts every model's name."""

    template: RowTemplate | None = None
    system_prompt: str = ""
    chat: bool = False  # prompts become the user's turn of a chat
    chat_arguments: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()  # fields of OpenAI bodies
    model: str = ""  # that a body may name; "": any

    @classmethod
    def of(cls, spec: JobSpec, template_name: str = "") -> Shaping:
        """The shaping of a job.

        Args:
            spec: of the job, with its template's text.
            template_name: what messages call the template; "": `--template`.

        Raises:
            UsageError: the template is no valid one; names its file and line.
        """
        template = None
        if spec.template:
            from trbatch.templates import OPTION, RowTemplate  # here: few jobs need Jinja

            template = RowTemplate(spec.template, template_name or OPTION)
        return cls(
            template=template,
            system_prompt=spec.system_prompt,
            chat=spec.chat,
            chat_arguments=spec.chat_template_kwargs or {},
            ignored=frozenset(spec.ignore_body_fields),
            model=spec.model,
        )

    def request(
        self,
        prompt: str | None,
        messages: list[dict[str, Any]] | None,
        asked: Asked,
    ) -> dict[str, Any]:
        """What a worker will be asked: `{"prompt": …}` or `{"messages": …}`, maybe with arguments.

        Args:
            prompt: the checked text; None if there are messages.
            messages: the checked messages.
            asked: the row's own arguments of the chat template win over the job's.

        Raises:
            BadRow: the row's wishes and the job's do not go together.
        """
        own = _checked_arguments(asked.chat_arguments)
        if messages is None:
            assert prompt is not None, "a row has a prompt or messages"
            if asked.is_raw and (self.chat or self.system_prompt):
                option = "--system-prompt" if self.system_prompt else "--chat"
                text = f"{option} makes a chat of a prompt and /v1/completions is none"
                raise BadRow("not_a_chat", f"{text}; use /v1/chat/completions, or another job")
            if not self.chat and not self.system_prompt:
                if own:
                    text = f"{CHAT_ARGUMENTS!r} is for 'messages'; this row has a prompt"
                    raise BadRow("not_a_chat", f"{text}: remove it, or make chats with --chat")
                return {"prompt": prompt}
            messages = [{"role": "user", "content": prompt}]
        if self.system_prompt and messages[0]["role"] not in _SYSTEM_ROLES:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        request: dict[str, Any] = {"messages": messages}
        if merged := {**self.chat_arguments, **own}:
            request[CHAT_ARGUMENTS] = merged
        return request

    def check_model(self, named: Any) -> None:
        """Refuse a body that names another model than the job's.

        Case does not matter, and neither does a maker's name that one of the two leaves out. A
        folder's name stands for the model in it, whoever has made that.

        Raises:
            BadRow: it is another model, or no name at all.
        """
        if not self.model or "model" in self.ignored or named == self.model:
            return
        if type(named) is str and _is_same(named, self.model):
            return
        raise BadRow(
            "other_model",
            f"body.model is {named!r:.80}, the job's model is {self.model!r}; give --model, or "
            "--ignore-body-field model to decode it with the job's",
        )


def _is_same(named: str, model: str) -> bool:
    (maker, name), (our_maker, our_name) = _parts(named), _parts(model)
    if name != our_name:
        return False
    return is_local_path(model) or not maker or not our_maker or maker == our_maker


def _parts(name: str) -> tuple[str, str]:
    maker, _, last = name.lower().rstrip("/").rpartition("/")
    return maker, last


def _checked_arguments(arguments: Any) -> Mapping[str, Any]:
    if arguments is None:
        return {}
    try:
        check_chat_template_kwargs(arguments)
    except UsageError as error:
        cure = f"; {error.hint}" if error.hint else ""
        raise BadRow("invalid_chat_template_kwargs", error.message + cure) from error
    return arguments  # type: ignore[no-any-return]
