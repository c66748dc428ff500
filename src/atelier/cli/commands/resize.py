"""``atelier resize``."""

from __future__ import annotations

import click

from atelier.cli.invocation import (
    MEBIBYTES,
    Invocation,
    json_option,
    pass_invocation,
    sandbox_argument,
    waiting_options,
)


@click.command(short_help="Grow a sandbox's disk.")
@sandbox_argument
@click.argument("disk_mib", metavar="SIZE", type=MEBIBYTES)
@waiting_options
@json_option("Print the sandbox as JSON.")
@pass_invocation
def resize(
    invocation: Invocation, sandbox: str, disk_mib: int, no_wait: bool, timeout_seconds: float, as_json: bool
) -> None:
    """Grow the disk of SANDBOX to SIZE (8192, 8192M or 8G), and the file system on it.

    A running sandbox goes on meanwhile; in a stopped one the file system grows at its next start. A disk cannot shrink.

    \b
    Examples:
      atelier resize box 8G
      atelier resize box 8192M
    """
    from atelier.cli.output import print_line, print_model, printable, show_mebibytes
    from atelier.cli.progress import waiting
    from atelier.client.sandbox import Sandbox

    with invocation.connect() as connection, waiting(f"resizing {sandbox}", shown=not as_json):
        handle = Sandbox.connect(sandbox, connection=connection)
        found = handle.resize(disk_mib=disk_mib, wait=not no_wait, timeout_seconds=timeout_seconds)
    if as_json:
        print_model(found)
    else:
        print_line(f"{printable(found.name)}  disk {show_mebibytes(found.disk_mib)}")
