"""``atelier rm``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import Invocation, complete_sandbox, json_option, pass_invocation

if TYPE_CHECKING:
    from atelier.client.connection import Connection


@click.command(short_help="Destroy sandboxes.")
@click.argument("sandboxes", metavar="SANDBOX...", nargs=-1, shell_complete=complete_sandbox)
@click.option("--all", "everything", is_flag=True, help="All sandboxes; asks first.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-f", "--force", is_flag=True, help="A sandbox that does not exist is no error.")
@click.option("--no-wait", is_flag=True, help="Return as soon as the manager has taken the order.")
@json_option("Print {removed, failed} as JSON.")
@pass_invocation
def rm(
    invocation: Invocation,
    sandboxes: tuple[str, ...],
    everything: bool,
    yes: bool,
    force: bool,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Destroy sandboxes, with all that is in them, whatever their state.

    \b
    Examples:
      atelier rm box
      atelier rm box other-box
      atelier rm --all --yes
    """
    from atelier.cli.output import print_json, print_line
    from atelier.cli.several import on_each
    from atelier.client.sandbox import Sandbox

    if everything == bool(sandboxes):
        raise click.UsageError(
            "Name sandboxes, or say --all." if not everything else "Name sandboxes or say --all, not both."
        )
    with invocation.connect() as connection:
        names = list(sandboxes)
        if everything:
            names = [each.name for each in Sandbox.list(connection=connection)]
            if names and not yes:
                _ask(len(names))

        def remove(name: str) -> None:
            _remove(connection, name, force=force, wait=not no_wait)

        outcomes = on_each(names, remove, doing="destroying", as_json=as_json)
    removed = [name for name, _ in outcomes.done]
    if as_json:
        print_json({"removed": removed, "failed": outcomes.failures_as_json()})
    else:
        for name in removed:
            print_line(name)
    outcomes.finish(as_json=as_json)


def _ask(count: int) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("--all needs --yes when nobody can be asked.")
    click.confirm(f"Destroy all {count} sandboxes with all that is in them?", abort=True, err=True)


def _remove(connection: Connection, name: str, *, force: bool, wait: bool) -> None:
    from atelier.client import calls
    from atelier.client.sandbox_failures import not_gone_in_time
    from atelier.model.errors import NotFoundError

    try:
        gone = connection.send(calls.delete_sandbox(name, wait=wait))
    except NotFoundError:
        if force:
            return
        raise
    if wait and not gone:
        raise not_gone_in_time(name)
