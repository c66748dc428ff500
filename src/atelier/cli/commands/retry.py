"""``atelier retry``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandboxes_argument, waiting_options

if TYPE_CHECKING:
    from atelier.client.sandbox import Sandbox
    from atelier.schemas.sandboxes import Sandbox as SandboxDetails


@click.command(short_help="Try again what is stuck.")
@sandboxes_argument
@waiting_options
@json_option("Print {retried, failed} as JSON.")
@pass_invocation
def retry(
    invocation: Invocation, sandboxes: tuple[str, ...], no_wait: bool, timeout_seconds: float, as_json: bool
) -> None:
    """Try again what is stuck with sandboxes, and wait for its end. Prints their names.

    `get` shows what is stuck, why, and what to mend first. A sandbox that failed is not stuck: `start` it, or `rm` it.

    \b
    Examples:
      atelier get box
      atelier retry box
    """
    from atelier.cli.several import change_sandboxes

    def change(sandbox: Sandbox) -> SandboxDetails:
        return sandbox.retry(wait=not no_wait, timeout_seconds=timeout_seconds)

    with invocation.connect() as connection:
        change_sandboxes(connection, sandboxes, change, doing="trying again", as_json=as_json, word="retried")
