"""How options are made: from the fields of config classes, in sections, with examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from trbatch.cli_help import HelpCommand, in_section

Decorator = Callable[[Any], Any]  # of a function that is to become a command


def setting(config: type, name: str, help: str, *flags: str, **attributes: Any) -> Decorator:
    """The option of one field of a config class; its default and its type are the field's."""
    default = {field.name: field.default for field in dataclasses.fields(config)}[name]
    if isinstance(default, bool):
        attributes.setdefault("is_flag", True)
    elif isinstance(default, tuple):
        attributes.setdefault("multiple", True)
    elif default is not None:
        attributes.setdefault("type", type(default))
    return click.option(
        name,
        *(flags or (f"--{name.replace('_', '-')}",)),
        default=default,
        show_default=default not in ("", None, ()) and not isinstance(default, bool),
        help=help,
        **attributes,
    )


def grouped(*options: Decorator, section: str = "") -> Decorator:
    """Several options as one decorator; `section` heads them in the help."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return in_section(section, decorate)


def example(text: str) -> dict[str, Any]:
    """What every command is made with: its class, and the example that its help ends in."""
    return {"epilog": epilog(text), "cls": HelpCommand}


def epilog(text: str) -> str:
    """An example as the end of a help."""
    return f"\b\nExample:\n  {text}"
