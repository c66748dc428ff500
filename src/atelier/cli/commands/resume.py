"""``atelier resume``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandboxes_argument, waiting_options

if TYPE_CHECKING:
    from atelier.client.sandbox import Sandbox
    from atelier.schemas.sandboxes import Sandbox as SandboxDetails


@click.command(short_help="Let paused sandboxes go on where they stood.")
@sandboxes_argument
@click.option("--from-disk", is_flag=True, help="Boot them from their disks; what was in memory is given up.")
@waiting_options
@json_option("Print {resumed, failed} as JSON.")
@pass_invocation
def resume(
    invocation: Invocation,
    sandboxes: tuple[str, ...],
    from_disk: bool,
    no_wait: bool,
    timeout_seconds: float,
    as_json: bool,
) -> None:
    """Let paused sandboxes go on where they stood and wait until they run. Prints their names.

    A memory that fits this machine no more (QEMU was upgraded, say) is refused, and the sandbox stays paused; its disk
    is whole, and --from-disk boots it.

    \b
    Examples:
      atelier resume box
      atelier resume box --from-disk
    """
    from atelier.cli.several import change_sandboxes

    def change(sandbox: Sandbox) -> SandboxDetails:
        return sandbox.resume(from_disk=from_disk, wait=not no_wait, timeout_seconds=timeout_seconds)

    with invocation.connect() as connection:
        change_sandboxes(connection, sandboxes, change, doing="resuming", as_json=as_json, word="resumed")
