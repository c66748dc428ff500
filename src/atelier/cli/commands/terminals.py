"""``atelier terminals`` and ``atelier terminal-close``."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandbox_argument


@click.command(short_help="List a sandbox's terminals that live on.")
@sandbox_argument
@click.option("-q", "--quiet", is_flag=True, help="Print ids only.")
@json_option("Print a list of terminals as JSON.")
@pass_invocation
def terminals(invocation: Invocation, sandbox: str, quiet: bool, as_json: bool) -> None:
    """List the terminals of SANDBOX that live on while nobody looks: those of the browser's page and of `shell --session`.
    One whose program has ended is among them for an hour.

    \b
    Examples:
      atelier terminals box
      atelier shell --session 3f2a9c0d1e5b box
    """
    from atelier.cli.output import print_json, print_line, print_table, show_age
    from atelier.client import terminal_calls

    with invocation.connect() as connection:
        found = connection.send(terminal_calls.list_terminals(sandbox)).items
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
    elif quiet:
        for each in found:
            print_line(each.id)
    elif not found:
        print_line(f"no terminals; open one with `atelier shell --session NAME {sandbox}`")
    else:
        print_table(
            ("ID", "TITLE", "SIZE", "VIEWERS", "STARTED", "STATE", "COMMAND"),
            (
                (
                    each.id,
                    each.title,
                    f"{each.columns}x{each.rows}",
                    str(each.viewers),
                    f"{show_age(each.created_at)} ago",
                    "runs" if each.exit_code is None else each.status,
                    " ".join(each.command)[:60],
                )
                for each in found
            ),
        )


@click.command("terminal-close", short_help="End terminals that live on.")
@sandbox_argument
@click.argument("names", metavar="TERMINAL...", nargs=-1, required=True)
@json_option("Print {closed, failed} as JSON.")
@pass_invocation
def terminal_close(invocation: Invocation, sandbox: str, names: tuple[str, ...], as_json: bool) -> None:
    """End the program of each TERMINAL (an id, or a title that only one has) of SANDBOX, by force after 3 s.

    \b
    Example:
      atelier terminal-close box work
    """
    from atelier.cli.output import print_json, print_line
    from atelier.cli.several import on_each
    from atelier.cli.shown_terminals import choose_terminal
    from atelier.client import terminal_calls

    with invocation.connect() as connection:
        listed = connection.send(terminal_calls.list_terminals(sandbox)).items

        def close(name: str) -> str:
            found = choose_terminal(listed, sandbox, name)
            connection.send(terminal_calls.close_terminal(sandbox, found.id))
            return found.id

        outcomes = on_each(names, close, doing="closing", as_json=as_json)
    if as_json:
        print_json({"closed": [closed for _, closed in outcomes.done], "failed": outcomes.failures_as_json()})
    else:
        for _, closed in outcomes.done:
            print_line(closed)
    outcomes.finish(as_json=as_json)
