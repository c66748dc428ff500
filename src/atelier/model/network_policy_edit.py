"""Changing a network policy by what is allowed and denied, instead of saying it whole. Words only.

An entry is a network or a domain, told apart by its form. Called by ``api/routes/networks.py``, inside the transaction
that writes the policy, and by the command line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Network

from atelier.model.errors import InvalidRequestError, NotFoundError
from atelier.model.network_policy import EgressMode, EgressPolicy, parse_domain, parse_network

_NETWORK_FORM = re.compile(r"\s*(?:[0-9./]*|[0-9a-fA-F.]*:[0-9a-fA-F.]*:[0-9a-fA-F.:]*(?:/[0-9]*)?)\s*")
"""Digits, dots and a slash; or at least two colons, as in IPv6, which is then refused in words of its own."""
_SHOWN_ENTRIES = 10


def split_entries(entries: Sequence[str]) -> tuple[list[str], list[str]]:
    """(networks, domains), by their form alone: whether they are valid is not looked at."""
    networks = [entry for entry in entries if _NETWORK_FORM.fullmatch(entry)]
    return networks, [entry for entry in entries if not _NETWORK_FORM.fullmatch(entry)]


def edit_egress(
    present: EgressPolicy, *, mode: EgressMode | None = None, deny: Sequence[str] = (), allow: Sequence[str] = ()
) -> EgressPolicy:
    """The present policy in another mode (None: the same), then without what is denied, then with what is allowed.

    ``all`` keeps the listed networks and drops the domains, which are part of the internet; ``none`` drops everything;
    what is allowed while nothing is makes a list.

    Raises InvalidRequestError, and NotFoundError (``egress_entry_not_found``) for what is denied and not listed.
    """
    if mode is EgressMode.NONE and allow:
        raise InvalidRequestError(
            "the egress mode none allows nothing, and something is to be allowed",
            code="invalid_egress_policy",
            hint="use the mode list to allow these and nothing else",
        )
    networks = {} if mode is EgressMode.NONE else dict.fromkeys(present.networks)
    domains = {} if mode in (EgressMode.NONE, EgressMode.ALL) else dict.fromkeys(present.domains)
    now = mode or present.mode
    denied_networks, denied_domains = split_entries(deny)
    for network in map(parse_network, denied_networks):
        if network not in networks:
            raise _not_listed(str(network), now, networks, domains, network)
        del networks[network]
    for domain in map(parse_domain, denied_domains):
        if domain not in domains:
            raise _not_listed(domain, now, networks, domains)
        del domains[domain]
    allowed_networks, allowed_domains = split_entries(allow)
    if allow and now is EgressMode.NONE:
        now = EgressMode.LIST
    if allowed_domains and now is EgressMode.ALL:
        parse_domain(allowed_domains[0])
        raise InvalidRequestError(
            f"{allowed_domains[0].strip()} is allowed already: the egress mode is all, the whole internet",
            code="invalid_egress_policy",
            hint="change to the mode list first, to allow this and nothing else",
        )
    return EgressPolicy.make(now, [*map(str, networks), *allowed_networks], [*domains, *allowed_domains])


def _not_listed(
    entry: str,
    mode: EgressMode,
    networks: dict[IPv4Network, None],
    domains: dict[str, None],
    network: IPv4Network | None = None,
) -> NotFoundError:
    listed = [*map(str, networks), *domains]
    shown = ", ".join(listed[:_SHOWN_ENTRIES]) or "nothing"
    if len(listed) > _SHOWN_ENTRIES:
        shown += f" and {len(listed) - _SHOWN_ENTRIES} more"
    wider = next((each for each in networks if network is not None and network.subnet_of(each)), None)
    hint = "only what is listed can be denied"
    if wider is not None:
        hint = f"it is a part of {wider}: deny that, and allow what is to stay"
    elif mode is EgressMode.ALL:
        hint = "the egress mode is all: change to the mode list and allow what is needed, or to none"
    return NotFoundError(
        f"{entry} cannot be denied: it is not listed; listed: {shown}", code="egress_entry_not_found", hint=hint
    )
