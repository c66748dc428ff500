"""``atelier port-share``."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandbox_argument


@click.command("port-share", short_help="Say who may visit a port.")
@sandbox_argument
@click.argument("port")
@click.option("--public", "wish", flag_value="public", help="Everybody.")
@click.option("--private", "wish", flag_value="private", help="Who may use the sandbox; links are taken back.")
@click.option("--link", "wish", flag_value="link", help="Whoever has the link that is printed, until it expires.")
@click.option("--days", type=click.IntRange(1, 365), default=7, show_default=True, help="How long the link is good.")
@json_option("Print the port, or with --link {url, expires_at}, as JSON.")
@pass_invocation
def port_share(invocation: Invocation, sandbox: str, port: str, wish: str | None, days: int, as_json: bool) -> None:
    """Say who may visit PORT (a number, or vscode, agent, browser) of SANDBOX.

    \b
    Examples:
      atelier port-share box 8000 --link --days 3
      atelier port-share box 8000 --public
      atelier port-share box 8000 --private
    """
    from atelier.cli.output import print_line, print_model
    from atelier.client import preview_calls
    from atelier.model.preview import Visibility

    if wish is None:
        raise click.UsageError("give one of --public, --private, --link")
    with invocation.connect() as connection:
        if wish == "link":
            made = connection.send(preview_calls.make_preview_link(sandbox, port, days * 86400))
        else:
            made = connection.send(preview_calls.set_port_visibility(sandbox, port, Visibility(wish)))
    if as_json:
        print_model(made)
    else:
        print_line(made.url or wish)
