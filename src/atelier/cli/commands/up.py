"""``atelier up``: becomes the manager's program, which starts and watches the gateway itself."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.command(short_help="Start Atelier here.")
@click.option("--listen", metavar="ADDRESS:PORT", help="Where the API listens.  [default: 127.0.0.1:7420]")
@click.option("--data-dir", metavar="FOLDER", help="Where database, volumes and the local key are kept.")
@click.option("--mode", type=click.Choice(["local", "mock"]), help="Real sandboxes, or fakes for trying out the API.")
@click.option(
    "--on-exit",
    type=click.Choice(["keep", "stop", "destroy"]),
    help="What becomes of the sandboxes when Atelier ends.  [default: keep]",
)
@json_option("Write the log as lines of JSON.")
@pass_invocation
def up(
    invocation: Invocation,
    listen: str | None,
    data_dir: str | None,
    mode: str | None,
    on_exit: str | None,
    as_json: bool,
) -> None:
    """Start Atelier on this machine and stay in the foreground.

    Ctrl-C ends it; sandboxes go on running, and the next start finds them. `atelier down` stops them too. The key for
    the API is kept in the data folder, where the other commands of the same user find it.

    \b
    Examples:
      atelier up
      atelier up --listen 127.0.0.1:8000 --data-dir /tmp/try
      atelier up --mode mock
    """
    arguments = ["--log-format", "json"] if as_json else []
    for option, value in (
        ("--listen", listen),
        ("--data-dir", data_dir or invocation.data_dir),
        ("--mode", mode),
        ("--on-exit", on_exit),
    ):
        if value:
            arguments += [option, value]
    become_manager(arguments)


def become_manager(arguments: list[str]) -> NoReturn:
    become_program("atelier.manager", arguments)


def become_program(module: str, arguments: list[str]) -> NoReturn:
    """Replace this process by ``python -m MODULE``. ``-P``: a folder called ``atelier`` in the working directory is not
    taken for the program."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])  # noqa: S606
