"""``atelier open``."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation, sandbox_argument


@click.command("open", short_help="Print where to visit a port, or open it in a browser.")
@sandbox_argument
@click.argument("port")
@click.option("--path", default="/", metavar="PATH", help="Where to go there.  [default: /]")
@click.option("--browser", is_flag=True, help="Open it in this machine's browser, which enters as you.")
@json_option("Print {url} as JSON.")
@pass_invocation
def open_preview(invocation: Invocation, sandbox: str, port: str, path: str, browser: bool, as_json: bool) -> None:
    """Print the address of PORT (a number, or vscode, agent, browser) of SANDBOX.

    \b
    Examples:
      atelier open box 8000
      atelier open box vscode --browser
    """
    import webbrowser

    from atelier.cli.output import print_json, print_line
    from atelier.client import preview_calls
    from atelier.model.errors import HostError, PreconditionError

    with invocation.connect() as connection:
        if browser:
            url = connection.send(preview_calls.make_preview_visit(sandbox, port, path)).url
        else:
            found = connection.send(preview_calls.get_port(sandbox, port))
            if found.url is None:
                raise PreconditionError(
                    "previews are not served by this manager", code="no_previews", hint="its log says why"
                )
            url = found.url + (path if path.startswith("/") else f"/{path}")
    if browser and not webbrowser.open(url):
        raise HostError("no browser was found on this machine", hint=f"open this within a minute: {url}")
    if as_json:
        print_json({"url": url})
    elif not browser:
        print_line(url)
