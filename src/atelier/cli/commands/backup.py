"""``atelier backup``: becomes the manager's program, which reads the data folder itself."""

from __future__ import annotations

import click

from atelier.cli.commands.up import become_manager
from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.command(short_help="Save the database and the key.")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--with-disks", is_flag=True, help="Save the disks of sandboxes that do not run, too.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option("Print {path, size_bytes, manifest} as JSON.")
@pass_invocation
def backup(invocation: Invocation, file: str, with_disks: bool, force: bool, as_json: bool) -> None:
    """Write the database and the key of this machine's Atelier into FILE, a gzipped tar.

    Works while Atelier runs and while it does not. Disks are not in it unless asked for, and those of running
    sandboxes never are. FILE holds secrets: its mode is 0600.

    \b
    Examples:
      atelier backup atelier-backup.tar.gz
      atelier backup --with-disks /mnt/backups/atelier.tar.gz
      atelier backup --force atelier-backup.tar.gz --json
    """
    arguments = [f"--backup={file}"]
    if with_disks:
        arguments.append("--with-disks")
    if force:
        arguments.append("--force")
    if as_json:
        arguments.append("--json")
    if invocation.data_dir:
        arguments += ["--data-dir", invocation.data_dir]
    become_manager(arguments)
