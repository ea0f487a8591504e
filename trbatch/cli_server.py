"""`trbatch server`: the embedded queue server by hand."""

from __future__ import annotations

import click

from trbatch import cli_options as options
from trbatch import server
from trbatch.cli_fields import epilog, example
from trbatch.cli_help import HelpGroup
from trbatch.cli_output import print_json, print_server


@click.group("server", cls=HelpGroup, epilog=epilog("trbatch server status"))
def server_group() -> None:
    """Start, stop or look at the embedded queue server.

    It starts by itself when a command needs it, and belongs to this user on this host.
    """


@server_group.command("start", **example("trbatch server start"))
@options.json_option
def server_start(as_json: bool) -> None:
    """Start the server if it does not run."""
    print_server(server.start(), as_json=as_json)


@server_group.command("stop", **example("trbatch server stop"))
@options.json_option
def server_stop(as_json: bool) -> None:
    """Stop the server; what is queued stays on disk for its next start."""
    ran = server.stop()
    if as_json:
        print_json({"stopped": ran})
    else:
        click.echo("stopped" if ran else "was not running")


@server_group.command("status", **example("trbatch server status --json"))
@options.json_option
def server_status(as_json: bool) -> None:
    """Tell whether the server runs, and where."""
    print_server(server.status(), as_json=as_json)
