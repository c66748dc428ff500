"""``atelier stop``."""

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


@click.command(short_help="Stop sandboxes.")
@sandboxes_argument
@grace_option
@waiting_options
@json_option("Print {stopped, failed} as JSON.")
@pass_invocation
def stop(
    invocation: Invocation,
    sandboxes: tuple[str, ...],
    grace_seconds: float | None,
    no_wait: bool,
    timeout_seconds: float,
    as_json: bool,
) -> None:
    """Shut running sandboxes down and wait until they are stopped. Prints their names.

    What is on their disks stays, and their names; `start` boots them again. A guest that has not shut down after the
    grace time is cut off, and that is said.

    \b
    Examples:
      atelier stop box
      atelier stop box other-box --grace 5
    """
    from atelier.cli.describing import note_cut_off
    from atelier.cli.several import change_sandboxes

    def change(sandbox: Sandbox) -> SandboxDetails:
        return sandbox.stop(grace_seconds=grace_seconds, wait=not no_wait, timeout_seconds=timeout_seconds)

    with invocation.connect() as connection:
        change_sandboxes(
            connection, sandboxes, change, doing="stopping", as_json=as_json, word="stopped", note=note_cut_off
        )
