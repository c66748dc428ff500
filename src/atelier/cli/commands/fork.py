"""``atelier fork``."""

from __future__ import annotations

import click

from atelier.cli.invocation import PAIR, Invocation, json_option, pass_invocation, sandbox_argument, waiting_options


@click.command(short_help="Make copies of a running sandbox.")
@sandbox_argument
@click.option("-n", "--count", type=int, default=1, show_default=True, metavar="N", help="How many.")
@click.option("--name-prefix", metavar="PREFIX", help="They are PREFIX-1, PREFIX-2, ...  [default: SANDBOX's name]")
@click.option("-l", "--label", "labels", type=PAIR, multiple=True, help="A label beside SANDBOX's own; repeatable.")
@waiting_options
@json_option("Print a list of sandboxes as JSON.")
@pass_invocation
def fork(
    invocation: Invocation,
    sandbox: str,
    count: int,
    name_prefix: str | None,
    labels: tuple[tuple[str, str], ...],
    no_wait: bool,
    timeout_seconds: float,
    as_json: bool,
) -> None:
    """Make sandboxes that go on from where the running SANDBOX is now, and wait until they run. Prints their names.
    SANDBOX goes on itself.

    Each has a name, an address and keys of its own; what is in SANDBOX's memory and on its disk they all have, keys and
    passwords of programs too. Where the host has no room for all, nothing is done and it is said how many would fit.

    \b
    Examples:
      atelier fork box
      atelier fork box --count 20 --name-prefix worker --label job=7
    """
    from atelier.cli.output import print_json, print_line, print_note, printable
    from atelier.cli.progress import waiting
    from atelier.client.sandbox import Sandbox

    with invocation.connect() as connection:
        handle = Sandbox.connect(sandbox, connection=connection)
        try:
            with waiting(f"forking {sandbox}", shown=not as_json):
                forks = handle.fork(
                    count,
                    name_prefix=name_prefix,
                    labels=dict(labels),
                    wait=not no_wait,
                    timeout_seconds=timeout_seconds,
                )
        except KeyboardInterrupt:
            print_note("interrupted; what was begun goes on: `atelier ls` shows it")
            raise
    if as_json:
        print_json([each.details.model_dump(mode="json") for each in forks])
    else:
        for each in forks:
            print_line(printable(each.name))
