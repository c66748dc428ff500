"""The host as the router of what a link of ours sends: what it needs for that.

Called by the uplinks of root's homes. What the host has not got is told in words, never changed: ``ip_forward`` would make
it a router between all its networks, and another program's chain that drops what is forwarded is that program's.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Network

from atelier.host.namespaces import prefix_for
from atelier.model.errors import HostError
from atelier.network_holder import docker
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.side import NetworkSide

_CHAIN = re.compile(r"^table (\w+) (\S+) \{|^\tchain (\S+) \{|hook (forward) .*policy drop", re.MULTILINE)


class HostRouter:
    """``link``: the one by which guests' packets come to the host."""

    def __init__(self, names: NetworkNames, host: NetworkSide, link: str) -> None:
        self._names = names
        self._host = host
        self._link = link

    def taken_networks(self) -> list[IPv4Network]:
        """What the host has addresses or routes for, ``link`` not counted."""
        index = self._index()
        addresses = [address.network for number, address in self._host.links.addresses() if number != index]
        return addresses + [route.network for route in self._host.links.routes() if route.interface != index]

    def require_forwarding(self) -> None:
        """Raises HostError (``forwarding_off``); not where guests' link stands already, which then is a problem told."""
        if not self._host.links.is_forwarding() and not self._index():
            raise HostError(
                "this machine forwards no packets (net.ipv4.ip_forward is 0), so sandboxes would have no way out",
                code="forwarding_off",
                hint="as root: sysctl -w net.ipv4.ip_forward=1 (and in /etc/sysctl.d to keep it); or ATELIER_NETWORK=closed",
            )

    def problems(self) -> list[str]:
        """What keeps guests from the internet and is not ours to mend."""
        found: list[str] = []
        if not self._host.links.is_forwarding():
            found.append(
                "net.ipv4.ip_forward is 0: sandboxes have no way out; as root: sysctl -w net.ipv4.ip_forward=1"
            )
        dropping = self._dropping_chains()
        if dropping and not docker.is_present(dropping):
            names = ", ".join(" ".join(chain) for chain in dropping)
            found.append(f"{names} drops what is forwarded: let pass what comes from and goes to {self._link} there")
        return found

    async def ensure_accepted(self) -> bool:
        """By Docker's rules too; whether anything had to be done."""
        return await docker.ensure_accepted(self._names, self._link, prefix_for(self._host.namespace))

    async def ensure_accepted_absent(self) -> None:
        await docker.ensure_accepted_absent(self._names, self._link, prefix_for(self._host.namespace))

    def _index(self) -> int:
        """0: it is not there."""
        link = self._host.links.find_link(self._link)
        return link.index if link else 0

    def _dropping_chains(self) -> list[tuple[str, str, str]]:
        """(family, table, chain) of the host's that drop what is forwarded unless a rule of theirs lets it pass."""
        found: list[tuple[str, str, str]] = []
        family = table = chain = ""
        for match in _CHAIN.finditer(self._host.rules.run("list chains")):
            if match[1]:
                family, table = match[1], match[2]
            elif match[3]:
                chain = match[3]
            elif family in ("ip", "inet"):
                found.append((family, table, chain))
        return found
