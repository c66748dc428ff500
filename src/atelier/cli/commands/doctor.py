"""``atelier doctor``: becomes the manager's program, which holds the checks and needs no running manager for them."""

from __future__ import annotations

import click

from atelier.cli.commands.up import become_manager
from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.command(short_help="Check this machine.")
@click.option("--mode", type=click.Choice(["local", "mock"]), help="Check for this mode.")
@json_option("Print the findings as JSON.")
@pass_invocation
def doctor(invocation: Invocation, mode: str | None, as_json: bool) -> None:
    """Check whether this machine is fit for Atelier. Changes nothing.

    Every finding comes with its remedy. Exit status 1 if something is missing.

    \b
    Examples:
      atelier doctor
      atelier doctor --json
    """
    arguments = ["--doctor"]
    if as_json:
        arguments.append("--json")
    if mode:
        arguments += ["--mode", mode]
    if invocation.data_dir:
        arguments += ["--data-dir", invocation.data_dir]
    become_manager(arguments)
