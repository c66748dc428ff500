"""``atelier restart``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import (
    Invocation,
    grace_option,
    json_option,
    pass_invocation,
    sandboxes_argument,
    waiting_options,
)

if TYPE_CHECKING:
    from atelier.client.sandbox import Sandbox
    from atelier.schemas.sandboxes import Sandbox as SandboxDetails


@click.command(short_help="Stop sandboxes and start them again.")
@sandboxes_argument
@grace_option
@waiting_options
@json_option("Print {restarted, failed} as JSON.")
@pass_invocation
def restart(
    invocation: Invocation,
    sandboxes: tuple[str, ...],
    grace_seconds: float | None,
    no_wait: bool,
    timeout_seconds: float,
    as_json: bool,
) -> None:
    """Stop running sandboxes, start them again and wait until they run. Prints their names.

    One that is stopped already wants `start`.

    \b
    Examples:
      atelier restart box
      atelier restart box --grace 5
    """
    from atelier.cli.several import change_sandboxes

    def change(sandbox: Sandbox) -> SandboxDetails:
        return sandbox.restart(grace_seconds=grace_seconds, wait=not no_wait, timeout_seconds=timeout_seconds)

    with invocation.connect() as connection:
        change_sandboxes(connection, sandboxes, change, doing="restarting", as_json=as_json, word="restarted")
