"""``atelier pause``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandboxes_argument, waiting_options

if TYPE_CHECKING:
    from atelier.client.sandbox import Sandbox
    from atelier.schemas.sandboxes import Sandbox as SandboxDetails


@click.command(short_help="Put sandboxes on disk, memory included.")
@sandboxes_argument
@waiting_options
@json_option("Print {paused, failed} as JSON.")
@pass_invocation
def pause(
    invocation: Invocation, sandboxes: tuple[str, ...], no_wait: bool, timeout_seconds: float, as_json: bool
) -> None:
    """Put running sandboxes on disk with all that they have in memory, and wait until they are paused. Prints their
    names.

    Their processes, open files and terminals stand still until `resume`, or until somebody uses the sandbox; meanwhile
    they take neither memory nor processor.

    \b
    Examples:
      atelier pause box
      atelier pause box other-box --no-wait
    """
    from atelier.cli.several import change_sandboxes

    def change(sandbox: Sandbox) -> SandboxDetails:
        return sandbox.pause(wait=not no_wait, timeout_seconds=timeout_seconds)

    with invocation.connect() as connection:
        change_sandboxes(connection, sandboxes, change, doing="pausing", as_json=as_json, word="paused")
