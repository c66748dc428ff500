"""``atelier logs``: the serial console."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import BYTES, Invocation, json_option, pass_invocation, sandbox_argument

if TYPE_CHECKING:
    from atelier.client.connection import Connection

_POLL_SECONDS = 1.0
_WINDOW_MAX_BYTES = 1024 * 1024


@click.command(short_help="Show the console.")
@sandbox_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C, or until the sandbox is gone.")
@click.option(
    "--bytes", "limit_bytes", type=BYTES, default="64K", show_default=True, help="How much to show, at most 1M."
)
@click.option("--raw", is_flag=True, help="Leave terminal escapes in, also when stdout is a terminal.")
@json_option("Print {sandbox, console} as JSON; bytes that are no UTF-8 become U+FFFD.")
@pass_invocation
def logs(invocation: Invocation, sandbox: str, follow: bool, limit_bytes: int, raw: bool, as_json: bool) -> None:
    """Show the newest part of the serial console of SANDBOX: what its kernel and its init wrote.

    The guest chose these bytes. On a terminal, escapes and control characters are shown and not obeyed, unless you
    say --raw; into a file or pipe the bytes go as they are.

    \b
    Examples:
      atelier logs box
      atelier logs box --follow
      atelier logs box --bytes 1M > console.log
    """
    from atelier.cli.output import print_json
    from atelier.client import calls

    if not 1 <= limit_bytes <= _WINDOW_MAX_BYTES:
        raise click.BadParameter("between 1 and 1M", param_hint="--bytes")
    if as_json and follow:
        raise click.UsageError("--json and --follow do not go together.")
    with invocation.connect() as connection:
        if as_json:
            found = connection.send(calls.read_console(sandbox, limit_bytes=limit_bytes))
            print_json({"sandbox": sandbox, "console": found.decode("utf-8", "replace")})
        elif follow:
            _follow(connection, sandbox, limit_bytes, raw)
        else:
            _write(connection.send(calls.read_console(sandbox, limit_bytes=limit_bytes)), raw)


def _follow(connection: Connection, sandbox: str, limit_bytes: int, raw: bool) -> None:
    from atelier.cli.console_follower import ConsoleFollower
    from atelier.client import calls
    from atelier.model.errors import NotFoundError
    from atelier.model.states import SandboxState

    follower = ConsoleFollower()
    # By id: should the name be given to a new sandbox meanwhile, this one's console has ended.
    identifier = connection.send(calls.get_sandbox(sandbox)).id
    first = follower.take(connection.send(calls.read_console(identifier, limit_bytes=_WINDOW_MAX_BYTES)))
    _write(first[-limit_bytes:], raw)
    while True:
        time.sleep(_POLL_SECONDS)
        try:
            state = connection.send(calls.get_sandbox(identifier)).state
            _write(follower.take(connection.send(calls.read_console(identifier, limit_bytes=_WINDOW_MAX_BYTES))), raw)
        except NotFoundError:
            return
        if state in (SandboxState.FAILED, SandboxState.STOPPED):
            return


def _write(data: bytes, raw: bool) -> None:
    from atelier.cli.output import printable_block

    if not raw and sys.stdout.isatty():
        data = printable_block(data.decode("utf-8", "backslashreplace")).encode("utf-8", "backslashreplace")
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
