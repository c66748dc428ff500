"""``atelier snapshot``."""

from __future__ import annotations

import click

from atelier.cli.invocation import PAIR, Invocation, json_option, pass_invocation, sandbox_argument, waiting_options


@click.command(short_help="Save a running sandbox, to begin others there.")
@sandbox_argument
@click.argument("name", required=False)
@click.option("-l", "--label", "labels", type=PAIR, multiple=True, help="A label, for finding it again; repeatable.")
@click.option(
    "--keep-last", type=click.IntRange(1, 1000), metavar="N",
    help="Then delete older snapshots of it, until N are left; what something needs stays.",
)  # fmt: skip
@waiting_options
@json_option("Print the snapshot as JSON.")
@pass_invocation
def snapshot(
    invocation: Invocation,
    sandbox: str,
    name: str | None,
    labels: tuple[tuple[str, str], ...],
    keep_last: int | None,
    no_wait: bool,
    timeout_seconds: float,
    as_json: bool,
) -> None:
    """Save the running SANDBOX, memory and disk, under NAME (one is made if it is left out), and wait until sandboxes can
    begin from it. Prints its name. The sandbox goes on.

    What is in its memory is saved as it is, keys and passwords too.

    \b
    Examples:
      atelier snapshot box ready
      atelier snapshot box --keep-last 3 --label job=nightly
      atelier create --snapshot ready
    """
    from atelier.cli.output import print_line, print_model, print_note, printable
    from atelier.cli.progress import waiting
    from atelier.client.sandbox import Sandbox

    with invocation.connect() as connection:
        handle = Sandbox.connect(sandbox, connection=connection)
        try:
            with waiting(f"saving {sandbox}", shown=not as_json and not no_wait):
                taken = handle.snapshot(
                    name,
                    labels=dict(labels),
                    keep_last=keep_last,
                    wait=not no_wait,
                    timeout_seconds=timeout_seconds,
                )
        except KeyboardInterrupt:
            print_note("interrupted; it goes on: `atelier snapshots` shows it when it is ready")
            raise
    if as_json:
        print_model(taken.details)
    else:
        print_line(printable(taken.name))
