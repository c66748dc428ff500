"""``atelier host``: becomes the program that sets machines up, which knows its own options."""

from __future__ import annotations

import click

from atelier.cli.commands.up import become_program


@click.command(
    short_help="Make a production host of this machine.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def host(arguments: tuple[str, ...]) -> None:
    """Make a production host of this machine, look after it, or undo it. Needs root."""
    become_program("atelier.host_setup", list(arguments))
