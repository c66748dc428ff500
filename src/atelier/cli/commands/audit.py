"""``atelier audit``."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.command(short_help="Show who did what.")
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many entries.")
@click.option("--user", "user_id", default="", metavar="ID", help="Only this user's.")
@click.option("--operation", default="", metavar="NAME", help="Only these, as destroy_sandbox.")
@json_option("Print a list of entries as JSON.")
@pass_invocation
def audit(invocation: Invocation, limit: int, user_id: str, operation: str, as_json: bool) -> None:
    """Show who did what, when and from where, newest first.

    \b
    Example:
      atelier audit --operation destroy_sandbox
    """
    from atelier.cli.output import print_json, print_table
    from atelier.client import account_calls

    with invocation.connect() as connection:
        found = connection.send(account_calls.list_audit_entries(limit, user_id, operation)).items
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    print_table(
        ("AT", "USER", "OPERATION", "SUBJECT", "STATUS", "FROM", "THROUGH"),
        (
            (
                each.at.isoformat(timespec="seconds"),
                each.user_name,
                each.operation,
                each.subject,
                str(each.status),
                each.address,
                each.through,
            )
            for each in found
        ),
    )
