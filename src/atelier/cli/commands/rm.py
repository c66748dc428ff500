"""``atelier rm``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from atelier.cli.invocation import Invocation, complete_sandbox, json_option, pass_invocation

if TYPE_CHECKING:
    from atelier.client.connection import Connection
    from atelier.model.errors import AtelierError

_AT_ONCE = 8


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
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    from atelier.cli.output import print_error, print_json, print_line
    from atelier.client.sandbox import Sandbox

    if everything == bool(sandboxes):
        raise click.UsageError(
            "Name sandboxes, or say --all." if not everything else "Name sandboxes or say --all, not both."
        )
    with invocation.connect() as connection:
        names = list(dict.fromkeys(sandboxes))
        if everything:
            names = [each.name for each in Sandbox.list(connection=connection)]
            if names and not yes:
                _ask(len(names))
        remove = partial(_remove, connection, force=force, wait=not no_wait)
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            outcomes = list(threads.map(remove, names))
    failed = [(name, error) for name, error in zip(names, outcomes, strict=True) if error is not None]
    removed = [name for name, error in zip(names, outcomes, strict=True) if error is None]
    if as_json:
        print_json(
            {"removed": removed, "failed": [{"name": n, "code": e.code, "message": e.message} for n, e in failed]}
        )
    else:
        for name in removed:
            print_line(name)
        for _, error in failed:
            print_error(error)
    if failed:
        click.get_current_context().exit(1)


def _ask(count: int) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("--all needs --yes when nobody can be asked.")
    click.confirm(f"Destroy all {count} sandboxes with all that is in them?", abort=True, err=True)


def _remove(connection: Connection, name: str, *, force: bool, wait: bool) -> AtelierError | None:
    from atelier.client import calls
    from atelier.model.errors import AtelierError, NotFoundError, TimeoutExceededError

    try:
        gone = connection.send(calls.delete_sandbox(name, wait=wait))
    except NotFoundError as error:
        return None if force else error
    except AtelierError as error:
        return error
    if wait and not gone:
        return TimeoutExceededError(f"the sandbox {name} is not gone yet", hint="its removal goes on; see `atelier ls`")
    return None
