"""``atelier restore``: becomes the manager's program, which takes the data folder for itself."""

from __future__ import annotations

import click

from atelier.cli.commands.up import become_manager
from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.command(short_help="Bring a backup back.")
@click.argument("file", type=click.Path(dir_okay=False))
@json_option("Print what was done as JSON.")
@pass_invocation
def restore(invocation: Invocation, file: str, as_json: bool) -> None:
    """Put the database of FILE, made by `atelier backup`, in the place of the present one. Atelier must not run.

    FILE is checked as a whole before anything is changed. The present database is kept beside the new one. Disks that
    exist are never touched; those that FILE holds and that are missing here are brought back. Works in an empty data
    folder as well.

    \b
    Examples:
      atelier restore atelier-backup.tar.gz
      atelier --data-dir /srv/atelier restore atelier-backup.tar.gz
    """
    arguments = [f"--restore={file}"]
    if as_json:
        arguments.append("--json")
    if invocation.data_dir:
        arguments += ["--data-dir", invocation.data_dir]
    become_manager(arguments)
