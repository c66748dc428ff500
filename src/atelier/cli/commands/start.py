"""``atelier start``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandboxes_argument, waiting_options

if TYPE_CHECKING:
    from atelier.client.sandbox import Sandbox
    from atelier.schemas.sandboxes import Sandbox as SandboxDetails


@click.command(short_help="Start stopped sandboxes.")
@sandboxes_argument
@waiting_options
@json_option("Print {started, failed} as JSON.")
@pass_invocation
def start(
    invocation: Invocation, sandboxes: tuple[str, ...], no_wait: bool, timeout_seconds: float, as_json: bool
) -> None:
    """Boot stopped or failed sandboxes from their disks and wait until they run. Prints their names.

    \b
    Examples:
      atelier start box
      atelier start box other-box --no-wait
    """
    from atelier.cli.several import change_sandboxes

    def change(sandbox: Sandbox) -> SandboxDetails:
        return sandbox.start(wait=not no_wait, timeout_seconds=timeout_seconds)

    with invocation.connect() as connection:
        change_sandboxes(connection, sandboxes, change, doing="starting", as_json=as_json, word="started")
