"""``atelier version``."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.command(short_help="Show versions.")
@json_option("Print {client, manager} as JSON; manager is null if none answers.")
@pass_invocation
def version(invocation: Invocation, as_json: bool) -> None:
    """Show the versions of this program and of the manager, if one answers.

    \b
    Examples:
      atelier version
      atelier version --json
    """
    import dataclasses

    from atelier import __version__
    from atelier.cli.output import print_fields, print_json
    from atelier.client import calls
    from atelier.model.errors import AtelierError

    health = None
    try:
        with invocation.connect() as connection:
            health = connection.send(dataclasses.replace(calls.health(), read_timeout_seconds=5.0, repeatable=False))
        address = connection.endpoint.api_url
        manager = f"{health.version}, {health.mode} mode, {health.status}, at {address}"
    except AtelierError as error:
        manager = f"none: {error.message}"
    if as_json:
        print_json({"client": __version__, "manager": health.model_dump(mode="json") if health else None})
    else:
        print_fields([("client", __version__), ("manager", manager)])
