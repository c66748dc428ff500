"""``atelier network``: show, allow, deny and limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from atelier.cli.invocation import (
    RATE_OR_NONE,
    UNLIMITED,
    Invocation,
    json_option,
    pass_invocation,
    sandbox_argument,
)

if TYPE_CHECKING:
    from atelier.client.call import Call
    from atelier.schemas.networks import SandboxNetwork

F = TypeVar("F", bound=Callable[..., Any])

_json = json_option("Print the network as JSON.")


def _entries(function: F) -> F:
    return click.argument("entries", metavar="[ENTRY]...", nargs=-1)(function)


@click.group(short_help="Show and limit what a sandbox reaches.")
def network() -> None:
    """What a sandbox may reach on the network, and how fast. Changes are in force at once, for open connections too.

    An ENTRY is a network (10.1.0.0/16, 203.0.113.7) or a domain (github.com; *.github.com stands for all names below
    it, not for itself).

    \b
    Examples:
      atelier network show box
      atelier network deny box --all
      atelier network allow box github.com 10.1.0.0/16
    """


@network.command(short_help="Show what it may reach.")
@sandbox_argument
@_json
@pass_invocation
def show(invocation: Invocation, sandbox: str, as_json: bool) -> None:
    """Show what SANDBOX may reach, its address, and what has passed.

    \b
    Example:
      atelier network show box
    """
    from atelier.client import network_calls

    _carry_out(invocation, network_calls.get_network(sandbox), as_json=as_json)


@network.command(short_help="Let it reach more.")
@sandbox_argument
@_entries
@click.option("--all", "everything", is_flag=True, help="The whole internet; private networks only where listed.")
@_json
@pass_invocation
def allow(invocation: Invocation, sandbox: str, entries: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Let SANDBOX reach each ENTRY. Where nothing was allowed, that and nothing else.

    \b
    Examples:
      atelier network allow box github.com '*.github.com' 203.0.113.0/24
      atelier network allow box --all
      atelier network allow box 10.1.0.0/16       a private network, beside the rest
    """
    from atelier.client import network_calls

    if not entries and not everything:
        raise click.UsageError("Say what: `atelier network allow box github.com`, or --all.")
    call = network_calls.change_network(sandbox, allow=entries, egress_mode="all" if everything else None)
    _carry_out(invocation, call, as_json=as_json)


@network.command(short_help="Let it reach less.")
@sandbox_argument
@_entries
@click.option("--all", "everything", is_flag=True, help="Everything: it then has no network.")
@click.option("--unlisted", is_flag=True, help="Everything that is not listed.")
@_json
@pass_invocation
def deny(
    invocation: Invocation, sandbox: str, entries: tuple[str, ...], everything: bool, unlisted: bool, as_json: bool
) -> None:
    """Take each ENTRY from what SANDBOX may reach, or everything.

    \b
    Examples:
      atelier network deny box github.com
      atelier network deny box --all
      atelier network deny box --unlisted         the internet no more, only what is listed
    """
    from atelier.client import network_calls

    if sum((bool(entries), everything, unlisted)) != 1:
        raise click.UsageError("Say one of: `atelier network deny box github.com`, --all, --unlisted.")
    mode = "none" if everything else "list" if unlisted else None
    _carry_out(invocation, network_calls.change_network(sandbox, deny=entries, egress_mode=mode), as_json=as_json)


@network.command(short_help="Limit how fast it is.")
@sandbox_argument
@click.option("--download", type=RATE_OR_NONE, help="To the sandbox: 512kbit, 10mbit, 1gbit, or none.")
@click.option("--upload", type=RATE_OR_NONE, help="From the sandbox: the same.")
@_json
@pass_invocation
def limit(
    invocation: Invocation, sandbox: str, download: int | str | None, upload: int | str | None, as_json: bool
) -> None:
    """Limit how fast SANDBOX may receive and send; none lifts a limit.

    \b
    Examples:
      atelier network limit box --download 10mbit --upload 2mbit
      atelier network limit box --upload none
    """
    from atelier.client import network_calls
    from atelier.client.call import KEEP, Keep

    if download is None and upload is None:
        raise click.UsageError("Say how fast: `atelier network limit box --download 10mbit`, or none.")

    def wish(rate: int | str | None) -> int | Keep | None:
        return KEEP if rate is None else None if rate == UNLIMITED else int(rate)

    call = network_calls.change_network(
        sandbox, download_kbit_per_second=wish(download), upload_kbit_per_second=wish(upload)
    )
    _carry_out(invocation, call, as_json=as_json)


def _carry_out(invocation: Invocation, call: Call[SandboxNetwork], *, as_json: bool) -> None:
    from atelier.cli.describing import describe_network
    from atelier.cli.output import print_fields, print_model

    with invocation.connect() as connection:
        found = connection.send(call)
    if as_json:
        print_model(found)
    else:
        print_fields(describe_network(found))
