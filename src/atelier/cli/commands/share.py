"""``atelier share``: with whom a sandbox is shared; share it, or stop."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandbox_argument


@click.command(short_help="Share a sandbox with others.")
@sandbox_argument
@click.option("--with", "others", multiple=True, metavar="USER", help="With this user, by id or e-mail address.")
@click.option("--stop", "no_more", multiple=True, metavar="USER", help="No more with this user.")
@json_option("Print with whom it is shared as JSON.")
@pass_invocation
def share(
    invocation: Invocation, sandbox: str, others: tuple[str, ...], no_more: tuple[str, ...], as_json: bool
) -> None:
    """Share SANDBOX: others may then use it as its owner may, but not destroy or share it. Shows with whom it is shared.

    \b
    Examples:
      atelier share box --with ada@example.org
      atelier share box --stop ada@example.org
    """
    from atelier.cli.output import print_json, print_line, print_table
    from atelier.client import account_calls

    with invocation.connect() as connection:
        for each in others:
            connection.send(account_calls.share_sandbox(sandbox, each))
        for each in no_more:
            connection.send(account_calls.unshare_sandbox(sandbox, each))
        found = connection.send(account_calls.list_shares(sandbox)).items
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    if not found:
        print_line("it is shared with nobody")
        return
    print_table(("ID", "NAME", "EMAIL"), ((each.user_id, each.name, each.email) for each in found))
