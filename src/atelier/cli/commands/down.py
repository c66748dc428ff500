"""``atelier down``: asks the running manager; where none runs, becomes the manager's program for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from atelier.cli.commands.up import become_manager
from atelier.cli.invocation import Invocation, json_option, pass_invocation

if TYPE_CHECKING:
    from atelier.client.connection import Connection
    from atelier.model.layout import DataLayout
    from atelier.schemas.host import ShutdownAnswer

_POLL_SECONDS = 0.1


@click.command(short_help="Stop the sandboxes and end Atelier.")
@click.option("--destroy", is_flag=True, help="Destroy the sandboxes, with all that is in them; asks first.")
@click.option("--keep", is_flag=True, help="End the manager only; the sandboxes go on.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--mode", type=click.Choice(["local", "mock"]), help="The mode of a manager that does not run.")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(min=1), default=120.0, show_default=True,
              metavar="SECONDS", help="How long to wait for the manager's end, once the sandboxes are stopped.")  # fmt: skip
@json_option("Print {stopped | destroyed, running} as JSON.")
@pass_invocation
def down(
    invocation: Invocation,
    destroy: bool,
    keep: bool,
    yes: bool,
    mode: str | None,
    timeout_seconds: float,
    as_json: bool,
) -> None:
    """Stop all sandboxes, end the manager and wait until it is gone. Prints the names of the sandboxes.

    What is on their disks stays: after `atelier up`, `atelier start` boots them again. Where no manager runs on this
    machine, sandboxes that one has left running are found and stopped without it.

    \b
    Examples:
      atelier down
      atelier down --destroy
      atelier down --keep
    """
    from atelier.cli.output import print_json, print_line, print_note, printable
    from atelier.cli.progress import waiting
    from atelier.client import lifecycle_calls
    from atelier.client.environment import find_local_data
    from atelier.host.files import is_folder_locked

    if destroy and keep:
        raise click.UsageError("--destroy and --keep exclude each other.")
    if destroy and not yes:
        _ask()
    what = "keep" if keep else "destroy" if destroy else "stop"
    local = find_local_data(api_url=invocation.api_url, data_dir=invocation.data_dir)
    if local is not None and not is_folder_locked(local.lock_file):
        _without_manager(local, what, mode, as_json=as_json)
        return
    doing = {"keep": "ending the manager", "stop": "stopping the sandboxes", "destroy": "destroying the sandboxes"}[
        what
    ]
    with invocation.connect() as connection:
        with waiting(doing, shown=not as_json):
            answer = connection.send(lifecycle_calls.shut_down(what))
        if not as_json:
            for name in answer.changed:
                print_line(printable(name))
        with waiting("waiting for the manager's end", shown=not as_json):
            _wait_gone(connection, local, timeout_seconds)
    if as_json:
        print_json({"destroyed" if destroy else "stopped": answer.changed, "running": answer.running})
    else:
        print_note(_summary(answer, destroy=destroy))
    if answer.running and not keep:
        click.get_current_context().exit(1)


def _ask() -> None:
    import sys

    if not sys.stdin.isatty():
        raise click.UsageError("--destroy needs --yes when nobody can be asked.")
    click.confirm("Destroy all sandboxes with all that is in them?", abort=True, err=True)


def _without_manager(data: DataLayout, what: str, mode: str | None, *, as_json: bool) -> None:
    from atelier.cli.output import print_json, print_note

    if what != "keep" and data.database.exists():
        options = [*(("--mode", mode) if mode else ()), *(("--json",) if as_json else ())]
        become_manager(["--down", what, "--data-dir", str(data.root), *options])
    if as_json:
        print_json({"destroyed" if what == "destroy" else "stopped": [], "running": []})
    print_note(f"no manager runs on the data folder {data.root}")


def _wait_gone(connection: Connection, local: DataLayout | None, timeout_seconds: float) -> None:
    """The manager of this machine holds its data folder to the very end; of another one only its port can be seen."""
    import dataclasses

    from atelier.client import calls
    from atelier.host.files import is_folder_locked
    from atelier.model.errors import TimeoutExceededError, TransientError

    health = dataclasses.replace(calls.health(), repeatable=False)
    deadline = time.monotonic() + timeout_seconds
    while True:
        if local is not None:
            gone = not is_folder_locked(local.lock_file)
        else:
            try:
                connection.send(health)
                gone = False
            except TransientError:
                gone = True
        if gone:
            return
        if time.monotonic() > deadline:
            raise TimeoutExceededError(
                f"the manager has not ended within {timeout_seconds:g} s",
                hint="it still ends what was under way; its own output says what it waits for",
            )
        time.sleep(_POLL_SECONDS)


def _summary(answer: ShutdownAnswer, *, destroy: bool) -> str:
    done = f"{len(answer.changed)} {'destroyed' if destroy else 'stopped'}; " if answer.changed else ""
    if not answer.running:
        return f"{done}Atelier has ended, nothing goes on running"
    return f"{done}Atelier has ended; still running: {', '.join(answer.running)}"
