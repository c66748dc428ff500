"""``atelier ports``."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandbox_argument


@click.command(short_help="List a sandbox's ports and where to visit them.")
@sandbox_argument
@json_option("Print a list of ports as JSON.")
@pass_invocation
def ports(invocation: Invocation, sandbox: str, as_json: bool) -> None:
    """List the ports of SANDBOX on which something listens, and those that are shared.

    \b
    Example:
      atelier ports box
    """
    from atelier.cli.output import print_json, print_table
    from atelier.client import preview_calls

    with invocation.connect() as connection:
        found = connection.send(preview_calls.list_ports(sandbox)).items
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    is_open = {True: "open", False: "closed", None: "-"}
    print_table(
        ("PORT", "STATE", "VISITED BY", "URL"),
        ((str(each.port), is_open[each.is_open], each.visibility.value, each.url or "") for each in found),
    )
