"""``atelier ssh-config``: what ~/.ssh/config needs, so that ``ssh NAME.atelier`` and IDEs enter sandboxes."""

from __future__ import annotations

import click

from atelier.cli.invocation import Invocation, json_option, pass_invocation


@click.command("ssh-config", short_help="Print what ~/.ssh/config needs.")
@click.option(
    "--host", metavar="HOST", help="The manager's machine as seen from here.  [default: that of the API's URL]"
)
@click.option("--identity", metavar="FILE", help="The private key to use.  [default: ssh's own choice]")
@json_option("Print where SSH is answered, and the key that it is known by, as JSON.")
@pass_invocation
def ssh_config(invocation: Invocation, host: str | None, identity: str | None, as_json: bool) -> None:
    """Print a part of an SSH client's configuration. With it `ssh NAME.atelier` leads to the sandbox NAME, end to end: the
    gateway only carries the bytes.

    \b
    Examples:
      atelier ssh-config > ~/.ssh/atelier.conf
      sed -i '1i Include atelier.conf' ~/.ssh/config
      ssh my-sandbox.atelier
    """
    from urllib.parse import urlsplit

    from atelier.cli.output import print_line, print_model
    from atelier.client import ssh_calls
    from atelier.model.errors import PreconditionError

    with invocation.connect() as connection:
        address = connection.send(ssh_calls.get_ssh())
    if not address.port:
        raise PreconditionError(address.problem, code="no_ssh", hint="set ATELIER_SSH_LISTEN and restart Atelier")
    if as_json:
        print_model(address)
        return
    key = " ".join(address.host_key.split()[:2])
    machine = host or urlsplit(invocation.endpoint().api_url).hostname or address.host
    identities = [f'    IdentityFile "{identity}"', "    IdentitiesOnly yes"] if identity else []
    for line in (
        "# Made by atelier ssh-config.",
        "Host atelier-jump",
        f"    HostName {machine}",
        f"    Port {address.port}",
        "    User _",
        "    HostKeyAlias atelier-jump",
        f"    KnownHostsCommand /bin/echo atelier-jump {key}",
        "    StrictHostKeyChecking yes",
        "    UserKnownHostsFile none",
        *identities,
        "Host *.atelier",
        "    User user",
        "    ProxyJump atelier-jump",
        "    # The jump is known by its key, and it leads to the sandbox of that name and nowhere else.",
        "    StrictHostKeyChecking no",
        "    UserKnownHostsFile /dev/null",
        "    LogLevel ERROR",
        *identities,
    ):
        print_line(line)
