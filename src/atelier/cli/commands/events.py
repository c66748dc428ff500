"""``atelier events``."""

from __future__ import annotations

import sys

import click

from atelier.cli.invocation import Invocation, complete_sandbox, json_option, pass_invocation


@click.command(short_help="Follow what happens.")
@click.option("--sandbox", default="", metavar="SANDBOX", shell_complete=complete_sandbox, help="Only this one's.")
@click.option(
    "--after", "last_event_id", type=click.IntRange(min=0), metavar="ID", help="Begin behind this event, not now."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Stop after N events.")
@click.option("--follow", is_flag=True, hidden=True, help="It always follows.")
@json_option("One line of JSON per event.")
@pass_invocation
def events(
    invocation: Invocation, sandbox: str, last_event_id: int | None, limit: int | None, follow: bool, as_json: bool
) -> None:
    """Follow what happens to sandboxes and images until Ctrl-C. Bridges a restart of the manager.

    \b
    Examples:
      atelier events
      atelier events --sandbox box --json
      atelier events --after 0 --limit 20
    """
    del follow
    import json
    from itertools import islice

    from atelier.cli.output import print_line, printable
    from atelier.client import calls
    from atelier.client.events import follow_events

    with invocation.connect() as connection:
        sandbox_id = connection.send(calls.get_sandbox(sandbox)).id if sandbox else ""
        after = "" if last_event_id is None else str(last_event_id)
        stream = follow_events(connection, sandbox=sandbox_id, last_event_id=after)
        for event in islice(stream, limit):
            if as_json:
                print_line(event.model_dump_json())
            else:
                payload = json.dumps(event.payload, ensure_ascii=False)
                moment = event.at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
                print_line(
                    f"{event.id:>6}  {moment}  {printable(event.kind)}  {event.sandbox_id or '-'}  {printable(payload)}"
                )
            sys.stdout.flush()
