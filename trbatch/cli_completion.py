"""`trbatch completion`: the script that makes a shell complete commands and options."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem, get_completion_class

from trbatch.cli_fields import example

SHELLS = ("bash", "zsh", "fish")
Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

_VARIABLE = "_TRBATCH_COMPLETE"  # click's own name for it


def offering(values: Iterable[str], *, or_file: bool = False) -> Completer:
    """What an option offers at Tab: some values, or a file if none of them is meant."""
    known = tuple(values)

    def complete(
        context: click.Context, option: click.Parameter, begun: str
    ) -> list[CompletionItem]:
        items = [CompletionItem(value) for value in known if value.startswith(begun)]
        return [*items, CompletionItem(begun, type="file")] if or_file else items

    return complete


@click.command("completion", **example("trbatch completion bash >> ~/.bashrc"))
@click.argument("shell", type=click.Choice(SHELLS), metavar="SHELL")
def completion_command(shell: str) -> None:
    """Print the script by which SHELL completes commands, options and files.

    \b
    bash   trbatch completion bash >> ~/.bashrc
    zsh    trbatch completion zsh >> ~/.zshrc
    fish   trbatch completion fish > ~/.config/fish/completions/trbatch.fish

    A new shell knows it then. The script asks trbatch itself at each Tab, so it need not be made
    anew after an update.
    """
    kind = get_completion_class(shell)
    assert kind is not None, f"click knows no {shell}"
    program = click.get_current_context().find_root().command
    click.echo(kind(program, {}, "trbatch", _VARIABLE).source())
